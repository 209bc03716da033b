"""The Metrics service of every inner server, and the one page that a gateway makes of all of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable

import grpc

from dflash_ray.pb import metrics_pb2, metrics_pb2_grpc
from dflash_ray.rpc.channel import open_channel
from dflash_ray.rpc.directory import Entry

SERVICE_NAME = metrics_pb2.DESCRIPTOR.services_by_name["Metrics"].full_name
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")


class MetricsServicer(metrics_pb2_grpc.MetricsServicer):
    """Answers with what `render` returns."""

    def __init__(self, render: Callable[[], str]) -> None:
        self._render = render

    async def Collect(
        self, request: metrics_pb2.CollectRequest, context: grpc.aio.ServicerContext
    ) -> metrics_pb2.CollectResponse:
        return metrics_pb2.CollectResponse(text=self._render())


def add_metrics_service(server: grpc.aio.Server, render: Callable[[], str]) -> None:
    """Adds the Metrics service to a server that has not started."""
    metrics_pb2_grpc.add_MetricsServicer_to_server(MetricsServicer(render), server)


async def collect_metrics(
    entries: Iterable[Entry], own: dict[str, str], max_message_bytes: int, timeout_s: float = 1.0
) -> str:
    """One exposition of all processes: `own` texts by process id, and those of the directory's entries.

    A process that does not answer in time is left out.
    """
    entries = list(entries)
    answers = await asyncio.gather(*(_collect(entry, max_message_bytes, timeout_s) for entry in entries))
    texts = dict(own)
    texts.update({f"{entry.kind}-{entry.id}": text for entry, text in zip(entries, answers, strict=True) if text})
    return merge_expositions(texts)


async def _collect(entry: Entry, max_message_bytes: int, timeout_s: float) -> str | None:
    async with open_channel(entry.address, max_message_bytes) as channel:
        stub = metrics_pb2_grpc.MetricsStub(channel)
        try:
            response = await stub.Collect(metrics_pb2.CollectRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return None
    return str(response.text)


def merge_expositions(texts: dict[str, str]) -> str:
    """Joins expositions, with the label `process` telling whose a sample is; each family's header appears once."""
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for process, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                kept = headers.setdefault(family, [])
                if line not in kept:
                    kept.append(line)
            elif (match := _SAMPLE.match(line)) is not None:
                labels = f'process="{process}"' + (f",{match['labels']}" if match["labels"] else "")
                samples.setdefault(family, []).append(f"{match['name']}{{{labels}}} {match['value']}")
    lines = [line for family, kept in headers.items() for line in (*kept, *samples.get(family, ()))]
    return "\n".join(lines) + "\n" if lines else ""
