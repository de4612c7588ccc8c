"""fp32-emulated changes no bit: fused attention stays torch's own, in training and in the graph of inference."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile, report
from lpcompile.api import run_state
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


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("is_masked", [False, True])
def test_torchs_layers_whose_attention_is_fused(kind: type[nn.Module], is_masked: bool) -> None:
    torch.manual_seed(0)
    layer, x = kind(32, 4, 64, dropout=0.0, batch_first=True), torch.randn(2, 9, 32)
    inputs = (x,) if kind is nn.TransformerEncoderLayer else (x, 2 * x)
    mask = nn.Transformer.generate_square_subsequent_mask(9) if is_masked else None
    call = {"src_mask" if kind is nn.TransformerEncoderLayer else "tgt_mask": mask}
    compiled = lpcompile(copy.deepcopy(layer), "fp32-emulated", strict=True)
    for each in (layer, compiled):
        each(*inputs, **call).square().sum().backward()
    assert torch.equal(compiled(*inputs, **call), layer(*inputs, **call))
    for found, wanted in zip(compiled.parameters(), layer.parameters(), strict=True):
        assert found.grad is not None
        assert torch.equal(found.grad, wanted.grad)  # type: ignore[arg-type]
    calls = run_state(compiled).calls
    assert all(calls.as_said(row.name, "fwd") == calls.seen(row.name, "fwd") >= 2 for row in report(compiled).gemms)
