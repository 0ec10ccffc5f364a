"""The web page: its files, as they are served, and the headers that keep a browser to them.

Knows the files in `static/`, each by its own route: no path is ever looked up on the disk. Does not
know the model: everything that the page shows, it asks for like any other client, with a key where
one is needed. The files themselves need none (docs/adr/0016).

The policy lets scripts and styles come from this server only, none from within the HTML, and, where
browsers know trusted types, no text at all become HTML: a model's words are anybody's words.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_FOLDER: Final = files("pace_nb.server") / "static"
_FILES: Final = {
    "/" if name == "index.html" else f"/static/{name}": name
    for name in sorted(one.name for one in _FOLDER.iterdir())
}
PAGE_PATHS: Final = frozenset(_FILES)
HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # the next version's page must not meet this one's scripts
}
_CONTENTS: Final = {path: (_FOLDER / name).read_bytes() for path, name in _FILES.items()}


async def page(request: Request) -> Response:
    """GET / and /static/...: one of the page's files."""
    path = request.scope["path"]
    kind = _KINDS[_FILES[path].rpartition(".")[2]]
    return Response(_CONTENTS[path], headers=HEADERS, media_type=kind)


PAGE_ROUTES: Final = [Route(path, page) for path in _FILES]
