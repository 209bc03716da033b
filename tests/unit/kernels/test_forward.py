"""The compiled operators of the forward pass equal plain torch, and no row depends on its neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_ray.kernels import build, ops, reference
from dflash_ray.models.packed_linear import PackedLinear

pytestmark = pytest.mark.skipif(
    not build.is_loaded_for("cpu"), reason="no C++ compiler: operators run in plain torch here"
)
PAGE_SIZE = 4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(0, 19), size=st.integers(1, 70))
@settings(deadline=None)
def test_rms_norm_equals_torch(rows, size):
    x, weight = normal(rows, size), normal(size, seed=1)
    assert torch.allclose(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), atol=1e-5)


@given(rows=st.integers(0, 20), inputs=st.integers(1, 80), outputs=st.integers(1, 100), has_bias=st.booleans())
@settings(deadline=None)
def test_a_packed_linear_layer_equals_torch_and_its_rows_are_independent(rows, inputs, outputs, has_bias):
    x, weight = normal(rows, inputs), normal(outputs, inputs, seed=1)
    bias = normal(outputs, seed=2) if has_bias else None
    layer = PackedLinear(weight, bias)
    out = layer(x)
    assert torch.allclose(out, torch.nn.functional.linear(x, weight, bias), atol=1e-4)
    assert all(torch.equal(out[i], layer(x[i : i + 1])[0]) for i in range(rows))


def test_a_packed_linear_layer_refuses_an_input_of_another_size():
    with pytest.raises(RuntimeError, match="x has 7 features, the weight 8"):
        PackedLinear(normal(5, 8))(normal(2, 7))


def step(entries: list[tuple[int, int]], heads: int, kv_heads: int, size: int) -> tuple:
    """Arguments of paged_attention up to the page size for entries (rows, context rows) on shuffled pages."""
    counts = [-(-(rows + context) // PAGE_SIZE) for rows, context in entries]
    pages = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(3))[: sum(counts)]
    slots, first = [], 0
    for (rows, context), count in zip(entries, counts, strict=True):
        slots += [
            int(pages[first + at // PAGE_SIZE]) * PAGE_SIZE + at % PAGE_SIZE for at in range(context, context + rows)
        ]
        first += count
    cache_rows = (sum(counts) + 2) * PAGE_SIZE
    lens, contexts = zip(*entries, strict=True)
    return (
        normal(len(slots), heads, size),
        normal(len(slots), kv_heads, size, seed=1),
        normal(len(slots), kv_heads, size, seed=2),
        normal(cache_rows, kv_heads, size, seed=4),
        normal(cache_rows, kv_heads, size, seed=5),
        *(torch.tensor(column) for column in (slots, lens, contexts, counts)),
        pages,
        PAGE_SIZE,
    )


@given(
    entries=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    size=st.sampled_from([1, 8, 20, 64, 128]),
    window=st.sampled_from([0, 1, 7, 1000]),
    softcap=st.sampled_from([0.0, 5.0]),
    is_causal=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_paged_attention_equals_torch(entries, kv_heads, group, size, window, softcap, is_causal):
    arguments = step(entries, kv_heads * group, kv_heads, size)
    copies = [each.clone() if isinstance(each, torch.Tensor) else each for each in arguments]
    got = ops.paged_attention(*arguments, scale=size**-0.5, window=window, softcap=softcap, is_causal=is_causal)
    want = reference.paged_attention(*copies, size**-0.5, window, softcap, is_causal)
    assert torch.allclose(got, want, atol=1e-5)
    assert all(torch.equal(arguments[cache], copies[cache]) for cache in (3, 4)), "the caches hold the new rows"


def test_without_a_compiler_the_operators_are_plain_torch_after_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(build.CACHE_ENV, str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    build._loaded_devices.cache_clear()
    try:
        x, weight = normal(2, 8), normal(8, seed=1)
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
        assert torch.equal(PackedLinear(normal(3, 8))(x), torch.nn.functional.linear(x, normal(3, 8)))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "no C++ compiler: install g++ or set CXX" in caplog.text
    finally:
        build._loaded_devices.cache_clear()
