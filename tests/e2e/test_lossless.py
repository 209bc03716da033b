"""Speculation changes when a token comes, never which: the application against transformers and against itself."""

import asyncio

import pytest

from tests.applications import PROMPTS, Application, Client, application, request
from tests.reference import Comparison, Reference

MAX_NEW_TOKENS = 24
SETUPS = {
    f"tp{tp_size}-{name}": (f"target.tp_size={tp_size}", *overrides)
    for tp_size in (1, 2)
    for name, overrides in {
        "dflash-remote": ("drafter.method=dflash",),
        "dflash-colocated": ("drafter.method=dflash", "drafter.placement_mode=colocated"),
        "ngram": ("drafter.method=ngram",),
    }.items()
}


def prompt_ids(reference: Reference, limit: int | None = None) -> list[list[int]]:
    """The 64 prompts through the chat template, and one prompt of a single token."""
    chats = [reference.chat_ids(prompt["prompt"]) for prompt in PROMPTS[:limit]]
    return [*chats, [4094]]


async def generate_all(app: Application, prompts: list[list[int]], concurrency: int = 16, **options):
    limit = asyncio.Semaphore(concurrency)
    async with Client(app.grpc_address) as client:

        async def one(ids: list[int]):
            async with limit:
                return await client.generate(request(ids, max_new_tokens=MAX_NEW_TOKENS, **options))

        return await asyncio.gather(*(one(ids) for ids in prompts))


async def compare_with_transformers(
    app: Application, reference: Reference, prompts: list[list[int]], expected: list[list[int]]
) -> Comparison:
    comparison = Comparison()
    for speculation in ("off", "fixed"):
        outputs = await generate_all(app, prompts, speculation=speculation)
        for i, (ids, want, got) in enumerate(zip(prompts, expected, outputs, strict=True)):
            comparison.add(reference, f"{speculation} prompt {i}", ids, want, got.token_ids)
        if speculation == "fixed":
            assert sum(output.metrics.num_accepted_draft_tokens for output in outputs) > 0
    return comparison


async def compare_on_with_off(
    app: Application, reference: Reference, prompts: list[list[int]], temperature: float
) -> Comparison:
    comparison = Comparison()
    off, on = [
        await generate_all(app, prompts, speculation=speculation, temperature=temperature, seed=7)
        for speculation in ("off", "fixed")
    ]
    for i, (ids, want, got) in enumerate(zip(prompts, off, on, strict=True)):
        name = f"T={temperature} prompt {i}"
        comparison.add(reference, name, ids, want.token_ids, got.token_ids, temperature, seed=7)
    return comparison


async def test_greedy_tokens_equal_transformers_with_speculation_off_and_on(smollm2_app, reference):
    prompts = prompt_ids(reference, limit=12)
    expected = [reference.greedy(ids, MAX_NEW_TOKENS) for ids in prompts]
    comparison = await compare_with_transformers(smollm2_app, reference, prompts, expected)
    print(comparison)
    assert not comparison.different
    assert comparison.equal >= len(prompts)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
async def test_seeded_text_is_the_same_with_speculation_off_and_on(smollm2_app, reference, temperature):
    comparison = await compare_on_with_off(smollm2_app, reference, prompt_ids(reference, limit=12), temperature)
    print(comparison)
    assert not comparison.different


async def test_seeded_text_does_not_depend_on_the_batch(smollm2_app, reference):
    prompts = prompt_ids(reference, limit=8)
    together = await generate_all(smollm2_app, prompts, temperature=0.8, seed=3)
    alone = await generate_all(smollm2_app, prompts, concurrency=1, temperature=0.8, seed=3)
    comparison = Comparison()
    for i, (ids, want, got) in enumerate(zip(prompts, alone, together, strict=True)):
        comparison.add(reference, f"prompt {i}", ids, want.token_ids, got.token_ids, 0.8, seed=3)
    assert not comparison.different


@pytest.fixture(scope="module")
def expected_greedy(reference: Reference) -> list[list[int]]:
    return [reference.greedy(ids, MAX_NEW_TOKENS) for ids in prompt_ids(reference)]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("setup", SETUPS)
async def test_every_setup_is_lossless_over_all_prompts(setup, reference, expected_greedy):
    prompts = prompt_ids(reference)
    with application(*SETUPS[setup]) as app:
        greedy = await compare_with_transformers(app, reference, prompts, expected_greedy)
        print(f"{setup} greedy against transformers: {greedy}")
        assert not greedy.different
        for temperature in (0.7, 1.0):
            sampled = await compare_on_with_off(app, reference, prompts, temperature)
            print(f"{setup} seeded T={temperature} on against off: {sampled}")
            assert not sampled.different
