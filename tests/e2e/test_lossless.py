"""Speculation changes when a token comes, never which: the application against transformers and against itself."""

import asyncio

import pytest

from tests.applications import PROMPTS, Application, Client, application, request
from tests.reference import Comparison, Reference

MAX_NEW_TOKENS = 24
# More nodes than a block of the drafter has slots.
TREES = ("router.tree_width=4", "router.draft_tokens=9", "target.max_batch_tokens=640")
SETUPS = {
    f"tp{tp_size}-{name}": (f"target.tp_size={tp_size}", *overrides)
    for tp_size in (1, 2)
    for name, overrides in {
        "dflash-remote": ("drafter.method=dflash",),
        "dflash-colocated": ("drafter.method=dflash", "drafter.placement_mode=colocated"),
        "ngram": ("drafter.method=ngram",),
        "trees-remote": ("drafter.method=dflash", *TREES),
        "trees-colocated": (
            "drafter.method=dflash",
            "drafter.placement_mode=colocated",
            *TREES,
        ),
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


async def on_as_off(app: Application, prompts: list[list[int]], temperature: float = 0.0) -> list[list[int]]:
    """Tokens of every prompt, the same with speculation off and on: no near-tie excuses a difference on a CPU."""
    off, on, adaptive = [
        await generate_all(app, prompts, speculation=speculation, temperature=temperature, seed=7)
        for speculation in ("off", "fixed", "adaptive")
    ]
    tokens = [output.token_ids for output in off]
    assert [output.token_ids for output in on] == tokens
    assert [output.token_ids for output in adaptive] == tokens
    assert sum(output.metrics.num_accepted_draft_tokens for output in on) > 0
    return tokens


def against_transformers(
    reference: Reference, prompts: list[list[int]], expected: list[list[int]], got: list[list[int]]
) -> Comparison:
    """Another engine sums in another order, so near-ties are counted apart."""
    comparison = Comparison()
    for i, (ids, want, tokens) in enumerate(zip(prompts, expected, got, strict=True)):
        comparison.add(reference, f"prompt {i}", ids, want, tokens)
    return comparison


async def test_greedy_tokens_equal_transformers_with_speculation_off_and_on(smollm2_app, reference):
    prompts = prompt_ids(reference, limit=12)
    expected = [reference.greedy(ids, MAX_NEW_TOKENS) for ids in prompts]
    comparison = against_transformers(reference, prompts, expected, await on_as_off(smollm2_app, prompts))
    print(comparison)
    assert not comparison.different
    assert comparison.equal >= len(prompts) / 2


@pytest.mark.parametrize("temperature", [0.7, 1.0])
async def test_seeded_text_is_the_same_with_speculation_off_and_on(smollm2_app, reference, temperature):
    await on_as_off(smollm2_app, prompt_ids(reference, limit=12), temperature)


async def test_seeded_text_does_not_depend_on_the_batch(smollm2_app, reference):
    prompts = prompt_ids(reference, limit=8)
    together = await generate_all(smollm2_app, prompts, temperature=0.8, seed=3)
    alone = await generate_all(smollm2_app, prompts, concurrency=1, temperature=0.8, seed=3)
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]


@pytest.fixture(scope="module")
def prompts(reference: Reference, pytestconfig: pytest.Config) -> list[list[int]]:
    return prompt_ids(reference, limit=pytestconfig.getoption("prompts"))


@pytest.fixture(scope="module")
def expected_greedy(reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    return [reference.greedy(ids, MAX_NEW_TOKENS) for ids in prompts]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("setup", SETUPS)
async def test_every_setup_is_lossless(setup, reference, prompts, expected_greedy):
    with application(*SETUPS[setup]) as app:
        greedy = against_transformers(reference, prompts, expected_greedy, await on_as_off(app, prompts))
        print(f"{setup}, greedy, against transformers: {greedy}")
        assert not greedy.different
        assert greedy.equal >= len(prompts) / 2
        for temperature in (0.7, 1.0):
            await on_as_off(app, prompts, temperature)
