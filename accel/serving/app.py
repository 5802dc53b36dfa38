"""The server: workers behind OpenAI's and A1111's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from .._version import __version__
from ..errors import UserError
from . import a1111_api, openai_api
from .guards import Guard, error_of, form, invalid, refusal
from .limits import Busy, Cancelled, Limits, UnknownModel
from .metrics import Metrics
from .models import Maker, Models
from .pictures import Shelf


def create(
    workers: Sequence[Maker],
    metrics: Metrics,
    *,
    limits: Limits = Limits(),  # noqa: B008
    key: str | None = None,
    hosts: Sequence[str] = (),
    drain: float = 30.0,
) -> FastAPI:
    """The application; its end closes the workers.

    Args:
        workers: the models, of which the first is meant where a request names none.
        metrics: what the workers tell.
        key: that clients must send; None for none.
        hosts: names by which clients may address it; empty for any. A page in a browser could otherwise reach a server
            on this machine by a name of its own.
        drain: seconds that what was ordered may take at the end.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(worker.close, drain) for worker in workers))

    app = FastAPI(title="accel", version=__version__, lifespan=life)
    app.state.models, app.state.shelf, app.state.checkpoint = Models(workers), Shelf(), None
    app.include_router(openai_api.router)
    app.include_router(a1111_api.router)

    @app.get("/health")
    async def health() -> Any:
        """Whether it can make images."""
        found = {worker.name: await worker.health() for worker in workers}
        well = all(well for well, _ in found.values())
        more = {name: about for name, (_, about) in found.items() if about}
        body = {"status": "ok" if well else "failed", "models": list(found)} | ({"replicas": more} if more else {})
        return JSONResponse(body, 200 if well else 503)

    @app.get("/metrics")
    async def numbers() -> Any:
        """What it counts, for Prometheus."""
        families = [one for worker in workers for one in await worker.families()]
        return Response(metrics.text(families), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/images/{name}", name="fetch")
    async def fetch(name: str) -> Any:
        """An image that was asked for by its address."""
        kept = app.state.shelf.get(name)
        if kept is None:
            raise HTTPException(404, "there is no such image, or no longer")
        return Response(kept[1], media_type=kept[0], headers={"cache-control": "private, max-age=3600"})

    _answer_errors(app)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(Guard, key=key, body=limits.body, metrics=metrics)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Errors in the form of the API that was asked."""

    def answer(request: Request, found: dict[str, Any]) -> JSONResponse:
        headers = {"retry-after": "1"} if found["status"] == 503 else None
        return JSONResponse(form(request.url.path, found), found["status"], headers)

    async def known(request: Request, error: Exception) -> JSONResponse:
        return answer(request, error_of(error))

    async def malformed(request: Request, error: Any) -> JSONResponse:
        return answer(request, invalid(error.errors()))

    async def http(request: Request, error: Any) -> JSONResponse:
        text = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not allowed here"}
        message = error.detail if error.detail not in ("Not Found", "Method Not Allowed") else text[error.status_code]
        return answer(request, refusal(error.status_code, str(message), "invalid_request_error", None))

    for kind in (UserError, UnknownModel, Busy, Cancelled, TimeoutError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(ValidationError, malformed)
    app.add_exception_handler(HTTPException, http)
