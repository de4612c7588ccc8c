"""The self-test: kernels that are wrong on this machine decline, int8 of any shape and on CPUs without its units."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile
from runtime.kernels import self_test
from runtime.kernels.registry import Choice, choose, get_kernel, kernels
from runtime.kernels.request import GemmRequest
from runtime.numerics.formats import get_format
from runtime.numerics.grid import round_to_grid
from runtime.numerics.specs import AccumulateSpec, GemmSpec, QuantSpec
from tests.machine_facts import INT8_IS_EXACT

ROWS = "e4m3 nearest_even row/amax"
INT8 = GemmSpec(QuantSpec("int8"), QuantSpec("int8"), AccumulateSpec("int32"))


def test_every_kernel_that_accepts_here_is_right_here() -> None:
    for lhs, rhs, accumulate in (
        *(("e4m3", "e5m2", "fp32"), ("bf16", "bf16", "fp32"), ("fp16", "fp32", "fp32"), ("int8", "int8", "int32")),
        *(("int4", "uint8", "int32"), ("e4m3", "e4m3", "1-6-9/8"), ("e4m3", "e2m1", "1-6-9/8 stochastic")),
    ):
        spec = GemmSpec(QuantSpec(lhs), QuantSpec(rhs), AccumulateSpec.parse(accumulate))
        request = GemmRequest("linear", "fwd", spec)
        accepting = [kernel for kernel in kernels() if isinstance(kernel.consider(request), Choice)]
        assert accepting
        wrong = [kernel.name for kernel in accepting if self_test.fault_of(kernel, request)]
        assert wrong == (["int8"] if (lhs, rhs) == ("int8", "int8") and not INT8_IS_EXACT else [])


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda a, b: (a.int() @ b.int()).clamp(-(2**15), 2**15 - 1), r"M, K, N = .* is wrong: 32767, not"),
        (lambda a, b: a.int() @ b.int() + (a.shape[1] == 1), "M, K, N = 1, 1, 1 is wrong"),
    ],
)
def test_a_wrong_kernel_declines_and_the_next_serves(
    break_it: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    self_test._fault.cache_clear()
    monkeypatch.setattr(get_kernel("cpu_int8"), "consider", get_kernel("cuda_int8").consider)  # no device: declines
    monkeypatch.setattr(torch, "_int_mm", break_it)
    choice = choose(GemmRequest("linear", "fwd", INT8))
    self_test._fault.cache_clear()
    assert (choice.kernel, choice.fidelity) == ("exact_int", "bitwise")
    assert "int8 declined: on this machine its product of" in choice.reason


def test_a_process_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, request = get_kernel("exact_int"), GemmRequest("linear", "fwd", INT8)
    self_test.fault_of(kernel, request)
    monkeypatch.setattr(kernel, "multiply", None)
    assert self_test.fault_of(kernel, request) == ""


@pytest.mark.parametrize("name", ["int8", "cpu_int8", "exact_int"])
def test_int8_products_of_every_shape_and_layout(name: str) -> None:
    kernel = get_kernel(name)
    if not isinstance(kernel.consider(GemmRequest("linear", "fwd", INT8)), Choice):
        pytest.skip(f"{name} is not for this machine")
    if name == "int8" and not INT8_IS_EXACT:
        pytest.skip("torch's int8 product saturates here: no VNNI")
    generator = torch.Generator().manual_seed(0)
    for m, k, n in itertools.product((0, 1, 2, 8, 17), (0, 1, 2, 64, 65), (0, 1, 3, 8)):
        a, b = (torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator) for shape in ((m, k), (k, n)))
        for left, right in itertools.product((a, a.t().contiguous().t()), (b, b.t().contiguous().t())):
            got = kernel.multiply(kernel.load(left), kernel.load(right), INT8)
            assert torch.equal(got.double(), a.double() @ b.double()), (m, k, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "n", "batch"), [(1, 4, 8), (1, 1, 8), (4, 1, 1), (1, 4, 1)])
def test_int8_layers_with_sides_of_one(dtype: torch.dtype, k: int, n: int, batch: int) -> None:
    """Linear(1, 4) gave values like 116.6 for 0.02, and dw of Linear(K, 1) was 1e5 times too large."""
    torch.manual_seed(0)
    layer = nn.Linear(k, n).to(dtype)
    want = nn.Linear(k, n).to(dtype)
    want.load_state_dict(layer.state_dict())
    model, x = lpcompile(layer, "int8"), torch.randn(batch, k, dtype=dtype)
    results = []
    for each in (model, want):
        given = x.clone().requires_grad_()
        each.zero_grad()
        y = each(given)
        y.float().square().sum().backward()
        results.append((y, given.grad, each.weight.grad, each.bias.grad))
    for got, expected in zip(*results):
        assert (got - expected).abs().max() <= 0.05 * (1 + expected.abs().max())


@pytest.mark.parametrize(
    "isa", ["AVX2", "DEFAULT", *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("AVX512_CORE", "SSE41"))]
)
def test_a_cpu_without_int8_units_does_not_saturate(isa: str) -> None:
    """oneDNN's limit is read when torch is imported; the kernels of this package are left out, as on such a CPU."""
    code = (
        "import torch; from torch import nn; from lpcompile import lpcompile, report\n"
        "from runtime.kernels.cpu import gemm\n"
        "gemm.int8_library = lambda: None\n"
        "l = nn.Linear(64, 8, bias=False); nn.init.ones_(l.weight); m = lpcompile(l, 'int8')\n"
        "row = report(m).gemms[0]; value = m(torch.ones(1, 64))[0, 0].item()\n"
        "print(value, row.fidelity, 'int8 declined' in row.reason)"
    )
    limits = {} if isa == "DEFAULT" else {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **limits}, capture_output=True, text=True, check=True
    )
    value, fidelity, declined = done.stdout.split()
    assert abs(float(value) - 64) < 1e-4
    assert fidelity == "bitwise"
    assert isa == "DEFAULT" or declined == "True"


