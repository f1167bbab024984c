"""Puts the explorer behind its addresses.

    GET  /                  the page
    GET  /static/NAME       its style sheets and scripts
    GET  /api/model         facts about the model, and the limits of requests
    POST /api/read          {prompt}
    POST /api/neuron        {prompt, layer, neuron}
    POST /api/steer         {prompt, layer, neuron, op, value, new_tokens, temperature, seed}

Answers of /api are JSON. An error is {"error": a sentence} with a status of 400 or more.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from topk_megatron.errors import UserError
from topk_megatron.web.explorer.engine import Engine
from topk_megatron.web.explorer.parsing import (
    MAX_BODY,
    RequestError,
    integer,
    parse_object,
    prompt_of,
    steer_request,
)
from topk_megatron.web.explorer.security import LOCAL_NAMES, Guard
from topk_megatron.web.shared.assets import EXPLORER, linked, served

_TYPES = {"css": "text/css", "js": "text/javascript"}
_log = logging.getLogger(__name__)


def make_app(engine: Engine, names: Iterable[str] = LOCAL_NAMES) -> Starlette:
    """Returns the application.

    Args:
        engine: the model.
        names: host names under which it may be asked.
    """
    # Read once: nothing else is ever served from disk.
    html, assets = linked(EXPLORER, "/static"), served(EXPLORER)
    neurons = engine.folder.hidden_size

    def read(content: dict[str, Any]) -> dict[str, Any]:
        return engine.read(prompt_of(content))

    def neuron(content: dict[str, Any]) -> dict[str, Any]:
        layer = integer(content, "layer", 0, engine.folder.num_layers - 1)
        return engine.neuron(prompt_of(content), layer, integer(content, "neuron", 0, neurons - 1))

    def steer(content: dict[str, Any]) -> dict[str, Any]:
        return engine.steer(steer_request(content, engine.folder.num_layers, neurons))

    async def page(request: Request) -> Response:
        return Response(html, media_type="text/html")

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in assets:
            return JSONResponse({"error": "there is no such file"}, 404)
        return Response(assets[name], media_type=_TYPES[name.rsplit(".", 1)[1]])

    async def model(request: Request) -> Response:
        return JSONResponse(engine.describe())

    return Starlette(
        routes=[
            Route("/", page),
            Route("/static/{name}", static),
            Route("/api/model", model),
            Route("/api/read", _answer(read), methods=["POST"]),
            Route("/api/neuron", _answer(neuron), methods=["POST"]),
            Route("/api/steer", _answer(steer), methods=["POST"]),
        ],
        middleware=[Middleware(Guard, names=tuple(names))],
    )


def _answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Returns an endpoint that does the work in a thread and answers errors as sentences."""

    async def endpoint(request: Request) -> Response:
        try:
            content = parse_object(await _body(request))
            return JSONResponse(await run_in_threadpool(work, content))
        except RequestError as error:
            return JSONResponse({"error": str(error)}, error.status)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        except Exception:
            _log.exception("a request failed")
            return JSONResponse(
                {"error": "the model failed on this request; see the server's output"}, 500
            )

    return endpoint


async def _body(request: Request) -> bytes:
    """Returns the request's body; refuses it as soon as it is too long."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > MAX_BODY:
            raise RequestError(f"the request is longer than {MAX_BODY:,} bytes", 413)
    return bytes(found)
