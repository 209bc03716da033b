"""Muon: orthogonal updates for matrices, AdamW for the rest, and checkpoints that hold the state of both."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dflash_ray.models.dflash import ContextProjector, DflashNetwork
from dflash_ray.models.drafter_config import parse_dflash_config
from dflash_ray.training.config import FitSection
from dflash_ray.training.fit import fit
from dflash_ray.training.optimizers import build_optimizers, orthogonalised
from tests.drafter.published import DFLASH2
from tests.training.conftest import recipe, share


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_an_update_has_singular_values_near_one_and_the_gradients_directions(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    update = orthogonalised(1e-4 * gradient)
    brought = torch.diagonal(left.T @ update @ right.T)
    torch.testing.assert_close(left @ torch.diag(brought) @ right, update, rtol=1e-3, atol=1e-3)
    assert bool(((brought > 0.6) & (brought < 1.3))[values > 0.05 * values[0]].all())


def test_it_takes_the_steps_that_torchs_muon_takes():
    gradients = [torch.randn(24, 64, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    ours, theirs = nn.Parameter(torch.ones(24, 64)), nn.Parameter(torch.ones(24, 64))
    section = FitSection(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
    optimizer = build_optimizers(section, {"weight": ours})[0]
    reference = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
    # torch iterates in bfloat16 on momentum that it has scaled otherwise.
    torch.testing.assert_close(ours - 1, theirs - 1, rtol=0.1, atol=2e-3)


def test_matrices_are_muons_and_norms_kernels_and_codebooks_are_adamws():
    config = parse_dflash_config(DFLASH2["causal everywhere"], "test")
    parameters = {**dict(ContextProjector(config).named_parameters()), **dict(DflashNetwork(config).named_parameters())}
    muon, adamw = (
        {name for name, p in parameters.items() if any(p is q for g in one.param_groups for q in g["params"])}
        for one in build_optimizers(FitSection(), parameters)
    )
    assert muon | adamw == parameters.keys() and not muon & adamw
    assert {"fc.weight", "layers.0.mlp.up_proj.weight", "candidate_selector.hidden_projection.weight"} <= muon
    codebooks = {f"candidate_selector.{name}_codebook" for name in ("predecessor", "successor")}
    assert codebooks | {"norm.weight", "layers.0.mlp_conv.base_kernel"} <= adamw
    assert len(build_optimizers(FitSection(optimizer="adamw"), parameters)) == 1


def test_a_run_in_two_parts_ends_with_the_weights_of_a_whole_one(pipeline, target_dir, tmp_path):
    uninterrupted, _, _ = pipeline
    states = []
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        share(uninterrupted, recipe(target_dir, tmp_path / name), "shards")
        for last in parts:
            settings = {"optimizer": "muon", "max_steps": last, "learning_rate": 1e-3, "warmup_steps": 100}
            config = recipe(target_dir, tmp_path / name, fit=settings)
            fit(config)
        states.append(load_file(config.fit_dir / "state.safetensors"))
    assert states[0].keys() == states[1].keys()
    assert {name.split(".")[0] for name in states[0]} == {"step", "model", "averaged", "muon", "adamw"}
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)
