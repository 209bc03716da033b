"""Every rank's part of the head together is what the model itself makes of a hidden state."""

import pytest
import torch
from transformers import LlamaForCausalLM

from dflash_ray.target_group.head import VocabParallelHead
from tests.tiny import CONFIGS, SHAPE


class Louder(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.1
        return output


@pytest.mark.parametrize("tp_size", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_and_a_split_vocabulary_are_honoured(tp_size, dtype):
    model = LlamaForCausalLM(CONFIGS["llama"](tie_word_embeddings=False)).to(dtype)
    model.lm_head = torch.nn.Linear(48, 96, bias=True, dtype=dtype)
    hidden = torch.randn(3, 48).to(dtype)
    heads = [VocabParallelHead(model, rank, tp_size, "cpu") for rank in range(tp_size)]
    assert [head.vocab_start for head in heads] == [
        rank * -(-SHAPE["vocab_size"] // tp_size) for rank in range(tp_size)
    ]
    got = torch.cat([head(hidden) for head in heads], dim=-1)
    assert torch.allclose(got, model.lm_head(hidden), atol=1e-4 if dtype == torch.float32 else 2e-2)


def test_a_model_that_makes_its_logits_in_a_way_of_its_own_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model\.path: Louder makes its logits in a way of its own"):
        VocabParallelHead(Louder(CONFIGS["llama"]()), 0, 1, "cpu")


def test_the_check_leaves_the_model_as_it_was():
    model = LlamaForCausalLM(CONFIGS["llama"]()).eval()
    tokens = torch.tensor([[1, 2, 3]])
    before = model(tokens).logits
    VocabParallelHead(model, 0, 1, "cpu")
    assert torch.equal(model(tokens).logits, before)
