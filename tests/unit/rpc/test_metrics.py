"""One page of metrics for all processes, and the same from every gateway."""

import re

from dflash_ray.config import NetworkConfig
from dflash_ray.observability.metrics import GatewayMetrics, RouterMetrics
from dflash_ray.rpc.channel import RunningServer, new_server, start_server
from dflash_ray.rpc.directory import Entry
from dflash_ray.rpc.metrics import MetricsPage, add_metrics_service, merge_expositions
from tests.directories import LocalDirectory
from tests.metrics import total

NETWORK = NetworkConfig(entry_ttl_s=600.0)
REQUESTS = "vllm:request_success_total"
PREEMPTIONS = "vllm:num_preemptions_total"


def test_merged_metrics_say_whose_they_are():
    text = '# HELP x_total Things\n# TYPE x_total counter\nx_total{model="m"} 1.0\n'
    merged = merge_expositions({"a": text, "b": text})
    assert merged.count("# TYPE x_total") == 1
    assert 'x_total{process="a",model="m"} 1.0' in merged and 'process="b"' in merged


class Gateway:
    """What a gateway has to do with metrics."""

    def __init__(self, gateway_id: str, directory: LocalDirectory) -> None:
        self.id = gateway_id
        self.metrics = GatewayMetrics()
        self.page = MetricsPage(directory, NETWORK, ("gateway", gateway_id), self.metrics.render)

    def count(self) -> None:
        self.metrics.request_success.labels("m", "stop").inc()


async def serve(directory: LocalDirectory, kind: str, entry_id: str, metrics) -> RunningServer:
    server = new_server(NETWORK.max_message_bytes)
    add_metrics_service(server, metrics.render)
    running = await start_server(server, [], "127.0.0.1", 0)
    await directory.register(Entry(kind, entry_id, f"127.0.0.1:{running.port}"), NETWORK.entry_ttl_s)
    return running


async def test_every_gateway_shows_the_same_sums_and_they_never_fall():
    directory = LocalDirectory()
    gateways = [Gateway("a", directory), Gateway("b", directory)]
    servers = [await serve(directory, "gateway", gateway.id, gateway.metrics) for gateway in gateways]
    router = RouterMetrics()
    servers.append(await serve(directory, "router", "r", router))
    before = 0.0
    for i in range(10):
        gateways[i % 2].count()
        router.num_preemptions.labels("m").inc()
        pages = [await gateway.page.collect() for gateway in gateways]
        assert [total(page, REQUESTS) for page in pages] == [i + 1] * 2
        assert [total(page, PREEMPTIONS) for page in pages] == [i + 1] * 2
        assert total(pages[i % 2], REQUESTS) >= before
        before = total(pages[i % 2], REQUESTS)
    for page in pages:
        samples = [line.rsplit(" ", 1)[0] for line in page.splitlines() if not line.startswith("#")]
        assert len(samples) == len(set(samples)), "a process is shown twice"
        assert set(re.findall(r'process="([^"]+)"', page)) == {"gateway-a", "gateway-b", "router-r"}
    for server in servers:
        await server.stop()


async def test_a_process_that_does_not_answer_is_shown_as_it_was_until_it_leaves_the_directory():
    directory = LocalDirectory()
    gateway = Gateway("a", directory)
    router = RouterMetrics()
    router.num_preemptions.labels("m").inc(5)
    server = await serve(directory, "router", "r", router)
    assert total(await gateway.page.collect(), PREEMPTIONS) == 5
    await server.server.stop(None)
    assert total(await gateway.page.collect(), PREEMPTIONS) == 5
    directory.is_away = True
    assert total(await gateway.page.collect(), PREEMPTIONS) == 5
    directory.is_away = False
    await directory.unregister("router", "r")
    assert 'process="router-r"' not in await gateway.page.collect()


async def test_a_gateway_that_died_leaves_the_page_of_the_other():
    directory = LocalDirectory()
    gateways = [Gateway("a", directory), Gateway("b", directory)]
    server = await serve(directory, "gateway", "b", gateways[1].metrics)
    gateways[1].count()
    assert total(await gateways[0].page.collect(), REQUESTS) == 1
    await server.server.stop(None)
    await directory.unregister("gateway", "b")
    assert 'process="gateway-b"' not in await gateways[0].page.collect()
