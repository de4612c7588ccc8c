"""AdamW: torch's bits where nothing is rounded, exact masters in 4 bytes, bf16 weights without a master that learn."""

import pytest
import torch
from torch import nn

from runtime.numerics.random import random_bits
from runtime.optim.adamw import LowPrecisionAdamW
from runtime.optim.formats import UpdateFormats, joined, of_pairs, split
from runtime.optim.rounding import KEY


@pytest.fixture
def exact_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor.sqrt rounded correctly; MKL's, which torch has on many CPUs, is off by an ulp for one value in 160."""
    sqrt = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: sqrt(x.double()).to(x.dtype))


@pytest.mark.usefixtures("exact_sqrt")
@pytest.mark.parametrize(
    "numbers",
    [{}, {"weight_decay": 0.0}, {"betas": (0.3, 0.99)}, {"lr": 0.1, "eps": 1e-3, "betas": (0.0, 0.0)}],
)
@pytest.mark.parametrize("shape", [(37, 5), (), (1,), (4096,)])
def test_fp32_gives_the_bits_of_torch(numbers: dict[str, float], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    optimizers = LowPrecisionAdamW([ours], **numbers), torch.optim.AdamW([theirs], **numbers)  # type: ignore[arg-type]
    for step in range(12):
        ours.grad = torch.randn(shape) * 10.0 ** (step - 9)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(optimizers[0].state[ours][name], optimizers[1].state[theirs][name])


@pytest.mark.usefixtures("exact_sqrt")
def test_bf16_and_16_bits_are_an_fp32_master() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(129, 7).bfloat16())
    theirs = nn.Parameter(ours.detach().float())
    optimizer, reference = LowPrecisionAdamW([ours], formats=UpdateFormats("bf16+16")), torch.optim.AdamW([theirs])
    for _ in range(50):
        ours.grad = torch.randn(129, 7).bfloat16()
        theirs.grad = ours.grad.float()
        optimizer.step()
        reference.step()
    remainder = optimizer.state[ours]["remainder"]
    assert torch.equal(joined(ours.detach(), of_pairs(remainder).view(ours.shape)), theirs)
    assert (ours.detach().float() - theirs.detach()).abs().max() <= theirs.detach().abs().max() * 2.0**-8
    assert ours.nbytes + remainder.nbytes == 4 * ours.numel()


def test_torchs_own_square_root_moves_little() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(4096))
    theirs = nn.Parameter(ours.detach().clone())
    optimizers = LowPrecisionAdamW([ours]), torch.optim.AdamW([theirs])
    for _ in range(10):
        ours.grad = torch.randn(4096)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours != theirs).float().mean() < 0.01
    assert (ours - theirs).abs().max() < 1e-6


def test_splitting_loses_nothing() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    edges = [0, -(2**31), 0x7F7FFFFF, 0x7F800000, -0x00800000, 0x00008000, 0x00007FFF, 0x3F808000, 0x3F818000, 1]
    values = torch.cat([bits, torch.tensor(edges, dtype=torch.int32)]).view(torch.float32)
    high, low = split(values)
    back, is_nan = joined(high, low), values.isnan()
    assert torch.equal(back[~is_nan].view(torch.int32), values[~is_nan].view(torch.int32))
    assert back[is_nan].isnan().all()
    assert high[is_nan].isnan().all()
    is_tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[~is_nan & ~is_tie], values.bfloat16()[~is_nan & ~is_tie])
    assert split(torch.tensor([1 + 2.0**-8]))[0].item() == 1 + 2.0**-7


def test_stochastic_bf16_weights_follow_where_nearest_ones_stand_still() -> None:
    """Updates of 1e-4 below half an ulp of 1, 2^-9: on average 1e-4 a step."""
    ends = {}
    for rounding in ("nearest_even", "stochastic"):
        w = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        formats = UpdateFormats("bf16", rounding=rounding)  # type: ignore[arg-type]
        optimizer = LowPrecisionAdamW([w], lr=1e-4, weight_decay=0.0, formats=formats)
        for _ in range(100):
            w.grad = -torch.ones(4096, dtype=torch.bfloat16)
            optimizer.step()
        assert set(optimizer.state[w]) == {"step", "exp_avg", "exp_avg_sq"}
        ends[rounding] = w.detach().float().mean().item()
    assert ends["nearest_even"] == 1
    assert abs(ends["stochastic"] - 1.01) < 1e-3


@pytest.mark.usefixtures("exact_sqrt")
def test_stochastic_bits_are_those_of_seed_step_parameter_and_place() -> None:
    """bits(w) + the upper half of the word, cut: rounding a bf16 by chance, written without the casts."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(size).bfloat16()) for size in (5, 33)]
    masters = [nn.Parameter(weight.detach().float()) for weight in weights]
    gradients = [torch.randn(weight.shape).bfloat16() for weight in weights]
    ours = LowPrecisionAdamW(weights, formats=UpdateFormats("bf16", rounding="stochastic"), seed=11)
    theirs = torch.optim.AdamW(masters)
    for weight, master, gradient in zip(weights, masters, gradients):
        weight.grad, master.grad = gradient, gradient.float()
    ours.step()
    theirs.step()
    for first, weight, master in zip((0, 5), weights, masters):
        words = random_bits(weight.numel(), seed=11 ^ KEY, step=1, stream=2, offset=first)
        bits = (master.detach().view(torch.int32) + (words >> 16).int()) & -65536
        assert torch.equal(weight.detach().float().view(torch.int32), bits)


@pytest.mark.parametrize(
    "formats", [("fp32", "bf16", "bf16"), ("dlfloat16", "dlfloat16", "fp32"), ("fp32", "e4m3", "bf16")]
)
def test_narrow_states_stay_near(formats: tuple[str, str, str]) -> None:
    """A weight that falls to 0.5 by its own gradient ends where fp32 does."""
    ends = []
    for given in (("fp32", "fp32", "fp32"), formats):
        w = nn.Parameter(torch.linspace(-1, 1, 64))
        optimizer = LowPrecisionAdamW([w], lr=0.05, formats=UpdateFormats(*given, rounding="stochastic"))
        for _ in range(200):
            w.grad = w.detach() - 0.5
            optimizer.step()
        ends.append(w.detach())
    assert (ends[0] - ends[1]).abs().max() < 0.1
    assert not torch.equal(*ends)
