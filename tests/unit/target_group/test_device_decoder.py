"""Layers of nine operators, as devices other than the CPU run them: those of transformers in value."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dflash_ray.kernels import build, layer_ops
from dflash_ray.kernels.attention import PagedAttention, StepTables
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.target_group.attention import PagedStep
from dflash_ray.target_group.device_decoder import DeviceDecoder
from dflash_ray.target_group.paged_cache import PagedCache
from tests.tiny import SHAPE, save_tiny_target
from tests.unit.kernels.libraries import load_emulated
from tests.unit.target_group.test_lean_decoder import LEAN
from tests.unit.target_group.test_model import PAGE, batch

LAYERS = SHAPE["num_hidden_layers"]
PAGES = list(range(10))
TOKENS = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=LEAN)
def family(request, tmp_path_factory):
    return resolve_target(str(save_tiny_target(request.param, tmp_path_factory.mktemp(f"device-{request.param}"))))


def run(decoder: DeviceDecoder, cache: PagedCache, tokens: list[int], start: int):
    step = batch([(tokens, start, PAGES)])
    with torch.inference_mode():
        return decoder(step, PagedStep(step, cache, "cpu"))


def made(target, taps: tuple[int, ...] = ()) -> tuple[DeviceDecoder, PagedCache]:
    cache = PagedCache([3] * LAYERS, 8, 512, PAGE, torch.float32, "cpu")
    return DeviceDecoder(target.load_model().get_decoder(), "cpu", taps), cache


def test_a_device_decoder_equals_transformers_layer_by_layer_in_any_cut(family):
    with torch.inference_mode():
        expected = family.load_model().get_decoder()(torch.tensor([TOKENS]), output_hidden_states=True)
    decoder, cache = made(family, taps=(LAYERS - 1, 0) if LAYERS > 1 else (0,))
    parts = [run(decoder, cache, TOKENS[begin:end], begin) for begin, end in ((0, 17), (17, 18), (18, 40))]
    hidden, taps = (torch.cat(rows) for rows in zip(*parts, strict=True))
    assert torch.allclose(hidden, expected.last_hidden_state[0], atol=1e-4)
    assert torch.allclose(taps[:, -SHAPE["hidden_size"] :], expected.hidden_states[1][0], atol=1e-4)


def test_taps_are_layers_outputs_in_the_order_asked_for(family):
    with torch.inference_mode():
        expected = family.load_model().get_decoder()(torch.tensor([TOKENS]), output_hidden_states=True)
    _, taps = run(*made(family, taps=(2, 0)), TOKENS, 0)
    assert torch.allclose(taps, torch.cat([expected.hidden_states[i + 1][0] for i in (2, 0)], dim=-1), atol=1e-4)


class _Count(TorchDispatchMode):
    """Operators that compute; views are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)
        if not is_view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not build.is_loaded_for("cpu"), reason="no compiler: the kernels cannot be emulated here")
def test_a_layer_is_nine_operators(tmp_path, monkeypatch):
    load_emulated()
    monkeypatch.setattr(layer_ops, "_operators", torch.ops.dflash_ray_emulated)
    monkeypatch.setattr(layer_ops, "_is_compiled_for", lambda rows: True)
    decoder, cache = made(resolve_target(str(save_tiny_target("qwen3", tmp_path))))
    run(decoder, cache, TOKENS[:9], 0)
    step = batch([(TOKENS[9:12], 9, PAGES)])
    paged = PagedStep(step, cache, "cpu")
    expected = run(decoder, cache, TOKENS[9:12], 9)[0]
    tables = StepTables(*(table.numpy() for table in paged.tables))
    operator = torch.ops.dflash_ray_emulated.attend_pages
    paged.attention = PagedAttention.of_step(tables, paged.slots, PAGE, operator)
    count = _Count()
    with torch.inference_mode(), count:
        hidden, _ = decoder(step, paged)
    assert torch.allclose(hidden, expected, atol=1e-4)
    first = count.names.index("dflash_ray_emulated::add_norm")
    layers = count.names[first:-1]
    assert len(layers) == 9 * LAYERS and layers.count("dflash_ray_emulated::attend_pages") == LAYERS, layers[:12]
