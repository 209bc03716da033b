"""Cross-origin requests from browsers, as far as the configuration allows them."""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from dflash_ray.config import CorsConfig


class Cors:
    """Starlette's middleware, made at the first request: when Serve builds the app there is no configuration yet."""

    def __init__(self, app: ASGIApp, get_config: Callable[[], CorsConfig]) -> None:
        self._inner = app
        self._get_config = get_config
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        if self._app is None:
            config = self._get_config()
            self._app = self._inner
            if config.allow_origins:
                self._app = CORSMiddleware(
                    self._inner,
                    allow_origins=config.allow_origins,
                    allow_methods=("GET", "HEAD", "POST"),
                    allow_headers=config.allow_headers,
                    allow_credentials=config.allow_credentials,
                    expose_headers=("X-Request-Id", "Retry-After"),
                )
        await self._app(scope, receive, send)
