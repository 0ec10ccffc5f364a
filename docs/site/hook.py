"""What the documentation site needs beyond docs/: a hook of MkDocs.

- "notebooks/*", "how-to/*", "adr/*", "api/kernels/*" in the nav become one entry per file, in
  order, so that nothing that lands is left out.
- README.md is the home page, notebooks become pages (with the texts that describe their pictures),
  and every file of the repository that a page links to becomes a page: a listing of its source.
- Links that lead to files of the repository are made to lead to these pages.

Repository path -> path in the site:
    README.md            index.md
    docs/x.md            x.md
    notebooks/x.ipynb    notebooks/x.md
    y/README.md          repo/y/README.md, also for a link to the folder y
    y/z.py               source/y/z.py.md

Knows the repository's layout. MkDocs is imported where it is needed only, so that tests can look at
the nav without it.
"""

from __future__ import annotations

import ast
import base64
import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^)\s]+)\)")
FENCE = re.compile(r"^(`{3,}|~{3,})", re.MULTILINE)
LANGUAGES = {
    ".py": "python", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml", ".json": "json",
    ".js": "javascript", ".css": "css", ".html": "html", ".sh": "bash",
}  # fmt: skip
LARGEST = 200_000  # bytes of a listing


# ---- the nav -------------------------------------------------------------------------------------
def listed(pattern: str) -> list[str]:
    """The pages that an entry of the nav that ends in * stands for."""
    folder = pattern.removesuffix("*")
    if folder == "notebooks/":
        return [site_path(p) for p in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
    if folder == "api/kernels/":
        files = sorted((ROOT / "pace_nb" / "kernels").glob("*.py"))
        return [f"{folder}{p.stem}.md" for p in files if p.stem != "__init__"]
    pages = sorted((ROOT / "docs" / folder).glob("*.md"))
    return [f"{folder}{p.name}" for p in pages if p.name not in ("README.md", "index.md")]


def expanded(nav: list[Any]) -> list[Any]:
    """The nav with a * replaced by what it stands for."""
    result: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            result.append({k: expanded(v) if isinstance(v, list) else v for k, v in entry.items()})
        elif entry.endswith("*"):
            result.extend(listed(entry))
        else:
            result.append(entry)
    return result


# ---- where a file of the repository is in the site -----------------------------------------------
def site_path(path: Path) -> str:
    """See the module docstring; a folder is its README, or a list of what is in it."""
    relative = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        if relative == "notebooks":
            return "notebooks/index.md"
        return site_path(path / "README.md") if (path / "README.md").is_file() else (
            f"source/{relative}/index.md"
        )  # fmt: skip
    if relative == "README.md":
        return "index.md"
    if relative.startswith("docs/") and path.suffix == ".md":
        return relative.removeprefix("docs/")
    if path.suffix == ".md":
        return f"repo/{relative}"
    if path.suffix == ".ipynb":
        return f"{relative.removesuffix('.ipynb')}.md"
    return f"source/{relative}.md"


def outside_code(text: str, change: Any) -> str:
    """`change` of the parts of a Markdown text that are not fenced code."""
    lines, part, fence = [], [], ""

    def flush() -> None:
        if part:
            lines.append(change("\n".join(part)))
            part.clear()

    for line in text.split("\n"):
        found = FENCE.match(line.lstrip())
        if fence:
            lines.append(line)
            if found and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif found:
            flush()
            lines.append(line)
            fence = found[1]
        else:
            part.append(line)
    flush()
    return "\n".join(lines)


def targets(text: str, origin: Path) -> list[Path]:
    """Files and folders of the repository that a Markdown text, which stands at `origin`, names."""
    found = []

    def look(part: str) -> str:
        for match in LINK.finditer(part):
            if path := local(match[2], origin):
                found.append(path)
        return part

    outside_code(text, look)
    return found


def local(target: str, origin: Path) -> Path | None:
    """The file that a link leads to, if it is one of the repository."""
    name = target.partition("#")[0]
    if not name or re.match(r"[a-z]+:", target):
        return None
    path = (origin.parent / name).resolve()
    return path if path.exists() and path.is_relative_to(ROOT) else None


def relinked(text: str, origin: Path) -> str:
    """The text with its links leading to pages of the site."""
    here = posixpath.dirname(site_path(origin))

    def link(match: re.Match[str]) -> str:
        path = local(match[2], origin)
        if path is None:
            return match[0]
        to = posixpath.relpath(site_path(path), here or ".")
        anchor = match[2].partition("#")[2]
        return f"{match[1]}({to}{'#' + anchor if anchor else ''})"

    return outside_code(text, lambda part: LINK.sub(link, part))


# ---- pages that are made -------------------------------------------------------------------------
def listing(path: Path) -> str:
    """A page that shows a source file, or what is in a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        entries = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if p.name[0] != ".")
        return f"# {name}/\n\n" + "\n".join(f"- `{entry}`" for entry in entries) + "\n"
    try:
        text = path.read_text() if path.stat().st_size <= LARGEST else "(too long to be shown)"
    except UnicodeDecodeError:
        text = "(not a text)"
    return f"# {name}\n\n{fenced(text, LANGUAGES.get(path.suffix, 'text'))}\n"


def fenced(text: str, language: str, kind: str = "") -> str:
    """A block of code, inside more backticks than it holds."""
    ticks = "`" * max(3, 1 + max((len(t) for t in re.findall("`+", text)), default=0))
    attributes = f"{{ .{language} .{kind} }}" if kind else language
    return f"{ticks} {attributes}\n{text.rstrip()}\n{ticks}"


def spaced(text: str) -> str:
    """A list directly below a line of text is a list to Jupyter; Markdown here wants a space."""
    text = re.sub(
        r"^(?!\s*(?:[-*]|\d+\.) |\|)(\S.*)\n(?=(?:[-*]|1\.) )", r"\1\n\n", text, flags=re.M
    )
    text = re.sub(r"^(?!\|)(\S.*)\n(?=\|.*\|)", r"\1\n\n", text, flags=re.M)
    folded = r'<details markdown="1"><summary>\1</summary>\n'
    return re.sub(r"<details>\s*<summary>(.*?)</summary>", folded, text)


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """(a page, its pictures by name): cells and the outputs that are committed."""
    parts, pictures = [], {}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(outside_code(source, spaced))
            continue
        if source.strip():
            parts.append(fenced(source, "python"))
        for index, output in enumerate(cell.get("outputs", [])):
            data = output.get("data", {})
            if "text" in output:
                parts.append(fenced("".join(output["text"]), "text", "output"))
            elif "image/png" in data:
                name = f"{path.stem}-{number:02}-{index}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                about = output["metadata"].get("image/png", {})
                alt, width = html.escape(about.get("alt", "")), about.get("width", 860)
                parts.append(
                    f'<p class="picture"><img src="{name}" alt="{alt}" width="{width}"></p>'
                )
            elif "text/html" in data:
                parts.append(f'<div class="output">{"".join(data["text/html"])}</div>')
            elif "text/plain" in data:
                parts.append(fenced("".join(data["text/plain"]), "text", "output"))
    return "\n\n".join(parts) + "\n", pictures


def title(path: Path) -> str:
    """The first heading of a notebook."""
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    return first.splitlines()[0].lstrip("# ")


def notebook_index() -> str:
    """The list of all notebooks."""
    files = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    entries = "\n".join(f"- [{title(p)}]({p.stem}.md)" for p in files)
    return (
        "# Notebooks\n\nOne question each, from plain NumPy to the package's own kernel, measured "
        "at every rung. These pages show the outputs that are committed; to run them: "
        "`pip install -e '.[notebooks]'`, then `jupyter lab notebooks`.\n\n" + entries + "\n"
    )


def kernel_page(name: str) -> str:
    """The API of one kernel file, below links to the notebooks that its docstring names."""
    docstring = ast.get_docstring(ast.parse(_kernel(name).read_text())) or ""
    named = re.findall(r"^Notebook: (.*?)(?:Ledger:|$)", docstring, re.M)
    numbers = re.findall(r"\b\d\d\b", " ".join(named))
    files = [p for n in numbers for p in sorted((ROOT / "notebooks").glob(f"{n}_*.ipynb"))]
    links = ", ".join(f"[{title(p)}](../../notebooks/{p.stem}.md)" for p in files)
    explained = f"Explained in {links}.\n\n" if links else ""
    source = f"[`{_kernel(name).name}`](../../{site_path(_kernel(name))})"
    return (
        f"# {name}\n\n{explained}The whole file: {source}\n\n"
        f"::: pace_nb.kernels.{name}\n    options:\n      show_root_heading: false\n"
    )


def _kernel(name: str) -> Path:
    return ROOT / "pace_nb" / "kernels" / f"{name}.py"


# ---- MkDocs' events ------------------------------------------------------------------------------
_origin: dict[str, Path] = {}  # page -> the file it is made from: what its links are relative to


def on_config(config: Any) -> Any:
    """Fill the nav in."""
    config.nav = expanded(config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/, and those that they link to."""
    from mkdocs.structure.files import File

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))

    _origin.clear()
    for page in files.documentation_pages():
        _origin[page.src_uri] = Path(page.abs_src_path)
    add("notebooks/index.md", notebook_index())
    for uri in listed("api/kernels/*"):
        add(uri, kernel_page(Path(uri).stem))
    waiting = list(_origin.values())
    waiting += [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
    waiting += [ROOT / "pace_nb" / "kernels" / "README.md"]
    waiting += [_kernel(Path(uri).stem) for uri in listed("api/kernels/*")]
    waiting += sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    done = {ROOT / "notebooks"}
    while waiting:
        path = waiting.pop()
        if path.is_dir() and (path / "README.md").is_file():
            path = path / "README.md"
        if path in done:
            continue
        done.add(path)
        uri, text = site_path(path), ""
        if path.suffix == ".ipynb":
            text, pictures = notebook(path)
            for name, picture in pictures.items():
                add(f"notebooks/{name}", picture)
        elif path.suffix == ".md":
            text = path.read_text()
        waiting += targets(text, path)
        if uri in _origin:
            continue
        add(uri, text or listing(path))
        if text:
            _origin[uri] = path
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Make links lead to pages of the site."""
    origin = _origin.get(page.file.src_uri)
    return relinked(markdown, origin) if origin else markdown
