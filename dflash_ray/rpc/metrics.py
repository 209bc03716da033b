"""The Metrics service of every inner server, and the one page that a gateway makes of all of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import get_args

import grpc

from dflash_ray.config import NetworkConfig
from dflash_ray.pb import metrics_pb2, metrics_pb2_grpc
from dflash_ray.rpc.channel import open_channel
from dflash_ray.rpc.directory import DirectoryClient, Entry, Kind
from dflash_ray.rpc.known_entries import KnownEntries, refresh

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


class MetricsPage:
    """One exposition of all processes of the directory.

    Every gateway has one and all show the same: this process is one among the entries. A process that does not answer
    in time is shown as it was, for as long as the directory knows it, so that no sum over processes falls for a while.

    Args:
        own: kind and id of this process, whose metrics `render` returns.
    """

    def __init__(
        self,
        directory: DirectoryClient,
        network: NetworkConfig,
        own: tuple[Kind, str],
        render: Callable[[], str],
        timeout_s: float = 3.0,
    ) -> None:
        self._directory = directory
        self._known = [KnownEntries(directory, kind, network.entry_ttl_s) for kind in get_args(Kind)]
        self._own = own
        self._render = render
        self._max_message_bytes = network.max_message_bytes
        self._timeout_s = timeout_s
        self._poll_s = network.entry_ttl_s / 3
        self._last: dict[str, str] = {}

    async def run(self) -> None:
        """Remembers who is there until cancelled, however seldom the page is asked for."""
        while True:
            await self._refresh()
            await asyncio.sleep(self._poll_s)

    async def _refresh(self) -> list[Entry]:
        await refresh(self._directory, self._known)
        return [entry for known in self._known for entry in known.entries if (entry.kind, entry.id) != self._own]

    async def collect(self) -> str:
        """The page as of now."""
        others = await self._refresh()
        answers = await asyncio.gather(*(_collect(entry, self._max_message_bytes, self._timeout_s) for entry in others))
        texts = {_name(*self._own): self._render()}
        for entry, answer in zip(others, answers, strict=True):
            name = _name(entry.kind, entry.id)
            texts[name] = answer if answer is not None else self._last.get(name, "")
        self._last = texts
        return merge_expositions(dict(sorted(texts.items())))


def _name(kind: Kind, entry_id: str) -> str:
    return f"{kind}-{entry_id}"


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
