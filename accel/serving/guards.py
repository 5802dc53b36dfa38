"""What stands before every request: the key, the size of the body, the count of answers; and errors as answers."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
from collections.abc import Mapping
from typing import Any

from ..errors import UserError, printable
from ..pipeline.arguments import short
from .limits import Busy, Cancelled, UnknownModel
from .metrics import Metrics

OPEN = ("/health", "/images/")  # no key: probes have none, and the names of images are secret
_LARGEST_HEADER = 4096
_LOG = logging.getLogger("accel.serving")


def refusal(status: int, message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form, which says its status too."""
    return {"status": status, "error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: BaseException) -> dict[str, Any]:
    """What a client is told of an error, in OpenAI's form."""
    if isinstance(error, UnknownModel):
        return refusal(404, str(error), "invalid_request_error", "model_not_found", "model")
    if isinstance(error, UserError):
        text = f"{error.message}; {error.fix}" if error.fix else error.message
        return refusal(400, printable(text), "invalid_request_error", None)
    if isinstance(error, Busy):
        return refusal(503, str(error), "server_error", "busy")
    if isinstance(error, Cancelled):
        return refusal(499, str(error), "invalid_request_error", "cancelled")
    if isinstance(error, TimeoutError):
        return refusal(504, "the image took longer than this server allows", "server_error", "timeout")
    # What it says may name files of this machine: it is in the server's log alone.
    return refusal(500, "the server failed at this request; its log says why", "server_error", None)


def form(path: str, found: dict[str, Any]) -> dict[str, Any]:
    """The body of an error, as the API has it that was asked."""
    error = found["error"]
    if path.startswith("/sdapi/"):
        return {"error": error["type"], "detail": error["message"], "body": "", "errors": error["message"]}
    return {"error": error}


def invalid(errors: list[Any]) -> dict[str, Any]:
    """pydantic's findings as an error in OpenAI's form: the first of them."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return refusal(400, f"the body is not JSON: {first['ctx']['error']}", "invalid_request_error", None)
    place = [str(part) for part in first["loc"] if part != "body"]
    name = place[0] if place else None
    what = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    given = "" if first["type"] in ("missing", "extra_forbidden") else f", not {short(first.get('input'))}"
    text = f"invalid {name}: {what}{given}" if name else f"invalid body: {what}"
    return refusal(400, printable(text), "invalid_request_error", None, name)


def may_enter(headers: Mapping[bytes, bytes], key: str | None) -> bool:
    """Whether a request has the key: as `Authorization: Bearer KEY`, or as the password of Basic, as A1111 asks it."""
    if not key:
        return True
    given = headers.get(b"authorization", b"")[:_LARGEST_HEADER]
    scheme, _, value = given.partition(b" ")
    if scheme.lower() == b"basic":
        try:
            value = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    return hmac.compare_digest(value.strip(), key.encode())


class TooLarge(Exception):
    """The body of a request exceeds the limit."""


class Guard:
    """ASGI middleware.

    Args:
        app: what stands behind it.
        key: that clients must have; None for none.
        body: bytes that a request may have.
        metrics: counts the answers.
    """

    def __init__(self, app: Any, key: str | None, body: int, metrics: Metrics):
        self.app, self.key, self.body, self.metrics = app, key, body, metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = dict(scope["headers"]), scope["path"]
        read, began = 0, False

        async def sent(message: dict[str, Any]) -> None:
            nonlocal began
            if read > self.body and not began:  # whoever read the body has made another answer of it
                raise TooLarge
            if message["type"] == "http.response.start":
                began = True
                route = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        if not path.startswith(OPEN) and not may_enter(headers, self.key):
            text = "the API key is wrong or missing; send Authorization: Bearer KEY"
            await _answer(sent, refusal(401, text, "invalid_request_error", "invalid_api_key"), path)
            return
        too_large = refusal(413, f"the body exceeds {self.body:,} bytes", "invalid_request_error", "body_too_large")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.body:
            await _answer(sent, too_large, path)
            return

        async def received() -> dict[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.body:
                raise TooLarge
            return message

        try:
            await self.app(scope, received, sent)
        except TooLarge:
            if not began:
                read = 0
                await _answer(sent, too_large, path)
        except Exception as error:  # answered here, because what starlette raises again ends the connection
            _LOG.error("a request failed", exc_info=error)
            if not began:
                await _answer(sent, error_of(error), path, last=False)


async def _answer(send: Any, found: dict[str, Any], path: str, *, last: bool = True) -> None:
    """Send an error; `last`: what is left of the body is not read, so the connection ends."""
    body = json.dumps(form(path, found)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] * last
    await send({"type": "http.response.start", "status": found["status"], "headers": headers})
    await send({"type": "http.response.body", "body": body})
