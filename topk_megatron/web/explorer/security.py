"""Answers only this server's own pages, and only under host names that are known to be its own.

A page of another site can make a browser send requests here. It cannot read the answers unless its
name is made to resolve to this machine (DNS rebinding). The Host header then carries that name, and
the request is refused. Requests that make the model work must be JSON and of the same origin.
"""

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def host_name(host: str) -> str | None:
    """Returns the name in a Host header without its port; None if the header is not a host."""
    try:
        split = urlsplit(f"//{host}")
        _ = split.port
    except ValueError:
        return None
    return None if split.path or split.username else split.hostname


class Guard:
    """Refuses foreign hosts and origins, and adds protective headers to every answer.

    Args:
        app: the application to guard.
        names: host names under which it may be asked.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self.app = app
        self.names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes one request on, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send_guarded)
            return
        status, reason = refusal
        await JSONResponse({"error": reason}, status)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        host = hosts[0] if len(hosts) == 1 else ""
        if host_name(host) not in self.names:
            return 421, "this server does not answer to that host name; allow it with --allow-host"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "requests from pages of other sites are refused"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return 403, "requests from pages of other sites are refused"
        content_type = headers.get("content-type", "").split(";")[0].strip()
        if scope["method"] == "POST" and content_type != "application/json":
            return 415, "requests must be application/json"
        return None