@pytest.mark.parametrize("num_k", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [
        ("fp16", "fp16"),
        ("e4m3", "e4m3"),
        ("fp32", "bf16"),
        (ROWS, ROWS),
    ],
)
def test_the_bound_counts_every_rounding(lhs: str, rhs: str, num_k: int) -> None:
    """0.999 units at K = 1 where 0 was claimed, 1.82 at K = 2, 1.96 at K = 1 for two scales."""
    spec = GemmSpec(QuantSpec.parse(lhs), QuantSpec.parse(rhs))
    request = GemmRequest("linear", "fwd", spec)
    generator = torch.Generator().manual_seed(num_k)

    def values(spec: QuantSpec) -> tuple[Tensor, Tensor]:
        x = torch.randn(2000, 1, num_k, generator=generator)
        s = torch.rand(2000, 1, 1, generator=generator) + 0.5 if spec.has_scale else torch.ones(2000, 1, 1)
        return round_to_grid(x, get_format(spec.format), "nearest_even"), s

    (a, s), (b, t) = values(spec.lhs), values(spec.rhs)
    y = (a @ b.transpose(1, 2)) * s * t
    exact = (a.double() * s.double()) @ (b.double() * t.double()).transpose(1, 2)
    size = (a.double() * s.double()).abs() @ (b.double() * t.double()).abs().transpose(1, 2)
    units = ((y - exact).abs() / size.clamp(min=1e-30)).max() * 2**24
    count = num_k - 1 + request.num_roundings
    assert units <= count * (1 + 1e-6)
    assert num_k > 1 or units >= 0.8 * count
    text = {0: "(K-1)", 1: "K", 2: "(K+1)", 3: "(K+2)"}[request.num_roundings]
    assert f"|error| <= {text} 2^-24 sum|a b|" in choose(request).reason
