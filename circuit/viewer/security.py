"""Who may ask, and what a page may do: every request passes the `Guard` before any code of ours sees it.

A page on the web can send requests to this machine. So a request must name this server as its host (a name of the
page's own, pointed here, is refused), must carry the cookie that the printed address gives, and one that changes
something must come from a page of this server. What is answered may run no script but our own.
"""

import hmac
import ipaddress
import json
from collections.abc import Collection
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
MOST_BODY = 2**20
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PICTURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""A picture opened alone brings its own style, and nothing else."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """Lets through what is addressed to this server, by whoever opened the printed address."""

    def __init__(self, app: ASGIApp, token: str, host: str, names: Collection[str] = ()):
        self.app, self.token = app, token
        self.cookie = f"crosslace-{hashed(token)}"  # two viewers on one machine must not take each other's
        self.names = {bracketed(name).lower() for name in (*LOCAL_NAMES, host, *names)}
        # Where all addresses are listened on, any IP literal will do: a web page cannot make one point elsewhere.
        self.any_literal = is_literal(host) and ipaddress.ip_address(host).is_unspecified

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self.refusal_or_entry(scope)
        if answer is None and scope["method"] == "POST":
            body = await whole_body(receive)
            if body is None:
                answer = refusal(413, f"the request is larger than {MOST_BODY // 2**20} MiB")
            else:
                receive = again(body)
        await (answer or self.app)(scope, receive, guarded)

    def refusal_or_entry(self, scope: Scope) -> Response | None:
        """The answer to a request that may not pass, or that brings the token; None where it may pass."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.is_own(host):
            return refusal(421, "this server answers to its own address alone; view.names adds other names")
        if scope["path"] == "/" and "token" in (asked := parse_qs(scope["query_string"].decode("latin-1"))):
            return self.entry(asked["token"][-1])
        if not scope["path"].startswith("/static/") and not self.knows(headers):
            return refusal(401, "open the address that `crosslace view` printed, with its token")
        if scope["method"] not in ("GET", "HEAD"):
            if urlsplit(headers.get("origin", "")).netloc.lower() != host.lower():
                return refusal(403, "only this server's own pages may change something")
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return refusal(415, "a request that changes something must be JSON")
        return None

    def is_own(self, host: str) -> bool:
        head, colon, port = host.lower().rpartition(":")
        name = head if colon and port.isdigit() else host.lower()
        return name in self.names or (self.any_literal and is_literal(name.strip("[]")))

    def entry(self, token: str) -> Response:
        """The token is exchanged for a cookie, and leaves the address."""
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return refusal(401, "this is not the token that `crosslace view` printed")
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
        return answer

    def knows(self, headers: Headers) -> bool:
        given = cookie_parser(headers.get("cookie", "")).get(self.cookie, "")
        return hmac.compare_digest(given.encode(), self.token.encode())


def refusal(status: int, sentence: str) -> JSONResponse:
    """Every refusal is JSON with a sentence."""
    return JSONResponse({"error": sentence}, status_code=status)


def hashed(token: str) -> str:
    """A short name that tells nothing of the token."""
    return hmac.new(b"cookie", token.encode(), "sha256").hexdigest()[:12]


def is_literal(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def bracketed(name: str) -> str:
    """A host as it stands in an address: IPv6 in brackets."""
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


async def whole_body(receive: Receive) -> bytes | None:
    """The body, or None where it is larger than is read."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MOST_BODY:
            return None
    return body


def again(body: bytes) -> Receive:
    """A receiver that hands the body over once more."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def json_object(body: bytes) -> dict | None:
    """The object that a body holds, or None where it holds no such thing."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
