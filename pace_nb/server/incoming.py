"""Bodies as they come in: read up to a size and a time, then as JSON.

Knows bytes on the way in. What they must hold is in `pace_nb/openai_api/request_body.py`. Nothing
beyond the limits is ever kept, with or without a Content-Length.
"""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from pace_nb.errors import ApiError
from pace_nb.openai_api.request_body import read_json
from pace_nb.openai_api.response_body import Json
from pace_nb.server.limits import Limits


async def read_json_body(request: Request, limits: Limits) -> Json:
    """The body as an object. ApiError: too large 413, too slow 408, gone 499, no JSON 400."""
    declared = request.headers.get("content-length", "0")
    if not declared.isascii() or not declared.isdigit() or len(declared) > 18:
        raise ApiError("Content-Length is no number", status=400)
    if int(declared) > limits.max_body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.max_body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise ApiError(
            f"the body took more than {limits.body_timeout:g} s to come", status=408
        ) from None
    except ClientDisconnect:
        raise ApiError("the client closed the connection", status=499) from None
    return read_json(bytes(body))


def _too_large(limits: Limits) -> ApiError:
    return ApiError(f"the body has more than {limits.max_body_bytes} bytes", status=413)
