"""decompose-attention: bits of torch's math backend, near the fused kernels, and only where a rule names a product."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lpcompile import lpcompile, report
from lpcompile.api import run_state
from lpcompile.policy.resolve import Policy

_LENGTH, _KEYS = 9, 7


class Attend(nn.Module):
    """Attention with fixed options; options that are tensors come as an argument."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


def _inputs(heads: int = 4, keys: int = _KEYS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, _LENGTH, 16), (2, heads, keys, 16), (2, heads, keys, 8)]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _run(module: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor | None) -> list[Tensor]:
    """The output and the gradients of q, k, v and a float mask."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in (*inputs, *([] if mask is None else [mask]))]
    torch.manual_seed(3)
    y = module(*leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _boolean_mask() -> Tensor:
    mask = torch.rand(2, 1, _LENGTH, _KEYS, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[0, 0, 1] = False  # a query that sees no key
    return mask


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Tensor | None]] = {
    "plain": ({}, {}, None),
    "causal": ({"is_causal": True}, {}, None),
    "causal-square": ({"is_causal": True}, {"keys": _LENGTH}, None),
    "boolean-mask": ({}, {}, _boolean_mask()),
    "float-mask": ({}, {}, torch.randn(_LENGTH, _KEYS, generator=torch.Generator().manual_seed(4))),
    "scale": ({"scale": 0.3}, {}, None),
    "negative-scale": ({"scale": -0.3}, {}, None),
    "dropout": ({"dropout_p": 0.3}, {}, _boolean_mask()),
    "grouped-query": ({"enable_gqa": True}, {"heads": 2}, None),
    "bfloat16": ({}, {"dtype": torch.bfloat16}, None),
    "float16": ({"is_causal": True}, {"dtype": torch.float16}, None),
    "float64": ({}, {"dtype": torch.float64}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_bitwise_the_math_backend(case: str) -> None:
    options, shapes, mask = CASES[case]
    inputs = _inputs(**shapes)
    module = Attend(**options)
    with sdpa_kernel(SDPBackend.MATH):
        expected = _run(module, inputs, mask)
    example = inputs if mask is None else (*inputs, mask)
    lpcompile(module, "fp32-emulated", example, strict=True)
    found = _run(module, inputs, mask)
    assert run_state(module).gemm_calls == 2
    assert [a.dtype for a in found] == [a.dtype for a in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", ["plain", "causal-square", "boolean-mask", "float-mask"])
def test_near_the_fused_kernel(case: str) -> None:
    """The fused kernels sum in another order: a few ulp of fp32 on outputs and gradients of order 1."""
    options, shapes, mask = CASES[case]
    module = Attend(**options)
    inputs = _inputs(**shapes)
    expected = _run(module, inputs, mask)
    lpcompile(module, "fp32-emulated", inputs if mask is None else (*inputs, mask), strict=True)
    for found, wanted in zip(_run(module, inputs, mask), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("named", ["*.qk", "*.pv", "*"])
def test_a_rule_names_one_product_or_both(named: str) -> None:
    rule = {"match": {"name": named, "op": "matmul"}, "fwd": {"a": "e4m3", "b": "e4m3"}}
    module, inputs = Attend(), _inputs()
    exact = module(*inputs)
    lpcompile(module, Policy.model_validate({"version": 1, "name": "p", "rules": [rule]}), inputs, strict=True)
    y = module(*inputs)
    assert run_state(module).gemm_calls == (2 if named == "*" else 1)
    assert {row.name for row in report(module).gemms} == (
        {"sdpa_0.qk", "sdpa_0.pv"} if named == "*" else {f"sdpa_0{named[1:]}"}
    )
    assert not torch.equal(y, exact)
    torch.testing.assert_close(y, exact, rtol=0, atol=0.3)


def test_attention_that_no_rule_names_stays_fused() -> None:
    module, inputs = Attend(), _inputs()
    expected = module(*inputs)
    lpcompile(module, "hfp8", inputs)
    assert torch.equal(module(*inputs), expected)
    assert report(module).left_alone == ["sdpa_0.qk", "sdpa_0.pv"]
