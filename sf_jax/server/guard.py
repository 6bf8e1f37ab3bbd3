"""Access control: checks token, origin, host, rates and sizes before a request reaches the app."""

import asyncio
import dataclasses
import hmac
import ipaddress
import json
import time
import urllib.parse
from collections import OrderedDict

from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sf_jax.server import protocol

COOKIE = "sf_jax_token"
OPEN = ("/healthz", "/readyz")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
COUNTED = ("/v1/realtime/video", "/v1/videos")
ADDRESSES = 4096  # maximum number of addresses whose rates are remembered
MAX_BODY = protocol.MAX_MESSAGE
BODY_SECONDS = 10
HEADERS = {
    "content-security-policy": "default-src 'self'; media-src blob:; img-src 'self' blob: data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """The access rules.

    Attributes:
      token: required for every request, except those in `OPEN`; None requires none.
      origins: origins of other pages that may use the server, such as "https://example.org"; "*" allows all.
      hosts: names under which browsers may reach it; None allows any.
      burst, rate: sessions and videos per address, at once and per second.
      connections: maximum number of simultaneous requests and WebSockets.
    """

    token: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    burst: float = 60
    rate: float = 1
    connections: int = 256


class Guard:
    """ASGI middleware that rejects what the rules do not allow, and adds security headers to responses."""

    def __init__(self, app: ASGIApp, rules: Rules, refused):
        """Wraps an app; `refused` counts rejections by code."""
        self.app, self.rules, self.refused = app, rules, refused
        self._rates: OrderedDict[str, protocol.RateLimit] = OrderedDict()
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request or WebSocket."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        refusal = self._refusal(scope)
        if refusal is not None:
            self.refused.labels(refusal[1]).inc()
            return await _refuse(scope, receive, send, *refusal)
        if scope["type"] == "http" and (place := self._login(scope)) is not None:
            return await _respond(send, 303, b"", [("location", place[0]), ("set-cookie", place[1])])
        self._open += 1
        try:
            if scope["type"] == "http":
                receive = await _buffered(receive)
            await self.app(scope, receive, _with_headers(scope, send))
        except TooLarge:
            self.refused.labels("too_large").inc()
            await _refuse(scope, receive, send, 413, "too_large", f"the body is larger than {MAX_BODY} bytes", {})
        except TimeoutError:
            await _refuse(scope, receive, send, 408, "timeout", f"no body within {BODY_SECONDS} s", {})
        finally:
            self._open -= 1

    def _refusal(self, scope: Scope) -> tuple[int, str, str, dict] | None:
        """Status, code, message and headers of a rejection; None if the request is allowed."""
        rules, headers = self.rules, _headers(scope)
        host = headers.get("host", "")
        if rules.hosts is not None and _name(host) not in rules.hosts:
            return 421, "wrong_host", "this server does not answer to that name", {}
        origin = headers.get("origin")
        own = origin is None or _netloc(origin) == host
        if not own and "*" not in rules.origins and origin not in rules.origins:
            return 403, "wrong_origin", "pages of that origin may not use this server", {}
        if rules.token is not None and scope["path"] not in OPEN and not self._known(scope, headers):
            text = "a token is needed: open /?token=TOKEN in a browser, or send Authorization: Bearer TOKEN"
            return 401, "unauthorized", text, {"www-authenticate": "Bearer"}
        if self._open >= rules.connections:
            return 503, "busy", f"{rules.connections} connections are open: try again later", {"retry-after": "5"}
        if scope["path"] in COUNTED and not self._rate(scope).allows(time.monotonic()):
            wait = max(1, round(1 / rules.rate))
            return 429, "too_many_requests", f"too many sessions: try in {wait} s", {"retry-after": str(wait)}
        return None

    def _known(self, scope: Scope, headers: dict[str, str]) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        tokens = [token.strip()] if scheme.lower() == "bearer" else []
        cookie = _cookie(headers.get("cookie", ""))
        tokens += [cookie] if cookie is not None else []
        if scope["type"] == "http" and scope["path"] == "/":
            tokens += urllib.parse.parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        return any([_same(token, self.rules.token) for token in tokens])

    def _login(self, scope: Scope) -> tuple[str, str] | None:
        """If the page's address contains the token: the address without it for a redirect, and a cookie with it."""
        if self.rules.token is None or scope["path"] != "/" or b"token=" not in scope["query_string"]:
            return None
        secure = "; Secure" if scope["scheme"] == "https" else ""
        return "./", f"{COOKIE}={urllib.parse.quote(self.rules.token, safe='')}; HttpOnly; SameSite=Lax; Path=/{secure}"

    def _rate(self, scope: Scope) -> protocol.RateLimit:
        address = _network((scope.get("client") or ("", 0))[0])
        rate = self._rates.pop(address, None) or protocol.RateLimit(self.rules.burst, self.rules.rate)
        self._rates[address] = rate
        if len(self._rates) > ADDRESSES:
            self._rates.popitem(last=False)
        return rate


class TooLarge(Exception):
    """A body beyond `MAX_BODY`."""


async def _buffered(receive: Receive) -> Receive:
    """Reads a whole body, and returns a `receive` that replays it.

    Raises:
      TooLarge: if it is larger than `MAX_BODY`.
      TimeoutError: if it does not arrive within `BODY_SECONDS`.
    """
    parts, more = [], True
    async with asyncio.timeout(BODY_SECONDS):
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
            if sum(map(len, parts)) > MAX_BODY:
                raise TooLarge
    body = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

    async def again() -> Message:
        return body.pop() if body else await receive()

    return again


def host_names(names: list[str], host: str) -> tuple[str, ...]:
    """Names under which browsers may reach the server, as in a Host header but without port.

    Args:
      names: names under which a proxy makes the server known; a port is ignored.
      host: address on which the server listens.

    Raises:
      ValueError: if one is no name.
    """
    return (*map(_host_name, [*names, host]), *LOOPBACK)


def _host_name(text: str) -> str:
    name = text.strip().lower()
    if name.startswith("["):
        name = name.partition("]")[0] + "]"
    elif name.count(":") > 1:
        name = f"[{name}]"
    else:
        name = name.partition(":")[0]
    if not name or "/" in text:
        raise ValueError(f"hosts: {text!r} is no name of a server; give names such as video.example.org")
    return name


def origin_of(text: str) -> str:
    """An origin as browsers send it: a scheme and a host, with its port unless that is the scheme's own.

    Raises:
      ValueError: if it is something else.
    """
    if text == "*":
        return text
    parts = urllib.parse.urlsplit(text.strip().lower())
    port = {"https": ":443", "http": ":80"}.get(parts.scheme)
    if port is None or not parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"origins: {text!r} is no origin; give a scheme and a host, such as https://a.org")
    return f"{parts.scheme}://{parts.netloc.removesuffix(port)}"


