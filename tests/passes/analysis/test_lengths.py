"""sum_lengths against the sizes of the GEMMs that torch's own convolution and matmul gradients are."""

import pytest
import torch
from torch import nn

from lpcompile.programs import program_of
from passes.analysis.lengths import sum_lengths

POLICY = "version: 1\nrules: [{fwd: {x: e4m3, w: e4m3}}]\n"


def _lengths(model: nn.Module, *inputs: torch.Tensor, tmp_path) -> dict:  # type: ignore[no-untyped-def, type-arg]
    (tmp_path / "p.yaml").write_text(POLICY)
    return sum_lengths(program_of(model, tmp_path / "p.yaml", inputs or None))


def test_linear_layers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))
    assert _lengths(model, torch.randn(2, 5, 12), tmp_path=tmp_path) == {
        "0": {"fwd": 12, "bwd": 7, "grad": 10},
        "2": {"fwd": 7, "bwd": 3, "grad": 10},
    }
    without_example = _lengths(model, tmp_path=tmp_path)
    assert without_example["0"] == {"fwd": 12, "bwd": 7}


CONVS = [
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2)),
    nn.Conv1d(4, 8, 5, padding=2),
    nn.Conv2d(4, 6, 1, bias=False),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_convolutions_by_the_gradients_of_ones(conv: nn.Module, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """With all values 1, a result away from the border is the number of products that it adds up."""
    shape = (3, 4, 11, 9) if isinstance(conv, nn.Conv2d) else (3, 4, 20)
    x = torch.ones(shape, requires_grad=True)
    for parameter in conv.parameters():
        nn.init.ones_(parameter)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    y = conv(x)
    y.sum().backward()
    lengths = _lengths(nn.Sequential(conv), torch.ones(shape), tmp_path=tmp_path)["0"]
    strided = any(s > 1 for s in conv.stride)
    assert lengths["fwd"] == y.max()
    assert lengths["bwd"] >= x.grad.max() if strided else lengths["bwd"] == x.grad.max()
    assert lengths["grad"] == y.numel() // y.shape[1]
    assert lengths["grad"] >= conv.weight.grad.max()


def test_a_transposed_convolution(tmp_path) -> None:  # type: ignore[no-untyped-def]
    graph_conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, groups=2))
    lengths = _lengths(graph_conv, torch.randn(2, 3, 5, 5), tmp_path=tmp_path)
    assert lengths["0"] == {"fwd": 3, "bwd": 4, "grad": 50}


class _Attention(nn.Module):
    def forward(self, q, k, v):  # type: ignore[no-untyped-def]
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v + nn.functional.scaled_dot_product_attention(q, k, v)


def test_products_of_activations(tmp_path) -> None:  # type: ignore[no-untyped-def]
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    lengths = _lengths(_Attention(), q, k, v, tmp_path=tmp_path)
    qk, pv = {"fwd": 8, "bwd": 9, "grad": 5}, {"fwd": 9, "bwd": 8, "grad": 5}
    assert lengths == {"matmul_0": qk, "matmul_1": pv, "sdpa_0.qk": qk, "sdpa_0.pv": pv}
