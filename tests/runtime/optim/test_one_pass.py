"""One pass of C++ against torch's operations: every bit of weights and states; special values and odd sizes too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.kernels.cpu import update
from runtime.optim import one_pass
from runtime.optim.adamw import LowPrecisionAdamW
from runtime.optim.formats import UpdateFormats
from runtime.optim.sgd import LowPrecisionSGD

CASES: list[tuple[torch.dtype, UpdateFormats]] = [
    (torch.float32, UpdateFormats()),
    (torch.bfloat16, UpdateFormats("bf16+16")),
    (torch.bfloat16, UpdateFormats("bf16+16", "bf16", "bf16", "stochastic")),
    (torch.bfloat16, UpdateFormats("bf16", "fp32", "fp32", "stochastic")),
    (torch.bfloat16, UpdateFormats("bf16", "bf16", "bf16", "nearest_even")),
    (torch.float32, UpdateFormats("dlfloat16", "dlfloat16", "dlfloat16", "stochastic")),
    (torch.float32, UpdateFormats("1-6-9", "1-6-9", "1-6-9", "nearest_away")),
    (torch.float32, UpdateFormats("bf16", "e5m2", "e4m3", "stochastic")),
    (torch.bfloat16, UpdateFormats("1-5-2", "e4m3", "1-5-10", "toward_zero")),
]
BLOCKS: list[tuple[torch.dtype, UpdateFormats]] = [
    (torch.float32, UpdateFormats("fp32", "e4m3/128", "fp16")),
    (torch.float32, UpdateFormats("fp32", "e4m3/128", "e5m2/64", "stochastic")),
    (torch.bfloat16, UpdateFormats("bf16+16", "dynamic8/256", "dynamic8/256")),
    (torch.bfloat16, UpdateFormats("bf16", "dynamic4/128", "dynamic4/128", "stochastic")),
]


def _run(kind: Any, dtype: torch.dtype, formats: UpdateFormats, **numbers: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 1711), (1,), (17,))]
    optimizer = kind(weights, lr=0.01, formats=formats, seed=5, **numbers)
    for step in range(4):
        for weight in weights:
            gradient = torch.randn(weight.shape, generator=generator) * 10.0 ** torch.randint(
                -12, 3, weight.shape, generator=generator
            )
            if step == 3 and weight.numel() > 17:
                gradient.view(-1)[:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
            weight.grad = gradient.to(dtype)
        optimizer.step()
    kept = [value for weight in weights for value in optimizer.state[weight].values()]
    return [*(weight.detach() for weight in weights), *kept]


RULES: list[tuple[Any, dict[str, Any]]] = [
    (LowPrecisionAdamW, {"loss_scale": 8.0}),
    (LowPrecisionAdamW, {"betas": (0.2, 0.5), "weight_decay": 0.0}),
    (LowPrecisionSGD, {"weight_decay": 0.1, "loss_scale": 1024.0}),
    (LowPrecisionSGD, {"momentum": 0.0}),
]
CHOICES = [(*case, *rule) for rule in RULES for case in CASES] + [
    (*case, *rule) for rule in RULES[:2] for case in BLOCKS
]


@pytest.mark.parametrize(("dtype", "formats", "kind", "numbers"), CHOICES, ids=str)
def test_the_bits_are_those_of_torchs_operations(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, formats: UpdateFormats, kind: Any, numbers: dict[str, Any]
) -> None:
    if update.update_library() is None:
        pytest.skip("no compiler: torch's operations serve")
    calls = []
    name = "adamw" if kind is LowPrecisionAdamW else "sgd"
    counted = getattr(update, name)
    monkeypatch.setattr(update, name, lambda *given: (calls.append(1), counted(*given)))
    fast = _run(kind, dtype, formats, **numbers)
    assert len(calls) >= 12
    monkeypatch.setattr(one_pass.update, "update_library", lambda: None)
    plain = _run(kind, dtype, formats, **numbers)
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.dtype == theirs.dtype
        same = (ours == theirs) | (ours.isnan() & theirs.isnan()) if ours.is_floating_point() else ours == theirs
        assert same.all(), (ours[~same][:4], theirs[~same][:4])


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "num_threads", lambda count: 3)
    many = _run(LowPrecisionAdamW, *CASES[2])
    monkeypatch.setattr(update, "num_threads", lambda count: 1)
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(many, _run(LowPrecisionAdamW, *CASES[2])))


def test_autograd_sees_that_a_weight_was_written() -> None:
    weight = nn.Parameter(torch.ones(5))
    optimizer = LowPrecisionAdamW([weight])
    weight.grad = torch.ones(5)
    optimizer.step()
    loss = (weight * weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_not_served_takes_torchs_operations() -> None:
    fp16 = nn.Parameter(torch.ones(5, dtype=torch.float16))
    transposed = nn.Parameter(torch.ones(2, 3).t())
    with_master = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = LowPrecisionAdamW([fp16, transposed, with_master], lr=0.1)
    for weight in (fp16, transposed, with_master):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all((weight < 0.95).all() for weight in (fp16, transposed, with_master))
