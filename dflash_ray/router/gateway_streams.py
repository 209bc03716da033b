"""The calls of one gateway's stream: from an id that the gateway chose to a sequence of a pipeline and back."""

from __future__ import annotations

import asyncio
import itertools
import logging

from dflash_ray.core.errors import DeadlineExceededError, InvalidRequestError, RequestError
from dflash_ray.observability.logs import request_id_var
from dflash_ray.pb import router_pb2
from dflash_ray.router.actions import Emit
from dflash_ray.router.fleet import Fleet
from dflash_ray.router.outbox import Outbox
from dflash_ray.router.pipeline import Pipeline
from dflash_ray.router.sequence import RouterSequence

_numbers = itertools.count(1)
logger = logging.getLogger(__name__)


class _Call:
    """One request of a gateway; what becomes of it goes to the outbox under the call's id."""

    def __init__(self, stream: GatewayStream, call_id: int, timeout_s: float) -> None:
        self._stream = stream
        self._id = call_id
        self._pipeline: Pipeline | None = None
        self._sequence: RouterSequence | None = None
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire)
        self._opening: asyncio.Task[None] | None = None

    def open(self, request: router_pb2.GenerateTokensRequest, fleet: Fleet) -> None:
        self._opening = asyncio.create_task(self._open(request, fleet))

    async def _open(self, request: router_pb2.GenerateTokensRequest, fleet: Fleet) -> None:
        request_id_var.set(request.request_id)
        try:
            _check(request)
            pipeline = await fleet.pick(request.model_fingerprint)
            self._sequence = pipeline.start(request, self._stream, self._id)
            self._pipeline = pipeline
            self._stream.outbox.add_taken(self._id, pipeline.model_fingerprint)
        except RequestError as error:
            self.fail(error)
        except Exception:  # its neighbours are not concerned
            logger.exception("a call could not be opened")
            self.fail(RequestError("internal error; the router's log says more"))

    def fail(self, error: RequestError) -> None:
        """Ends the call with an error."""
        self._stream.outbox.add_error(self._id, error)
        self.end()

    def _expire(self) -> None:
        self.cancel()
        self.fail(DeadlineExceededError("the request's time is over"))

    def cancel(self) -> None:
        """Frees the sequence; nothing more is said of it."""
        if self._opening is not None:
            self._opening.cancel()
        if self._pipeline is not None and self._sequence is not None:
            self._pipeline.cancel(self._sequence)
        self.end()

    def end(self) -> None:
        """Nothing more is said of it."""
        self._timer.cancel()
        self._stream.forget(self._id)


class GatewayStream:
    """Calls of one gateway, all of which end with its stream.

    Attributes:
        number: its own, in this process.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.number = next(_numbers)
        self._fleet = fleet
        self._calls: dict[int, _Call] = {}
        self.outbox = Outbox()

    def take(self, message: router_pb2.RouterRequest) -> None:
        """Opens and cancels calls. Raises ValueError for a call id that is in use."""
        for opened in message.open:
            if opened.call_id in self._calls:
                raise ValueError(f"call_id {opened.call_id} is in use")
            call = self._calls[opened.call_id] = _Call(self, opened.call_id, opened.timeout_ms / 1000)
            call.open(opened.request, self._fleet)
        for call_id in message.cancel:
            if call_id in self._calls:
                self._calls[call_id].cancel()

    def emit(self, emit: Emit) -> None:
        """What a target pass committed for calls of this stream."""
        self.outbox.add(emit)
        for call_id in emit.ended():
            call = self._calls.get(call_id)
            if call is not None:
                call.end()

    def fail(self, call_id: int, error: RequestError) -> None:
        """A call ends with an error."""
        call = self._calls.get(call_id)
        if call is not None:
            call.fail(error)

    def forget(self, call_id: int) -> None:
        """The call has ended."""
        self._calls.pop(call_id, None)

    def close(self) -> None:
        """Ends all calls."""
        for call in list(self._calls.values()):
            call.cancel()


def _check(request: router_pb2.GenerateTokensRequest) -> None:
    if not 0 < request.prompt_len <= len(request.token_ids):
        raise InvalidRequestError("prompt_len must lie between 1 and the number of token_ids", "prompt_len")
    if not request.stopping.max_new_tokens:
        raise InvalidRequestError("max_new_tokens must be at least 1", "max_new_tokens")
