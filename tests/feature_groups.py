"""A target group's features without a model: steps are told to it, and every row says whose it is."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import torch

from dflash_ray.models.context_features import PackedRows, pack, rows_per_piece
from dflash_ray.pb import target_pb2, target_pb2_grpc
from dflash_ray.rpc.channel import new_server, start_server
from dflash_ray.rpc.target_service import add_target_service
from dflash_ray.target_group.feature_streams import FeatureStreams

WIDTH = 1024
PIECE_ROWS = rows_per_piece(WIDTH, torch.float32)
LIMIT = 1024 * 1024
FINGERPRINT = "fc of the drafter"


def truth(sequence_id: int, start: int, count: int) -> torch.Tensor:
    """Rows that tell whose they are."""
    positions = torch.arange(start, start + count, dtype=torch.float32)[:, None]
    return (1000 * sequence_id + positions).expand(-1, WIDTH)


class FeatureGroup(target_pb2_grpc.TargetServicer):
    """Serves real streams of features.

    Attributes:
        num_read: rows that were read for drafters.
        num_streams: that were opened here.
    """

    def __init__(self) -> None:
        self.num_read = 0
        self.num_streams = 0
        self.address = ""
        self.streams = FeatureStreams(self._read, PIECE_ROWS, "t", FINGERPRINT)
        self.epoch = self.step_id = 0
        self.lead()

    def _read(self, sequence_ids, starts, counts) -> PackedRows:
        self.num_read += sum(counts)
        return pack(torch.cat([truth(*columns) for columns in zip(sequence_ids, starts, counts, strict=True)]))

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
        return self.step_id

    def compute(self, step_id: int | None = None, **num_rows: int) -> None:
        """A step is done, after which sequences have so many rows: `s7=20`."""
        ids = [int(name.removeprefix("s")) for name in num_rows]
        self.streams.publish(self.epoch, self.step_id if step_id is None else step_id, ids, num_rows.values())

    def step(self, **num_rows: int) -> None:
        self.receive()
        self.compute(**num_rows)


@contextlib.asynccontextmanager
async def feature_group(port: int = 0) -> AsyncIterator[FeatureGroup]:
    """A group that listens until the block is left."""
    server, group = new_server(LIMIT), FeatureGroup()
    add_target_service(group, server)
    running = await start_server(server, [], "127.0.0.1", port)
    group.address = f"127.0.0.1:{running.port}"
    try:
        yield group
    finally:
        await running.stop()
