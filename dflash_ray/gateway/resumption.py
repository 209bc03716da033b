"""The tokens of one choice, whatever happens to routers meanwhile: a call that fails goes on elsewhere after them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable

import grpc

from dflash_ray.core.errors import (
    DeadlineExceededError,
    OtherModelError,
    OverloadedError,
    RequestError,
    UnavailableError,
    error_from_grpc,
)
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.routers import Routers
from dflash_ray.pb import router_pb2

logger = logging.getLogger(__name__)
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 2.0


class ResumedCall:
    """One choice's calls, one after the other.

    Args:
        deadline: in seconds of time.monotonic().
        wait_s: an answer that no router takes on for this long is given up.
        on_resume: called for each call after the first.
    """

    def __init__(
        self,
        routers: Routers,
        request: GenerationRequest,
        deadline: float,
        wait_s: float,
        on_resume: Callable[[], object] = lambda: None,
    ) -> None:
        self._routers = routers
        self._request = request
        self._deadline = deadline
        self._wait_s = wait_s
        self._on_resume = on_resume
        self._tokens: list[int] = []
        self._model_fingerprint = ""
        self._num_losses = 0
        self._is_taken = False
        self._full: set[str] = set()
        self._asked: str | None = None
        self._failing_since: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    async def chunks(self) -> AsyncGenerator[router_pb2.TokenChunk, None]:
        """Chunks up to the one with a finish reason. Raises RequestError."""
        while True:
            try:
                router = self._routers.pick(self._wanted_model, self._asked, () if self._is_taken else self._full)
                self._asked = router.id
                calls = self._routers.generate(router, self._message(), self._deadline)
                try:
                    async for chunk in calls:
                        self._take(chunk)
                        yield chunk
                        if chunk.finish_reason:
                            return
                finally:
                    await calls.aclose()
                failure: RequestError = UnavailableError("the router ended the stream early")
            except grpc.aio.AioRpcError as error:
                failure = _failure(error)
            except (UnavailableError, OtherModelError) as error:
                failure = error
            await self._recover(failure)

    @property
    def _wanted_model(self) -> str:
        """The model that wrote the tokens so far; empty while there are none."""
        return self._model_fingerprint if self._tokens else ""

    def _take(self, chunk: router_pb2.TokenChunk) -> None:
        if chunk.model_fingerprint:
            if self._wanted_model not in ("", chunk.model_fingerprint):
                raise OtherModelError("the router went on with another model")
            self._model_fingerprint = chunk.model_fingerprint
        self._is_taken = True
        self._num_losses = max(self._num_losses, chunk.num_losses)
        if chunk.token_ids:
            self._tokens.extend(chunk.token_ids)
            self._failing_since = None
            self._pause_s = _FIRST_PAUSE_S

    async def _recover(self, failure: RequestError) -> None:
        """Returns when it is time to try again; raises what the client is to see when it is not worth it."""
        if isinstance(failure, OverloadedError) and not self._is_taken and self._asked is not None:
            # Another router may have room; that all are full is told at once.
            self._full.add(self._asked)
            if self._routers.has_ready_beside(self._full):
                return
            raise failure
        if not isinstance(failure, UnavailableError | OtherModelError | OverloadedError):
            raise failure
        if self._asked is None:
            raise failure  # there was no router
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since >= self._wait_s:
            raise _last_word(failure)
        if now + self._pause_s >= self._deadline:
            raise DeadlineExceededError(f"the request's time is over ({failure.message})")
        self._on_resume()
        logger.warning("going on elsewhere after %d tokens: %s", len(self._tokens), failure.message)
        await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(_MAX_PAUSE_S, 2 * self._pause_s)

    def _message(self) -> router_pb2.GenerateTokensRequest:
        request = self._request
        return router_pb2.GenerateTokensRequest(
            request_id=request.request_id,
            token_ids=[*request.prompt_ids, *self._tokens],
            prompt_len=len(request.prompt_ids),
            sampling=request.sampling,
            stopping=request.stopping,
            speculation=request.speculation,
            model_fingerprint=self._wanted_model,
            num_losses=self._num_losses,
        )


def _failure(error: grpc.aio.AioRpcError) -> RequestError:
    # A router that is stopped ends its calls with either.
    name = "UNAVAILABLE" if error.code() is grpc.StatusCode.CANCELLED else error.code().name
    return error_from_grpc(name, error.details() or "")


def _last_word(failure: RequestError) -> RequestError:
    if isinstance(failure, OtherModelError):
        return UnavailableError("the model was replaced while it wrote this answer; send the request again")
    return failure
