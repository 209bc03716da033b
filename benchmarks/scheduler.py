"""What one decode step costs the router's loop: canned targets and drafters around the production scheduler.

`python benchmarks/scheduler.py [--sequences 1 32 256] [--no-ngram] [--profile]`. Every sequence decodes with 7 remote
drafts a step over a context of about 1,000 tokens; some sequences end each step and are replaced. Counted is the
processor time of parsing results and drafts, of every scheduler call, and of serialising what it sends; what plays the
target and the drafter is not. Prints figures; asserts nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import time

import numpy as np

from dflash_ray.config import load_config
from dflash_ray.core.arrays import packed
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.actions import Emit, RequestDrafts, RunStep
from dflash_ray.router.draft_requests import DrafterState
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.outbox import Outbox
from dflash_ray.router.scheduler import Scheduler

NUM_DRAFTS = 7
CONTEXT = 1000
VOCAB = 150_000
NUM_WORDS = 3000  # distinct tokens of a text: n-grams of two repeat, long ones don't
PAGE_SIZE = 16


class Clock:
    """Processor time of the code inside `with clock:`."""

    def __init__(self, profile: cProfile.Profile | None) -> None:
        self.total = 0.0
        self._profile = profile

    def __enter__(self) -> None:
        if self._profile is not None:
            self._profile.enable()
        self._started = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.total += time.thread_time() - self._started
        if self._profile is not None:
            self._profile.disable()


class Bench:
    """One scheduler with its target and drafter."""

    def __init__(self, num_sequences: int, ngram: bool, clock: Clock) -> None:
        rows = num_sequences * (1 + NUM_DRAFTS)
        config = load_config(
            None,
            [
                "router.policy=fixed",
                f"router.draft_tokens={NUM_DRAFTS}",
                f"router.max_running={num_sequences}",
                f"router.max_waiting={num_sequences}",
                f"router.prefer_ngram={ngram}",
                f"target.max_batch_tokens={rows + 4096}",
                "router.prefill_chunk_tokens=1024",
                "router.draft_timeout_ms=100000",
                "network.max_message_bytes=1000000000",
            ],
        )
        self.random = random.Random(0)
        self.turnover = 0.0  # part of the sequences that end a step
        self.num_decoded = 0  # chains of the last step
        self.clock = clock
        self.scheduler = Scheduler(config)
        num_pages = num_sequences * 4 * CONTEXT // PAGE_SIZE
        limits = TargetLimits(1, 4096, VOCAB, PAGE_SIZE, num_pages, rows + 4096, feature_fingerprint="f")
        self.scheduler.target_ready(limits, 0.0)
        self.scheduler.drafting.join(DrafterState("d", needs_features=True, max_draft_tokens=NUM_DRAFTS))
        self.outbox = Outbox()
        self.free_pages = num_pages
        self.lens: dict[int, int] = {}
        self.prefilled: dict[int, int] = {}
        self.num_emitted = self.num_finished = 0
        self.step: bytes | None = None
        self.request: bytes | None = None
        for _ in range(num_sequences):
            self.arrive()

    def arrive(self) -> None:
        prompt = [self.random.randrange(NUM_WORDS) for _ in range(CONTEXT)]
        request = router_pb2.GenerateTokensRequest(
            token_ids=prompt,
            prompt_len=CONTEXT,
            sampling=common_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, seed=7),
            stopping=common_pb2.StoppingParams(max_new_tokens=3000),
        )
        with self.clock:
            self.scheduler.arrive(request, 0.0)

    def poll(self) -> None:
        with self.clock:
            actions = self.scheduler.poll(0.0)
            self.scheduler.next_deadline()
            for action in actions:
                match action:
                    case RunStep(step):
                        self.step = target_pb2.TargetRequest(step=step).SerializeToString()
                    case RequestDrafts(_, request):
                        self.request = drafter_pb2.DrafterRequest(draft=request).SerializeToString()
                    case Emit():
                        self.num_emitted += len(action.token_ids)
                        self.outbox.add(action)
                        self.outbox.pop().SerializeToString()

    def run_step(self) -> None:
        """A step and the drafts that follow it."""
        assert self.step is not None
        data, num_ended = self.target_answers(target_pb2.TargetRequest.FromString(self.step).step)
        self.step = None
        with self.clock:
            result = target_pb2.TargetResponse.FromString(data).result
            self.scheduler.step_done(result, 0.0)
        for _ in range(num_ended):
            self.arrive()
        self.poll()
        while self.request is not None:
            reply = self.drafter_answers(drafter_pb2.DrafterRequest.FromString(self.request).draft)
            self.request = None
            with self.clock:
                drafts = drafter_pb2.DrafterResponse.FromString(reply).drafts
                self.scheduler.drafts_done("d", drafts, 0.0)
            self.poll()

    def target_answers(self, step: target_pb2.Step) -> tuple[bytes, int]:
        result = target_pb2.StepResult(step_id=step.step_id, free_pages=self.free_pages)
        for opened in step.open:
            self.lens[opened.sequence_id] = len(opened.token_ids)
            self.prefilled[opened.sequence_id] = 0
        entries = [(i, rows, None) for i, rows in zip(step.prefill_ids, step.prefill_lens, strict=True)]
        entries += [(i, 0, count) for i, count in zip(step.verify_ids, step.num_drafts, strict=True)]
        num_ended = 0
        token_ids: list[int] = []
        self.num_decoded = len(step.verify_ids)
        for sequence_id, rows, drafts in entries:
            accepted = 0 if not drafts else min(drafts, int(self.random.expovariate(0.4)))
            if drafts is None:
                start = self.prefilled[sequence_id]
                self.prefilled[sequence_id] = start + rows
                result.kv_lens.append(start + rows)
                result.cached_lens.append(0)
                count = int(self.prefilled[sequence_id] == self.lens[sequence_id])
            else:
                count = accepted + 1
            is_over = drafts is not None and (
                self.random.random() < self.turnover or self.lens[sequence_id] + count >= CONTEXT + 3000
            )
            num_ended += is_over
            self.lens[sequence_id] += count
            result.sequence_ids.append(sequence_id)
            result.statuses.append(target_pb2.ENTRY_STATUS_OK)
            result.num_accepted_drafts.append(accepted)
            result.num_tokens.append(count)
            result.committed_lens.append(self.lens[sequence_id])
            token_ids += [self.random.randrange(NUM_WORDS) for _ in range(count)]
            result.finish_reasons.append(common_pb2.FINISH_REASON_STOP if is_over else 0)
        result.token_ids = packed(np.array(token_ids))
        self.num_finished += num_ended
        return target_pb2.TargetResponse(result=result).SerializeToString(), num_ended

    def drafter_answers(self, request: drafter_pb2.DraftRequest) -> bytes:
        reply = drafter_pb2.DraftReply(request_id=request.request_id)
        counts = list(request.num_draft_tokens)
        ids = [self.random.randrange(NUM_WORDS) for _ in range(sum(counts))]
        reply.blocks.CopyFrom(
            common_pb2.DraftBlocks(
                epoch=request.epoch,
                sequence_ids=request.sequence_ids,
                committed_lens=request.committed_lens,
                num_slots=counts,
                num_candidates=[1] * len(counts),
                candidate_ids=np.array(ids, np.uint32).tobytes(),
                log_probs=np.zeros(len(ids), np.float32).tobytes(),
                is_drawn=[False] * len(counts),
            )
        )
        return drafter_pb2.DrafterResponse(drafts=reply).SerializeToString()


def measure(num_sequences: int, turnover: float, ngram: bool, num_steps: int, profile: bool) -> tuple[float, ...]:
    profiler = cProfile.Profile() if profile else None
    clock = Clock(profiler)
    bench = Bench(num_sequences, ngram, clock)
    bench.poll()
    while bench.num_decoded < num_sequences:
        bench.run_step()
    bench.turnover = turnover
    for _ in range(5):
        bench.run_step()
    bench.num_emitted = bench.num_finished = 0
    if profiler is not None:
        profiler.clear()
    times = []
    for _ in range(num_steps):
        clock.total = 0.0
        bench.run_step()
        times.append(1e3 * clock.total)
    times.sort()
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    totals = (sum(times), bench.num_emitted, bench.num_finished)
    mean, tokens, ended = (total / num_steps for total in totals)
    return mean, times[len(times) // 2], times[0], tokens, ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 32, 256, 1024, 2000])
    parser.add_argument("--turnover", type=float, nargs="*", default=[0.0, 0.01])
    parser.add_argument("--no-ngram", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    names = ("sequences", "turnover", "n-gram", "mean ms", "median", "least", "tokens", "ended")
    print(" ".join(f"{name:>9}" for name in names))
    for num_sequences in args.sequences:
        for turnover in args.turnover:
            for ngram in (False,) if args.no_ngram else (True, False):
                got = measure(num_sequences, turnover, ngram, args.steps, args.profile)
                print(f"{num_sequences:9} {turnover:9} {ngram!s:>9}", *(f"{value:9.2f}" for value in got), flush=True)


if __name__ == "__main__":
    main()
