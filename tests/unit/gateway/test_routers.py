"""Which router a call goes to."""

import time
from collections import Counter
from unittest import mock

import pytest

from dflash_ray.config import NetworkConfig
from dflash_ray.core.errors import UnavailableError
from dflash_ray.gateway.routers import Routers
from dflash_ray.pb import router_pb2
from dflash_ray.rpc.directory import Entry
from tests.directories import LocalDirectory


def routers_of(**infos: dict) -> Routers:
    routers = Routers(LocalDirectory(), NetworkConfig())
    routers.update([Entry("router", router_id, f"{router_id}:1", info) for router_id, info in infos.items()])
    return routers


def led(num_groups: int = 1, *models: str) -> dict:
    return {"ready": num_groups > 0, "num_groups": num_groups, "models": list(models)}


def picks(routers: Routers, **options) -> Counter[str]:
    return Counter(routers.pick(**options).id for _ in range(200))


def test_gateways_that_know_nothing_of_each_others_requests_do_not_all_choose_the_same_router():
    counts = picks(routers_of(a=led(), b=led()))
    assert min(counts["a"], counts["b"]) > 50


async def test_a_router_that_leads_more_groups_takes_more_requests():
    routers = routers_of(a=led(2), b=led(1))
    asked: Counter[str] = Counter()
    for _ in range(30):
        router = routers.pick()
        routers.open(router, router_pb2.GenerateTokensRequest(), time.monotonic() + 60, mock.Mock())
        asked[router.id] += 1
    assert asked == {"a": 20, "b": 10}
    await routers.close()


def test_the_router_that_failed_is_asked_again_only_when_no_other_is_ready():
    assert picks(routers_of(a=led(), b=led()), failed="a").keys() == {"b"}
    assert picks(routers_of(a=led(), b=led(0)), failed="a").keys() == {"a"}
    assert picks(routers_of(a=led(0), b=led(0)), failed="a").keys() == {"b"}
    assert picks(routers_of(a=led()), failed="a").keys() == {"a"}


def test_a_router_with_the_model_that_began_comes_before_one_that_may_get_it_and_one_with_another():
    routers = routers_of(other=led(1, "new"), idle=led(0), right=led(2, "new", "old"))
    assert routers.pick("old").id == "right"
    assert routers.pick("old", full={"right"}).id == "idle"
    assert picks(routers).keys() == {"other", "right"}


def test_without_any_router_the_error_says_so():
    with pytest.raises(UnavailableError, match="no router is up"):
        (routers_of()).pick()
