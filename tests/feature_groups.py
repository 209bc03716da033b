"""A target group's features without a model: steps are told to it, and every row says whose it is."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import numpy as np
import torch

from dflash_ray.core.arrays import spans
from dflash_ray.models.context_features import PackedRows, bytes_of, pack, rows_per_piece
from dflash_ray.models.feature_pages import FeaturePages, pages_of
from dflash_ray.pb import target_pb2, target_pb2_grpc
from dflash_ray.rpc.channel import new_server, start_server
from dflash_ray.rpc.target_service import add_target_service
from dflash_ray.target_group.feature_streams import FeatureStreams, SharedRows

WIDTH = 1024
PIECE_ROWS = rows_per_piece(WIDTH, torch.float32)
LIMIT = 1024 * 1024
PAGE = 16
NUM_PAGES = 2048
FINGERPRINT = "fc of the drafter"


def truth(sequence_id: int, start: int, count: int) -> torch.Tensor:
    """Rows that tell whose they are."""
    positions = torch.arange(start, start + count, dtype=torch.float32)[:, None]
    return (1000 * sequence_id + positions).expand(-1, WIDTH)


class SharedTruth:
    """Rows in shared pages, each written when it is computed."""

    def __init__(self) -> None:
        pages = FeaturePages.create(NUM_PAGES, PAGE, WIDTH, torch.float32)
        assert pages is not None
        self.pages = pages
        self._free = list(range(NUM_PAGES))
        self._pages_of: dict[int, list[int]] = {}
        self._num_rows: dict[int, int] = {}

    def close(self, sequence_ids) -> None:
        """Pages of sequences that are over are the first to be handed on."""
        for sequence_id in sequence_ids:
            self._free[:0] = self._pages_of.pop(sequence_id, [])
            self._num_rows.pop(sequence_id, None)

    def write(self, sequence_id: int, num_rows: int) -> None:
        pages = self._pages_of.setdefault(sequence_id, [])
        while len(pages) * PAGE < num_rows:
            pages.append(self._free.pop(0))
        start = self._num_rows.get(sequence_id, 0)
        positions = np.arange(start, num_rows)
        places = np.array(pages)[positions // PAGE] * PAGE + positions % PAGE
        self.pages.begin(places)
        self.pages.rows[places] = bytes_of(truth(sequence_id, start, num_rows - start).contiguous())
        self._num_rows[sequence_id] = num_rows

    def name(self, sequence_ids, starts, counts):
        firsts, num_pages = pages_of(np.array(starts), np.array(counts), PAGE)
        nth = np.split(spans(firsts, num_pages), num_pages.cumsum()[:-1])
        found = [np.array(self._pages_of[at])[part] for at, part in zip(sequence_ids, nth, strict=True)]
        return np.concatenate(found), self.pages.uses[np.concatenate(found)]


def subscribed_ids(streams: FeatureStreams) -> set[int]:
    """Sequences of which somebody wants rows."""
    places = [place for stream in streams._streams for place in stream.subscriptions._sequences if place]
    return set(streams._sequences.ids[places].tolist())


class FeatureGroup(target_pb2_grpc.TargetServicer):
    """Serves real streams of features.

    Args:
        shares: rows lie in memory that drafters of this machine may read.

    Attributes:
        num_read: rows that were read for drafters.
        num_streams: that were opened here.
    """

    def __init__(self, shares: bool = False) -> None:
        self.num_read = 0
        self.num_streams = 0
        self.address = ""
        self.shared = SharedTruth() if shares else None
        shared = None if self.shared is None else SharedRows(self.shared.pages.offer, self._name)
        self.streams = FeatureStreams(self._read, PIECE_ROWS, "t", FINGERPRINT, shared)
        self.epoch = self.step_id = 0
        self.lead()

    def _read(self, sequence_ids, starts, counts) -> PackedRows:
        self.num_read += sum(counts)
        return pack(torch.cat([truth(*columns) for columns in zip(sequence_ids, starts, counts, strict=True)]))

    def _name(self, sequence_ids, starts, counts):
        self.num_read += sum(counts)
        return self.shared.name(sequence_ids, starts, counts)

    async def Features(self, request_iterator, context):
        self.num_streams += 1
        async for response in self.streams.serve(request_iterator, context):
            yield response

    def lead(self) -> None:
        """Another router takes over."""
        self.epoch += 1
        self.streams.lead(self.epoch)

    def receive(self, opens=(), closes=(), wants_features: bool = True) -> int:
        """A step is read; returns its number."""
        self.step_id += 1
        step = target_pb2.Step(step_id=self.step_id, close=closes)
        for sequence_id in opens:
            step.open.add(sequence_id=sequence_id, wants_features=wants_features)
        self.streams.receive(step)
        if self.shared is not None:
            self.shared.close([*closes, *opens])
        return self.step_id

    def compute(self, step_id: int | None = None, **num_rows: int) -> None:
        """A step is done, after which sequences have so many rows: `s7=20`."""
        ids = [int(name.removeprefix("s")) for name in num_rows]
        if self.shared is not None:
            for sequence_id, count in zip(ids, num_rows.values(), strict=True):
                self.shared.write(sequence_id, count)
        self.streams.publish(
            self.epoch,
            self.step_id if step_id is None else step_id,
            ids,
            np.array(list(num_rows.values()), dtype=np.int64),
        )

    def step(self, **num_rows: int) -> None:
        self.receive()
        self.compute(**num_rows)


@contextlib.asynccontextmanager
async def feature_group(port: int = 0, shares: bool = False) -> AsyncIterator[FeatureGroup]:
    """A group that listens until the block is left."""
    server, group = new_server(LIMIT), FeatureGroup(shares)
    add_target_service(group, server)
    running = await start_server(server, [], "127.0.0.1", port)
    group.address = f"127.0.0.1:{running.port}"
    try:
        yield group
    finally:
        await running.stop()
