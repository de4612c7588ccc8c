"""Weights that a parametrization computes when they are read: compiling reads none of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from lpcompile import lpcompile, report
from lpcompile.programs import program_of
from passes.ir.parser import parse_program
from passes.ir.printer import print_program

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(spectral_norm(nn.Linear(16, 16)), nn.ReLU()), (3, 16)),
    "conv": (lambda: nn.Sequential(spectral_norm(nn.Conv1d(4, 4, 3)), nn.BatchNorm1d(4)), (3, 4, 9)),
    "transposed": (lambda: nn.Sequential(spectral_norm(nn.ConvTranspose1d(4, 4, 3)), nn.ReLU()), (3, 4, 9)),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32), (3, 4, 16)),
}


class Counting(nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.num: Tensor
        self.register_buffer("num", torch.zeros(()))

    def forward(self, w: Tensor) -> Tensor:
        self.num += 1
        return w * 2


def _build(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    if name == "attention":
        spectral_norm(model.linear1)  # type: ignore[arg-type]
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d | nn.BatchNorm1d):
            register_parametrization(module, "bias", Counting(), unsafe=True)
    return model, torch.randn(shape)


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("has_examples", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_compiling_changes_no_state(name: str, has_examples: bool, mode: str) -> None:
    model, x = _build(name)
    model.train(mode == "train")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lpcompile(model, "hfp8", example_inputs=(x,) if has_examples else None, mode=mode)  # type: ignore[arg-type]
    report(model).to_text()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == []


@pytest.mark.parametrize("name", [name for name in MODELS if name != "attention"])
def test_the_bits_are_those_of_the_original(name: str) -> None:
    model, x = _build(name)
    original, _ = _build(name)
    lpcompile(model, "fp32-emulated", example_inputs=(x,))
    for _ in range(2):
        for each in (model, original):
            each.zero_grad()
        y, expected = model(x), original(x)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        for (key, ours), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), key  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_its_program_has_a_text(name: str) -> None:
    model, x = _build(name)
    program = program_of(model, "hfp8", (x,))
    text = print_program(program)
    assert print_program(parse_program(text, "text")) == text
