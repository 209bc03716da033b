"""What one gateway is to be told next about its calls: columns that grow until they are sent.

An entry is appended when its tokens are there, so that a message is ready as soon as the gateway takes one. A gateway
that takes them slowly finds more entries in each message. What waits for it is bounded by what its calls may still get:
max_new_tokens token ids a call, with their log-probabilities where they were asked for.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque

import numpy as np

from dflash_ray.core.errors import HandedOverError, RequestError
from dflash_ray.pb import router_pb2
from dflash_ray.router.actions import Emit

# A message ends with the entry that makes it this large: 1 MiB of token ids, some 4 MiB of log-probabilities.
_MAX_VALUES = 1 << 18


class _Columns:
    """Entries of one message."""

    def __init__(self) -> None:
        self.call_ids: list[int] = []
        self.num_tokens: list[int] = []
        self.token_ids = array("I")
        self.finish_reasons: list[int] = []
        self.is_decode_pass: list[bool] = []
        self.num_drafts: list[int] = []
        self.num_accepted_drafts: list[int] = []
        self.num_spec_tokens: list[int] = []
        self.extras: list[router_pb2.EntryExtras] = []
        self.num_extra_values = 0

    @property
    def is_full(self) -> bool:
        return len(self.call_ids) + len(self.token_ids) + self.num_extra_values >= _MAX_VALUES

    def add_extras(self, extras: router_pb2.EntryExtras, place: int) -> None:
        """Of an entry among those that follow."""
        extras.entry = len(self.call_ids) + place
        self.extras.append(extras)
        for logprobs in (extras.logprobs, extras.prompt_logprobs.logprobs):
            self.num_extra_values += len(logprobs.chosen) * (1 + 2 * logprobs.num_top)

    def message(self) -> router_pb2.RouterResponse:
        return router_pb2.RouterResponse(
            progress=router_pb2.Progress(
                call_ids=self.call_ids,
                num_tokens=self.num_tokens,
                token_ids=self.token_ids.tobytes(),
                finish_reasons=self.finish_reasons,  # type: ignore[arg-type]
                is_decode_pass=self.is_decode_pass,
                num_drafts=self.num_drafts,
                num_accepted_drafts=self.num_accepted_drafts,
                num_spec_tokens=self.num_spec_tokens,
                extras=self.extras,
            )
        )


class Outbox:
    """Entries for one gateway, in the order that they came."""

    def __init__(self) -> None:
        self._columns: deque[_Columns] = deque([_Columns()])
        self._has_news = asyncio.Event()
        self._is_closed = False

    def add_taken(self, call_id: int, model_fingerprint: str) -> None:
        """A pipeline has taken the call."""
        self._add_alone(call_id, router_pb2.EntryExtras(model_fingerprint=model_fingerprint))

    def add_error(self, call_id: int, error: RequestError) -> None:
        """The call ends with an error."""
        num_losses = error.num_losses if isinstance(error, HandedOverError) else 0
        made = router_pb2.CallError(
            code=error.grpc_code, message=error.message, field=error.param or "", num_losses=num_losses
        )
        self._add_alone(call_id, router_pb2.EntryExtras(error=made))

    def _add_alone(self, call_id: int, extras: router_pb2.EntryExtras) -> None:
        """An entry without tokens."""
        columns = self._columns[-1]
        columns.add_extras(extras, 0)
        columns.call_ids.append(call_id)
        columns.is_decode_pass.append(False)
        for zeros in (
            columns.num_tokens,
            columns.finish_reasons,
            columns.num_drafts,
            columns.num_accepted_drafts,
            columns.num_spec_tokens,
        ):
            zeros.append(0)
        self._has_grown()

    def add(self, emit: Emit) -> None:
        """What a target pass committed for calls of the gateway."""
        if emit.logprobs:  # each may be large
            for i in range(len(emit.call_ids)):
                self._add(emit.only(np.arange(len(emit.call_ids)) == i))
        else:
            self._add(emit)

    def _add(self, emit: Emit) -> None:
        columns = self._columns[-1]
        for i in sorted(emit.logprobs.keys() | emit.prompt_logprobs.keys() | emit.num_cached_tokens.keys()):
            extras = router_pb2.EntryExtras(
                logprobs=emit.logprobs.get(i),
                prompt_logprobs=emit.prompt_logprobs.get(i),
                num_cached_tokens=emit.num_cached_tokens.get(i, 0),
            )
            columns.add_extras(extras, i)
        columns.call_ids.extend(emit.call_ids.tolist())
        columns.num_tokens.extend(emit.num_tokens.tolist())
        columns.token_ids.frombytes(emit.token_ids.tobytes())
        columns.finish_reasons.extend(emit.finish_reasons.tolist())
        columns.is_decode_pass.extend(emit.is_decode_pass.tolist())
        columns.num_drafts.extend(emit.num_drafts.tolist())
        columns.num_accepted_drafts.extend(emit.num_accepted.tolist())
        columns.num_spec_tokens.extend(emit.num_spec_tokens.tolist())
        self._has_grown()

    def _has_grown(self) -> None:
        if self._columns[-1].is_full:
            self._columns.append(_Columns())
        self._has_news.set()

    def close(self) -> None:
        """Nothing is added any more."""
        self._is_closed = True
        self._has_news.set()

    async def take(self) -> router_pb2.RouterResponse | None:
        """The next message, as soon as there is an entry; None when all are taken and none will come."""
        while (message := self.pop()) is None and not self._is_closed:
            await self._has_news.wait()
        return message

    def pop(self) -> router_pb2.RouterResponse | None:
        """The next message; None while there is no entry."""
        columns = self._columns[0]
        if len(self._columns) > 1:
            self._columns.popleft()
        else:
            self._columns[0] = _Columns()
            self._has_news.clear()
        return columns.message() if columns.call_ids else None
