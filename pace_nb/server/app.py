"""`create_app`: the routes, each with what answers it.

Knows paths and the shapes that are neither chats nor completions. The guard stands before all of
them. There is no route that loads or changes a model, reads a file or names a path
(tests/server/test_app.py holds the list).
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pace_nb import __version__
from pace_nb.errors import ApiError, InvalidRequestError
from pace_nb.openai_api.request_body import check_model, read_chat
from pace_nb.openai_api.response_body import Json
from pace_nb.server.answers import error_response, json_response
from pace_nb.server.generation import (
    chat_completions,
    check_characters,
    completions,
    read_prompts,
)
from pace_nb.server.guard import Guard
from pace_nb.server.incoming import read_json_body
from pace_nb.server.page import PAGE_ROUTES
from pace_nb.server.service import Service

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def live(request: Request) -> Response:
    """GET /health/live: the process answers."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """GET /health and /health/ready: requests are taken. 503 with llama.cpp's words where not."""
    service: Service = request.app.state.service
    if service.ready:
        return json_response({"status": "ok"})
    response = json_response(
        {"error": {"code": 503, "message": service.status, "type": "unavailable_error"}}, 503
    )
    response.headers["retry-after"] = "1"
    return response


async def models(request: Request) -> Response:
    """GET /v1/models"""
    service: Service = request.app.state.service
    names = service.settings.served_model_names
    return json_response({"object": "list", "data": [_model(service, name) for name in names]})


async def model(request: Request) -> Response:
    """GET /v1/models/{name}"""
    service: Service = request.app.state.service
    name = request.path_params["name"]
    if not name:
        raise HTTPException(404)
    check_model(name, service.settings.served_model_names)
    return json_response(_model(service, name))


def _model(service: Service, name: str) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "pace-nb",
        "root": service.settings.model,
        "parent": None,
        "max_model_len": service.max_model_len,
        "permission": [],
    }


async def tokenize(request: Request) -> Response:
    """POST /tokenize: of a prompt, or of messages as the chat template writes them."""
    service: Service = request.app.state.service
    body = await read_json_body(request, service.settings.limits)
    check_model(body.get("model"), service.settings.served_model_names)
    if body.get("messages") is not None:
        (prompt,) = await read_prompts(service, read_chat(body))
        ids = prompt.token_ids
    else:
        text, special = body.get("prompt"), body.get("add_special_tokens")
        special = True if special is None else special
        if not isinstance(text, str):
            raise ApiError("prompt is wrong, expected text", param="prompt")
        if not isinstance(special, bool):
            raise ApiError(
                "add_special_tokens is wrong, expected true or false", param="add_special_tokens"
            )
        check_characters(service, len(text), "prompt")
        try:
            ids = await service.in_reader(service.tokenizer.encode, text, special)
        except InvalidRequestError as error:
            raise ApiError(str(error), param="prompt") from None
    names = [service.tokenizer.token_text(one) for one in ids]
    return json_response(
        {
            "count": len(ids),
            "max_model_len": service.max_model_len,
            "tokens": ids,
            "token_strs": names if body.get("return_token_strs") is True else None,
        }
    )


async def detokenize(request: Request) -> Response:
    """POST /detokenize"""
    service: Service = request.app.state.service
    body = await read_json_body(request, service.settings.limits)
    check_model(body.get("model"), service.settings.served_model_names)
    ids = body.get("tokens")
    most = service.tokenizer.vocab_size
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < most for i in ids):
        raise ApiError(
            f"tokens is wrong, expected a list of integers from 0 to {most - 1}", param="tokens"
        )
    text = await service.in_reader(service.tokenizer.decode, ids, False)
    return json_response({"prompt": text})


async def tokenizer_info(request: Request) -> Response:
    """GET /tokenizer_info: what lm-eval asks before it tokenizes by way of us."""
    service: Service = request.app.state.service
    special = service.tokenizer.special_tokens
    templates = service.tokenizer.chat_template.templates
    return json_response(
        {
            **{name: special.get(name) for name in ("bos_token", "eos_token", "pad_token")},
            "chat_template": templates.get("default"),
            "max_model_len": service.max_model_len,
            "vocab_size": service.tokenizer.vocab_size,
        }
    )


async def metrics(request: Request) -> Response:
    """GET /metrics: for Prometheus."""
    service: Service = request.app.state.service
    response = Response(service.metrics.text())
    response.headers["content-type"] = METRICS_TYPE
    return response


async def version(request: Request) -> Response:
    """GET /version"""
    return json_response({"version": __version__})


async def load(request: Request) -> Response:
    """GET /load: generations under way."""
    service: Service = request.app.state.service
    return json_response({"server_load": service.num_requests})


ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/tokenizer_info", tokenizer_info),
    Route("/health", ready),
    Route("/health/ready", ready),
    Route("/health/live", live),
    Route("/ping", ready, methods=["GET", "POST"]),
    Route("/metrics", metrics),
    Route("/version", version),
    Route("/load", load),
]
_HANDLERS = {
    path for path in (route.path for route in [*ROUTES, *PAGE_ROUTES]) if "{" not in path
}  # labels of a metric


def create_app(service: Service) -> ASGIApp:
    """The ASGI app of one service, guarded."""
    inner = Starlette(routes=[*ROUTES, *PAGE_ROUTES] if service.settings.web_page else ROUTES)
    inner.router.redirect_slashes = False
    # Starlette's own stack also catches what these do not, and answers in plain text: the guard's.
    inner.middleware_stack = ExceptionMiddleware(
        inner.router, {HTTPException: _http_error, InvalidRequestError: _invalid}
    )
    inner.state.service = service

    def observe(method: str, path: str, status: int) -> None:
        known = method if method in {"GET", "POST", "HEAD", "OPTIONS"} else "other"
        service.metrics.http(known, path if path in _HANDLERS else "other", status)

    guarded: ASGIApp = Guard(inner, service.settings, observe, service.turns)
    if service.settings.allowed_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=service.settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return guarded


async def _invalid(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What routing itself refuses: a path or method that is not there."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = {404: "there is no such path", 405: "this path does not know that method"}
    response = error_response(ApiError(text.get(status, "the request failed"), status=status))
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response