def _netloc(origin: str) -> str | None:
    """Host and port of an origin; None if it has none."""
    try:
        return urllib.parse.urlsplit(origin).netloc or None
    except ValueError:
        return None


def _with_headers(scope: Scope, send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message.get("headers", [])}
            extra = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in there]
            message = message | {"headers": [*message.get("headers", []), *extra]}
        await send(message)

    return send if scope["type"] != "http" else with_headers


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0].lower()


def _network(address: str) -> str:
    """An address; for IPv6, its /64 network, which a single client can have for itself."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return str(ipaddress.ip_network((ip, 64), strict=False)) if ip.version == 6 else str(ip)


def _cookie(header: str) -> str | None:
    value = cookie_parser(header).get(COOKIE)
    return None if value is None else urllib.parse.unquote(value)


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode("utf-8", "surrogateescape"))


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, code: str, text: str, headers: dict) -> None:
    if scope["type"] == "websocket":
        await receive()
        later = "retry-after" in headers
        if later:  # browsers see the close codes of accepted connections only
            message = {"type": "error", "code": code, "message": text, "retry_after": int(headers["retry-after"])}
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.send", "text": json.dumps(message)})
        await send({"type": "websocket.close", "code": protocol.LATER if later else protocol.POLICY})
        return
    body = json.dumps({"error": {"code": code, "message": text}}).encode()
    await _respond(send, status, body, [("content-type", "application/json"), *headers.items()])


async def _respond(send: Send, status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
    headers = [*headers, ("content-length", str(len(body))), *HEADERS.items()]
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
