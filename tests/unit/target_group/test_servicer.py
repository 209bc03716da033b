"""What a router sends is checked before the ranks see it; a message at fault costs its stream, never the process."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from dflash_ray.core.arrays import packed
from dflash_ray.core.protocol import PROTOCOL_VERSION
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.observability.metrics import TargetMetrics
from dflash_ray.pb import common_pb2, target_pb2, target_pb2_grpc
from dflash_ray.rpc.target_service import add_target_service
from dflash_ray.target_group.servicer import TargetInfo, TargetServicer
from tests.steps import PROMPT, VOCAB
from tests.unit.target_group.test_engine import FAILED, OK, STALE, new_engine

MAX_BATCH_TOKENS = 32
INFO = TargetInfo("t", "model", "", VOCAB, 16, 256, 8, 32, MAX_BATCH_TOKENS, 1, 0)


def opening(sequence_id=1, tokens=PROMPT, stops=(), min_new=0, **sampling) -> target_pb2.OpenSequence:
    values = {"top_p": 1.0, "repetition_penalty": 1.0, "seed": 11} | sampling
    return target_pb2.OpenSequence(
        sequence_id=sequence_id,
        token_ids=tokens,
        prompt_len=len(tokens),
        sampling=common_pb2.SamplingParams(**values),
        stopping=common_pb2.StoppingParams(max_new_tokens=40, min_new_tokens=min_new, stop_token_ids=stops),
    )


class Gate(ThreadPoolExecutor):
    """A compute thread that can be held up, and counts what it was handed."""

    def __init__(self) -> None:
        super().__init__(1)
        self.is_open = threading.Event()
        self.is_open.set()
        self.num_handed = 0

    def submit(self, *arguments):
        self.num_handed += 1
        return super().submit(self._run, *arguments)

    def _run(self, work, *arguments):
        self.is_open.wait(60)
        return work(*arguments)


@pytest.fixture
def engine(runner):
    return new_engine(runner)


@pytest.fixture
def compute():
    gate = Gate()
    yield gate
    gate.is_open.set()
    gate.shutdown()


@pytest.fixture
async def stub(engine, compute):
    server = grpc.aio.server()
    servicer = TargetServicer(engine, INFO, compute, Watchdog(60.0, "a pass"), TargetMetrics("m"))
    add_target_service(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield target_pb2_grpc.TargetStub(channel)
    compute.is_open.set()
    await server.stop(0)


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def lead(stub, epoch: int):
    call = stub.Verify()
    hello = target_pb2.TargetHello(protocol_version=PROTOCOL_VERSION, router_id="r", epoch=epoch)
    await call.write(target_pb2.TargetRequest(hello=hello))
    assert (await call.read()).hello.vocab_size == VOCAB
    return call


async def run(call, step: target_pb2.Step) -> target_pb2.StepResult:
    await call.write(target_pb2.TargetRequest(step=step))
    reply = await call.read()
    assert reply != grpc.aio.EOF, await call.details()
    return reply.result


DRAFT_OF_5 = packed(np.array([5]))
MALFORMED = {
    "prefill_lens": target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[3, 3]),
    "prefill_lens must be at least 1": target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[0]),
    "base_lens": target_pb2.Step(verify_ids=[1, 2], base_lens=[3], num_drafts=[0, 0]),
    "num_drafts": target_pb2.Step(verify_ids=[1], base_lens=[3]),
    "draft_token_ids": target_pb2.Step(verify_ids=[1], base_lens=[3], num_drafts=[2], draft_token_ids=DRAFT_OF_5),
    "draft_token_ids has 3 bytes": target_pb2.Step(
        verify_ids=[1], base_lens=[3], num_drafts=[1], draft_token_ids=DRAFT_OF_5[:3]
    ),
    "draft_parents": target_pb2.Step(
        verify_ids=[1], base_lens=[3], num_drafts=[1], draft_token_ids=DRAFT_OF_5, draft_parents=[0, 1]
    ),
    "draft_log_probs": target_pb2.Step(
        verify_ids=[1], base_lens=[3], num_drafts=[1], draft_token_ids=DRAFT_OF_5, draft_parents=[0],
        num_draft_candidates=[2], draft_candidate_ids=[5, 6],
    ),
    "colocated_num_drafts": target_pb2.Step(colocated_draft_ids=[1]),
    "max_batch_tokens": target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[MAX_BATCH_TOKENS + 1]),
}  # fmt: skip


@pytest.mark.parametrize("named", MALFORMED)
async def test_a_malformed_step_gets_a_status_that_names_the_column_and_the_group_goes_on(stub, named):
    call = await lead(stub, 1)
    await call.write(target_pb2.TargetRequest(step=MALFORMED[named]))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and named in error.value.details()
    call = await lead(stub, 2)
    result = await run(call, target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[7]))
    assert list(result.statuses) == [OK] and len(result.token_ids) == 4


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"bias_token_ids": [VOCAB], "bias_values": [1.0]}, "bias_token_ids"),
        ({"bias_token_ids": [1], "bias_values": []}, "bias_values"),
        ({"bias_token_ids": [1], "bias_values": [float("nan")]}, "bias_values"),
        ({"num_logprobs": 100_000}, "num_logprobs"),
        ({"num_prompt_logprobs": 100_000}, "num_prompt_logprobs"),
        ({"tokens": [1, VOCAB]}, "token_ids"),
        ({"tokens": [1] * 257}, "257 tokens"),
    ],
)
async def test_a_sequence_with_a_value_that_cannot_run_fails_alone(stub, values, named):
    call = await lead(stub, 1)
    step = target_pb2.Step(
        open=[opening(1, **values), opening(2)], prefill_ids=[1, 2], prefill_lens=[7, 7]
    )  # fmt: skip
    result = await run(call, step)
    assert list(result.statuses) == [FAILED, OK] and named in result.errors[0]


async def test_a_stop_token_that_the_model_does_not_have_is_ignored(stub):
    call = await lead(stub, 1)
    step = target_pb2.Step(open=[opening(stops=[VOCAB + 5, 3], min_new=4)], prefill_ids=[1], prefill_lens=[7])
    assert list((await run(call, step)).statuses) == [OK]


def verify_message(base_len: int, drafts=()) -> target_pb2.Step:
    return target_pb2.Step(
        verify_ids=[1],
        base_lens=[base_len],
        num_drafts=[len(drafts)],
        draft_token_ids=packed(np.array(drafts, np.uint32)),
        draft_parents=range(len(drafts)),
    )


async def test_a_step_that_is_stale_when_its_turn_comes_is_answered_so_and_the_order_stays(stub, compute):
    call = await lead(stub, 1)
    await run(call, target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[7]))
    compute.is_open.clear()
    for step_id, base_len in ((3, 8), (4, 8), (5, 9)):
        step = verify_message(base_len)
        step.step_id = step_id
        await call.write(target_pb2.TargetRequest(step=step))
    compute.is_open.set()
    results = [(await call.read()).result for _ in range(3)]
    assert [result.step_id for result in results] == [3, 4, 5]
    assert [list(result.statuses) for result in results] == [[OK], [STALE], [OK]]


async def test_one_step_is_ready_while_another_runs_and_the_next_ones_wait(stub, compute):
    call = await lead(stub, 1)
    await run(call, target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[7]))
    before = compute.num_handed
    compute.is_open.clear()
    for base_len in range(8, 13):
        await call.write(target_pb2.TargetRequest(step=verify_message(base_len)))
    await until(lambda: compute.num_handed == before + 2)
    await asyncio.sleep(0.2)
    assert compute.num_handed == before + 2
    compute.is_open.set()
    for _ in range(5):
        assert list((await call.read()).result.statuses) == [OK]


async def test_a_malformed_step_behind_one_that_runs_is_refused_after_its_result(stub, compute):
    call = await lead(stub, 1)
    compute.is_open.clear()
    first = target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[7])
    for step in (first, MALFORMED["base_lens"]):
        await call.write(target_pb2.TargetRequest(step=step))
    compute.is_open.set()
    assert list((await call.read()).result.statuses) == [OK]
    with pytest.raises(grpc.aio.AioRpcError, match="base_lens"):
        await call.read()


async def test_what_a_router_opened_ends_with_its_stream_whatever_is_still_to_run(stub, compute, engine):
    call = await lead(stub, 1)
    compute.is_open.clear()
    await call.write(
        target_pb2.TargetRequest(step=target_pb2.Step(open=[opening()], prefill_ids=[1], prefill_lens=[7]))
    )
    await call.write(target_pb2.TargetRequest(step=verify_message(8)))
    await until(lambda: compute.num_handed == 2)
    call.cancel()
    await until(lambda: compute.num_handed == 3)
    compute.is_open.set()
    other = await lead(stub, 2)
    result = await run(other, target_pb2.Step(open=[opening(2)], prefill_ids=[2], prefill_lens=[7]))
    assert list(result.statuses) == [OK] and engine.num_sequences == 1


async def test_a_router_whose_epoch_is_over_is_refused(stub):
    old = await lead(stub, 1)
    await lead(stub, 2)
    await old.write(target_pb2.TargetRequest(step=verify_message(8)))
    with pytest.raises(grpc.aio.AioRpcError, match="does not lead this group"):
        await old.read()


async def test_a_step_that_waits_when_another_router_takes_over_is_never_run(stub, compute, engine):
    old = await lead(stub, 1)
    compute.is_open.clear()
    for at in range(4):
        step = target_pb2.Step(open=[opening(at)], prefill_ids=[at], prefill_lens=[7])
        await old.write(target_pb2.TargetRequest(step=step))
    await until(lambda: compute.num_handed == 2)
    new = await lead(stub, 2)
    compute.is_open.set()
    assert [list((await old.read()).result.statuses) for _ in range(2)] == [[OK], [OK]]
    with pytest.raises(grpc.aio.AioRpcError, match="does not lead this group"):
        await old.read()
    result = await run(new, target_pb2.Step(open=[opening(9)], prefill_ids=[9], prefill_lens=[7]))
    assert list(result.statuses) == [OK] and engine.num_sequences == 1
