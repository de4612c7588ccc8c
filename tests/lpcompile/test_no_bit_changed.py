"""fp32-emulated changes no bit: fused attention stays torch's own, in training and in the graph of inference."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile
from tests.models_for_tests import build

ATTENTION = ["gpt2-eager", "gpt2-sdpa", "llama-eager", "llama-sdpa"]


def _trained(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)  # dropout
    output = model(**batch)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **gradients}


@pytest.mark.parametrize("name", ATTENTION)
def test_training(name: str) -> None:
    example = build(name)
    wanted = _trained(copy.deepcopy(example.model), example.batch)
    found = _trained(lpcompile(example.model, "fp32-emulated", example_kwargs=example.batch), example.batch)
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.parametrize("name", ATTENTION)
def test_inference(name: str) -> None:
    example = build(name)
    model, original = example.model.eval(), copy.deepcopy(example.model).eval()
    lpcompile(model, "fp32-emulated", example_kwargs=example.batch, mode="infer")
    with torch.no_grad():
        assert torch.equal(model(**example.batch).logits, original(**example.batch).logits)


def test_taken_apart_the_bits_are_others() -> None:
    """What the tests above would see: products of attention run one by one are not the fused ones."""
    example = build("llama-sdpa")
    wanted = _trained(copy.deepcopy(example.model), example.batch)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = _trained(copy.deepcopy(example.model), example.batch)
    assert not all(torch.equal(found[key], wanted[key]) for key in wanted)
