"""The tokens of one choice, whatever happens to routers meanwhile: a call that fails goes on elsewhere after them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Generic

from dflash_ray.core.back_off import BackOff
from dflash_ray.core.errors import (
    DeadlineExceededError,
    HandedOverError,
    OtherModelError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from dflash_ray.gateway.calls import Call, Made
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.routers import Routers
from dflash_ray.gateway.token_chunks import TokenChunk
from dflash_ray.pb import router_pb2

logger = logging.getLogger(__name__)
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 2.0


class ResumedCall(Generic[Made]):
    """One choice's calls, one after the other.

    Args:
        make: what is wanted of each chunk, whichever router it comes from; called on the text thread.
        tell: gets what was made, chunk after chunk up to the one with a finish reason, or the error in its place.
        deadline: in seconds of time.monotonic().
        wait_s: an answer that no router takes on for this long is given up.
        on_resume: called for each call after the first.
    """

    def __init__(
        self,
        routers: Routers,
        request: GenerationRequest,
        make: Callable[[TokenChunk], Made],
        tell: Callable[[Made | Exception], object],
        deadline: float,
        wait_s: float,
        on_resume: Callable[[], object] = lambda: None,
    ) -> None:
        self.make = make
        self._routers = routers
        self._request = request
        self._tell = tell
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
        self._back_off = BackOff(_FIRST_PAUSE_S, _MAX_PAUSE_S)
        self._call: Call[Made] | None = None
        self._going_on: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Opens the first call."""
        failure = self._open()
        if failure is not None:
            self.on_failure(failure)

    def close(self) -> None:
        """Ends the call that is open; nothing more is told."""
        if self._going_on is not None:
            self._going_on.cancel()
        if self._call is not None:
            self._call.close()

    def _open(self) -> RequestError | None:
        """Opens a call, or says why there is none."""
        try:
            router = self._routers.pick(self._wanted_model, self._asked, () if self._is_taken else self._full)
            self._asked = router.id
            self._call = self._routers.open(router, self._message(), self._deadline, self)
        except RequestError as error:
            return error
        return None

    @property
    def _wanted_model(self) -> str:
        """The model that wrote the tokens so far; empty while there are none."""
        return self._model_fingerprint if self._tokens else ""

    def on_chunk(self, chunk: TokenChunk, made: Made) -> None:
        """Takes note of the tokens with which another call would go on."""
        self._is_taken = True
        if chunk.model_fingerprint:
            self._model_fingerprint = chunk.model_fingerprint
        if chunk.token_ids:
            self._tokens += chunk.token_ids
            self._failing_since = None
            self._back_off.reset()
        self._tell(made)

    def on_failure(self, error: Exception) -> None:
        """Goes on elsewhere, where that may help."""
        self._going_on = asyncio.create_task(self._go_on(error))

    async def _go_on(self, failure: Exception | None) -> None:
        try:
            while failure is not None:
                await self._recover(failure)
                failure = self._open()
        except Exception as error:
            self._tell(error)

    async def _recover(self, failure: Exception) -> None:
        """Returns when it is time to try again; raises what the client is to see when it is not worth it."""
        if isinstance(failure, HandedOverError):
            self._num_losses = max(self._num_losses, failure.num_losses)
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
        pause_s = self._back_off.next()
        if now + pause_s >= self._deadline:
            raise DeadlineExceededError(f"the request's time is over ({failure.message})")
        self._on_resume()
        logger.warning("going on elsewhere after %d tokens: %s", len(self._tokens), failure.message)
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

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
            cache_salt=request.cache_salt,
        )


def _last_word(failure: RequestError) -> RequestError:
    if isinstance(failure, OtherModelError):
        return UnavailableError("the model was replaced while it wrote this answer; send the request again")
    return failure
