"""The studio's server: this machine alone, no file but the page's own, no request to anybody else."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import Any

from ..errors import MissingPackage, UserError

HOST = "127.0.0.1"
# What a page may load: itself. Fonts and scripts that Gradio would fetch from elsewhere are blocked by the browser.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'none'"
)


def bound(port: int, host: str = HOST) -> socket.socket:
    """A socket at an address; nothing is heard before somebody listens.

    Raises:
        UserError: where the port is taken, or the address is not of this machine.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        ours = not isinstance(error, socket.gaierror) and getattr(error, "errno", None) != errno.EADDRNOTAVAIL
        fix = "--port 0 takes any that is free" if ours else "--host 127.0.0.1, or 0.0.0.0 for all of this machine's"
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host} port {port}: {why}", fix) from None
    return bound


def serve(page: Any, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve a page until it is interrupted.

    Args:
        page: `gradio.Blocks`.
        ready: told the address when the page is about to be there.
    """
    app = application(page)
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
    listening.listen()
    ready(f"http://{HOST}:{listening.getsockname()[1]}")
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def application(page: Any) -> Any:
    """The page as an ASGI application, which answers this machine's names alone and forbids loading from elsewhere."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError:
        raise MissingPackage("gradio", "accel studio", "studio") from None

    from .layout import CSS

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def only_ours(request: Any, call: Any) -> Any:
        answer = await call(request)
        answer.headers["Content-Security-Policy"] = _POLICY
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=HOST,
        app_kwargs=dict(docs_url=None, redoc_url=None, openapi_url=None),
        footer_links=[],
        allowed_paths=[],
        max_file_size="64mb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        theme=gr.themes.Base(primary_hue="teal", neutral_hue="gray", **fonts),
        css=CSS,
    )
