"""Families whose layers run as few operators: those of transformers in value, and each row the same in any step."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash_ray.kernels import build, ops
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.target_group.attention import PagedStep
from dflash_ray.target_group.lean_decoder import LeanDecoder
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.paged_cache import PagedCache
from tests.tiny import SHAPE, save_tiny_target
from tests.unit.target_group.conftest import CONFIG
from tests.unit.target_group.test_model import PAGE, batch

pytestmark = pytest.mark.skipif(
    not build.is_loaded_for("cpu"), reason="no C++ compiler: operators run in plain torch here"
)
LEAN = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "granite"]
LAYERS = SHAPE["num_hidden_layers"]


@pytest.fixture(scope="session", params=LEAN)
def family(request, tmp_path_factory):
    return resolve_target(str(save_tiny_target(request.param, tmp_path_factory.mktemp(f"lean-{request.param}"))))


@pytest.fixture
def tokens() -> list[int]:
    return torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def lean_decoder(target, tp_size: int = 1, taps: tuple[int, ...] = ()) -> tuple[LeanDecoder, PagedCache]:
    base = target.load_model().get_decoder()
    cache = PagedCache([3] * LAYERS, 8, 512, PAGE, torch.float32, "cpu")
    return LeanDecoder(base, tp_size, taps), cache


def run(decoder: LeanDecoder, cache: PagedCache, *entries) -> tuple[torch.Tensor, torch.Tensor | None]:
    step = batch(list(entries))
    with torch.inference_mode():
        return decoder(step, PagedStep(step, cache, "cpu"))


def test_a_lean_decoder_equals_transformers_layer_by_layer(family, tokens):
    with torch.inference_mode():
        expected = family.load_model().get_decoder()(torch.tensor([tokens]), output_hidden_states=True)
    decoder, cache = lean_decoder(family, taps=(2, 0))
    hidden, taps = run(decoder, cache, (tokens, 0, list(range(10))))
    assert torch.allclose(hidden, expected.last_hidden_state[0], atol=1e-4)
    assert torch.allclose(taps, torch.cat([expected.hidden_states[i + 1][0] for i in (2, 0)], dim=-1), atol=1e-4)


def test_rows_are_the_same_bit_for_bit_whether_features_are_made_of_them_or_not(family, tokens):
    decoder, cache = lean_decoder(family, taps=(0, 2))
    step = batch([(tokens, 0, list(range(10)))])
    hidden, _ = run(decoder, cache, (tokens, 0, list(range(10))))
    without = replace(step, feature_rows=np.zeros(0, np.int64))
    with torch.inference_mode():
        same, taps = decoder(without, PagedStep(without, cache, "cpu"))
    assert taps is None and torch.equal(same, hidden)


def test_layers_cut_for_sums_over_ranks_equal_whole_ones(family, tokens):
    whole, cut = (lean_decoder(family, tp_size, taps=(1,)) for tp_size in (1, 2))
    for entries in [((tokens[:30], 0, list(range(10))),), ((tokens[30:], 30, list(range(10))),)]:
        one, other = run(*whole, *entries), run(*cut, *entries)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


def test_biases_of_projections_are_added_once_whatever_the_number_of_ranks(tmp_path, tokens):
    target = resolve_target(str(save_tiny_target("llama", tmp_path, attention_bias=True)))
    with torch.inference_mode():
        expected = target.load_model().get_decoder()(torch.tensor([tokens])).last_hidden_state[0]
    for tp_size in (1, 2):
        assert torch.allclose(run(*lean_decoder(target, tp_size), (tokens, 0, list(range(10))))[0], expected, atol=1e-4)


@given(data=st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_is_the_same_bit_for_bit_in_any_cut_company_and_number_of_threads(lean, data):
    decoder, cache, expected = lean
    tokens, others = expected[0], list(range(20, 30))
    cuts = sorted(data.draw(st.sets(st.integers(1, 39), max_size=6)))
    rows, before = [], torch.get_num_threads()
    try:
        for begin, end in zip([0, *cuts], [*cuts, 40], strict=True):
            torch.set_num_threads(data.draw(st.integers(1, 4)))
            entry = (tokens[begin:end], begin, [9, 3, 80, 4, 11, 7, 55, 56, 1, 0])
            neighbour = (tokens[: data.draw(st.integers(1, 12))], 0, others)
            is_first = data.draw(st.booleans())
            got = run(decoder, cache, *([entry, neighbour] if is_first else [neighbour, entry]))
            own = slice(0, end - begin) if is_first else slice(len(neighbour[0]), None)
            rows.append([part[own] for part in got])
    finally:
        torch.set_num_threads(before)
    for part, want in zip(zip(*rows, strict=True), expected[1], strict=True):
        assert torch.equal(torch.cat(part), want)


@pytest.fixture(scope="module")
def lean(tmp_path_factory):
    target = resolve_target(str(save_tiny_target("qwen3", tmp_path_factory.mktemp("lean"))))
    decoder, cache = lean_decoder(target, taps=(1, 3))
    tokens = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    return decoder, cache, (tokens, run(decoder, cache, (tokens, 0, list(range(10)))))


@pytest.mark.parametrize("kind", ["llama", "cohere"])
def test_a_family_that_is_not_known_runs_as_transformers_has_it_and_says_so_once(process_group, tmp_path, caplog, kind):
    with caplog.at_level(logging.INFO):
        model = RankModel(resolve_target(str(save_tiny_target(kind, tmp_path))), CONFIG, 0, 1)
    said = [record.message for record in caplog.records if "run as transformers has them" in record.message]
    is_known = kind == "llama"
    assert isinstance(model._decoder, LeanDecoder) == is_known
    assert len(said) == (0 if is_known else 1)


def test_the_operators_pass_torchs_checks_and_refuse_steps_of_another_size(family, tokens):
    decoder, cache = lean_decoder(family)
    step = PagedStep(batch([(tokens[:5], 0, [3, 4])]), cache, "cpu")
    hidden, table = torch.randn(5, SHAPE["hidden_size"]), torch.ones(5, SHAPE["head_dim"])
    tensors = [table, table, step.slots, *step.tables]
    layer = decoder._layers[0]
    sizes, scalars = decoder._shape.arguments(PAGE)
    pages = (cache.keys[0], cache.values[0])
    calls = {
        "decoder_layers": (hidden, layer.weights, [pages[0]], [pages[1]], tensors, sizes, scalars, [0], [1]),
        "decoder_attention": (hidden, layer.weights, *pages, tensors, sizes, scalars, 0),
        "decoder_mlp": (hidden, layer.weights, sizes, scalars),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.dflash_ray, name).default, arguments)
    with pytest.raises(RuntimeError, match=r"cos and sin are contiguous \[4, 8\]"):
        ops.decoder_attention(hidden[:4].clone(), layer.weights, *pages, tensors, decoder._shape, PAGE, 0)


def test_a_cache_begins_as_zeros_and_takes_memory_only_where_it_is_written():
    cache = PagedCache([2, 2], 8, 1 << 16, PAGE, torch.bfloat16, "cpu")
    assert cache.keys[0].shape == (PAGE << 16, 2, 8) and cache.keys[0].dtype == torch.bfloat16
    assert not cache.values[1][np.arange(0, PAGE << 16, 4096)].any()
