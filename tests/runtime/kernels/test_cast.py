"""Cast kernels: the C++ loop against the oracle, bit for bit, and the way back to torch when there is no compiler."""

import itertools
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from runtime.kernels.cast import grid as cast
from runtime.kernels.cast import public
from runtime.kernels.cast.grid import fast_to_grid, fast_to_grid_checked
from runtime.kernels.cast_plans import cast_plan, table_plan
from runtime.kernels.cpu import build
from runtime.kernels.cpu.cast_library import cast_library
from runtime.numerics import quantize, random
from runtime.numerics.casts import to_grid
from runtime.numerics.formats import FORMATS
from runtime.numerics.scaling import compute_scale
from runtime.numerics.specs import ROUNDINGS, QuantSpec, Rounding, ScaleSpec
from tests.machine_facts import needs_kernels

WRITTEN = ["1-6-9", "1-5-2:subnormals=no", "1-3-0:top=none", "1-2-3:bias=-3,top=nan", "1-8-22", "1-8-23:subnormals=no"]
NAMES = [*FORMATS, *WRITTEN, "int5", "int8:range=full", "uint8:zero=64", "pow2:bits=6,max=0", "dlfloat16:e0=zero"]
DECLINED = {"e8m0"}
ROOT = Path(__file__).parents[3]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal patterns, any NaN equal to any NaN."""
    both_nan = a.isnan() & b.isnan()
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool(((a.view(torch.int32) == b.view(torch.int32)) | both_nan).all())
    )


def hard_values(name: str) -> Tensor:
    """Special values; the edges of the format with their fp32 neighbours; random patterns; random numbers in range."""
    row = FORMATS.get(name) or cast.get_format(name)
    edges = [
        0.0,
        1.0,
        1.5,
        2.5,
        row.tiny,
        row.tiny / 2,
        row.tiny * 1.5,
        row.max,
        2.0**-126,
        2.0**-149,
        2.0**22 + 0.5,
        2.0**23,
    ]
    edges += [row.max * f for f in (1 - 2.0**-9, 1 + 2.0**-20, 1.03125, 1.0625, 1.125, 1.25)]
    edges += [getattr(row, "min_normal", 1.0) * f for f in (0.5, 1, 2)]
    at = torch.tensor(edges, dtype=torch.float64).float().clamp(max=3.4028234663852886e38)
    at = torch.cat(
        [at, at.nextafter(torch.tensor(math.inf)), at.nextafter(torch.tensor(0.0)), torch.tensor([math.inf, math.nan])]
    )
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(2**31), 2**31, (3000,), generator=generator).to(torch.int32).view(torch.float32)
    spread = (
        torch.rand(3000, generator=generator)
        * row.tiny
        * torch.exp2(torch.randint(-3, 30, (3000,), generator=generator).float())
    )
    return torch.cat([at, -at, patterns, spread, -spread])


@pytest.mark.parametrize(("text", "dtype"), [("int8", torch.int8), ("e4m3", torch.bfloat16), ("bf16", torch.bfloat16)])
def test_without_the_kernel_signs_and_what_is_said_are_the_same(
    text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own conversion to bfloat16 makes negative NaNs on CPUs with a unit for it."""
    monkeypatch.setattr(cast, "_is_served", lambda *_: False)
    x = torch.tensor([1.0, -2.0, 0.0, -0.0, math.inf, math.nan] * 8)
    call = (x, None, QuantSpec(text).text, dtype, 0, 0, 0, 0)
    grid, said = torch.ops.lp.to_grid_checked(*call)
    assert (grid.dtype, said.dtype) == (dtype, torch.uint8)
    assert int(said) == cast.SAID_OVERFLOW | (cast.SAID_NARROW if dtype == torch.int8 else 0)
    assert dtype == torch.int8 or torch.equal(grid.signbit(), x.signbit())
    assert torch.equal(torch.ops.lp.to_grid(*call).signbit(), grid.signbit())


def test_without_the_kernel_codes_are_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the fake kernel says, whatever the strides of what they are made of."""
    for name in ("can_encode", "can_decode"):
        monkeypatch.setattr(public, name, lambda *_: False)
    x = torch.randn(4, 3).t()
    codes = torch.ops.lp.encode(x, None, "e4m3", None, 0, 0, 0, 0, "saturate")
    assert codes.stride() == (4, 1)
    assert torch.ops.lp.decode(codes.t(), "e4m3").stride() == (3, 1)


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_oracle_in_every_mode_and_dtype(name: str) -> None:
    for mode, dtype in itertools.product(ROUNDINGS, (torch.float32, torch.bfloat16, torch.float16)):
        spec = QuantSpec(name, mode, None if name != "fp32" else ScaleSpec())
        x = hard_values(name).to(dtype)
        scale = None if name != "fp32" else torch.tensor(0.7)
        if mode == "toward_zero" and name == "int1":
            continue
        assert (cast_plan(name, mode) is None and table_plan(name, mode) is None) == (name in DECLINED)
        got = fast_to_grid(x, spec, scale, seed=5, step=2, stream=7, offset=13)
        assert same_bits(got, to_grid(x, spec, scale, seed=5, step=2, stream=7, offset=13)), (mode, dtype)


@needs_kernels
@pytest.mark.parametrize(
    "draw",
    [
        {"seed": -3, "step": 5, "stream": 2**40 + 1, "offset": 4 * 2**32 - 7},
        {"seed": 2**63 + 9, "step": 2**32 - 1, "stream": 0, "offset": 1},
    ],
)
def test_the_kernel_draws_the_words_of_random_bits(draw: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, spec = torch.full((9001,), 2.0**-20), QuantSpec("int8", "stochastic")  # of few words 1, so that each is seen
    x[::2] = 0.5
    got = fast_to_grid(x, spec, None, **draw)
    monkeypatch.setattr(random, "_PIECE", 256)
    assert same_bits(got, to_grid(x, spec, None, **draw))
    assert 0.24 < got.mean() < 0.26


@needs_kernels
@pytest.mark.parametrize("name", ["e4m3", "dlfloat16", "int8", "fp32"])
@pytest.mark.parametrize(
    "scale", ["tensor/amax", "row/pow2", "column/amax", "block[3,16]/amax", "block[128,128]/pow2", "block[5,1]/amax"]
)
def test_equals_the_oracle_with_every_scale(name: str, scale: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for shape, mode in itertools.product(
        [(3, 43, 129), (300, 200), (1, 5000), (5000, 1), (17,), ()], ("nearest_even", "stochastic")
    ):
        x = torch.randn(shape, generator=generator) * 100
        spec = QuantSpec(name, mode, ScaleSpec.parse(scale))
        s = compute_scale(x, spec)
        assert same_bits(fast_to_grid(x, spec, s, seed=1), to_grid(x, spec, s, seed=1)), (shape, mode)


@needs_kernels
def test_the_number_of_threads_changes_nothing() -> None:
    x = torch.randn(301, 1001, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    for text in ("e4m3 stochastic row/amax", "e4m3 nearest_even column/amax", "e4m3 nearest_even block[64,32]/amax"):
        spec, results = QuantSpec.parse(text), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scale = compute_scale(x, spec)
            assert scale is not None
            results.append((scale, fast_to_grid(x, spec, scale, seed=3)))
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))


@pytest.mark.parametrize("use_kernel", [True, False])
def test_checked_tells_what_rounded_beyond_the_largest_value(use_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not use_kernel:
        monkeypatch.setattr(cast, "cast_library", lambda: None)
    spec = QuantSpec("e4m3")
    beyond = {448.0: False, 464.0: False, 464.1: True, -1e9: True, math.inf: True, math.nan: True, 0.0: False}
    for value, expected in beyond.items():
        x = torch.full((100,), 0.5)
        x[77] = value
        got, flag = fast_to_grid_checked(x, spec, None)
        assert bool(flag) == expected, value
        assert same_bits(got, to_grid(x, spec, None))
    assert not fast_to_grid_checked(torch.tensor([127.4]), QuantSpec("int8"), None)[1]
    assert fast_to_grid_checked(torch.tensor([127.6]), QuantSpec("int8"), None)[1]
    for seed in range(50):  # amax / scale is max (1 +- 2^-23): no overflow
        x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        scaled = QuantSpec("e4m3", scale=ScaleSpec())
        assert not fast_to_grid_checked(x, scaled, compute_scale(x, scaled))[1]


def test_identity_returns_its_argument_and_checks_it() -> None:
    x = torch.ones(3, dtype=torch.bfloat16)
    assert fast_to_grid(x, QuantSpec(), None) is x
    assert fast_to_grid_checked(x, QuantSpec(), None) == (x, False)
    assert fast_to_grid_checked(torch.tensor([1.0, math.nan]), QuantSpec(), None)[1]
    assert fast_to_grid_checked(torch.tensor([1.0, -math.inf]), QuantSpec(), None)[1]
    assert not fast_to_grid_checked(torch.empty(0), QuantSpec(), None)[1]


def test_strided_tensors_draw_in_c_order() -> None:
    x = torch.randn(60, 80, generator=torch.Generator().manual_seed(4))
    for view in (x.t(), x[:, ::2], x[3:7].expand(4, 80), x[0, 0].expand(5, 6)):
        for text in ("e4m3 nearest_even row/amax", "e4m3 stochastic column/amax"):
            spec = QuantSpec.parse(text)
            scale = compute_scale(view, spec)
            assert scale is not None
            assert torch.equal(scale, compute_scale(view.contiguous(), spec) + 0)  # type: ignore[operator]
            assert same_bits(fast_to_grid(view, spec, scale).contiguous(), to_grid(view, spec, scale).contiguous())


def test_what_the_kernel_declines_takes_the_oracle() -> None:
    x, spec = torch.randn(6, 8, generator=torch.Generator().manual_seed(4)), QuantSpec("e4m3")
    assert fast_to_grid(x.double(), spec, None).dtype == torch.float64
    assert fast_to_grid(torch.empty(0, 4), spec, None).shape == (0, 4)
    assert cast_plan("1-8-7:bias=130", "nearest_even") is None  # normals below 2^-126
    wild = QuantSpec("1-8-7:bias=130")
    assert same_bits(fast_to_grid(x, wild, None), to_grid(x, wild, None))
    assert not fast_to_grid(x.requires_grad_(), spec, None).requires_grad
    assert fast_to_grid(x.to("meta"), QuantSpec("e4m3", "stochastic"), None).shape == x.shape


@needs_kernels
def test_fake_tensors_get_shapes() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 6, dtype=torch.bfloat16)
        for text in ("e4m3 nearest_even row/amax", "e4m3 stochastic block[2,4]/pow2"):
            spec = QuantSpec.parse(text)
            out = fast_to_grid(x, spec, compute_scale(x, spec))
            assert (out.shape, out.dtype) == (x.shape, torch.float32)


def test_without_a_compiler_it_says_so_once_and_the_bits_are_equal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(5))
    spec = QuantSpec.parse("e4m3 stochastic row/amax")
    expected = fast_to_grid(x, spec, compute_scale(x, spec), seed=9)
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    build.load_library.cache_clear()
    cast_library.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                assert same_bits(fast_to_grid(x, spec, compute_scale(x, spec), seed=9), expected)
        assert [str(one.message).count("no C++ compiler: looked for g++") for one in said] == [1]
    finally:
        build.load_library.cache_clear()
        cast_library.cache_clear()


@needs_kernels
def test_two_processes_that_build_at_once_both_get_the_library(tmp_path: Path) -> None:
    code = (
        "import torch; from runtime.kernels.cast.grid import fast_to_grid;"
        "from runtime.numerics.specs import QuantSpec;"
        "print(fast_to_grid(torch.tensor([0.3]), QuantSpec('e4m3'), None).item())"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", code]
    both = [subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["0.3125", "0.3125"]
    assert len(list((tmp_path / "lpcompile").glob("*.so"))) == 1


@needs_kernels
def test_nothing_is_built_by_importing() -> None:
    code = (
        "import runtime.kernels.cast.grid, runtime.numerics; from runtime.kernels.cpu.build import load_library;"
        "print(load_library.cache_info().misses)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "0"


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("fp4-radix4", [159.0, -64.0], [161.0]),
        ("nf4", [1.0, -1.1], [1.2]),
        ("uint8", [0.0, 255.4], [-3.0]),
        ("int8:range=full", [-128.0, 127.0], [128.0]),
        ("e4m3-fnuz", [240.0, -247.0], [250.0]),
    ],
)
def test_checked_knows_the_range_of_every_kind_of_format(name: str, inside: list[float], outside: list[float]) -> None:
    spec = QuantSpec(name)
    assert not fast_to_grid_checked(torch.tensor(inside), spec, None)[1]
    assert fast_to_grid_checked(torch.tensor(outside), spec, None)[1]


def test_every_rounding_of_every_row_has_a_plan_but_of_the_256_powers_of_two() -> None:
    modes: tuple[Rounding, ...] = ROUNDINGS
    pairs = {(name, mode) for name in FORMATS for mode in modes}
    served = {pair for pair in pairs if cast_plan(*pair) or table_plan(*pair)}
    assert pairs - served == {("e8m0", mode) for mode in modes} | {("int1", "toward_zero")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("e5m2", torch.bfloat16), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("mxfp8", torch.bfloat16)],
)
def test_a_nan_of_any_payload_stays_one(name: str, dtype: torch.dtype) -> None:
    """A payload in the low 16 bits alone would be cut to Inf."""
    payloads = torch.tensor([1 << bit for bit in range(23)] + [0x7FFFFF, 0x0FFFF], dtype=torch.int32)
    x = torch.cat([payloads | 0x7F800000, payloads | -0x800000]).view(torch.float32)
    assert bool(x.isnan().all())
    assert bool(fast_to_grid(x, QuantSpec.parse(name), None, dtype=dtype).isnan().all())


def casts_of_every_loop() -> list[Tensor]:
    """A cast through each loop of cast.cpp, for the test below and the process that it starts."""
    x = torch.cat([hard_values("e4m3"), hard_values("dlfloat16")])[:12000]
    block, places = x.view(100, 120), itertools.product(("mxfp8", "nvfp4"), ROUNDINGS)
    names = ("e4m3", "1-6-9", "dlfloat16", "bf16", "nf4", "int8", "fp4-radix4")
    scalars = [quantize(x, name, mode, seed=3, offset=5) for name in names for mode in ROUNDINGS]
    return scalars + [
        fast_to_grid(block, QuantSpec(name, mode, along=along), None, seed=3, offset=offset)
        for (name, mode), along, offset in itertools.product(places, ("row", "column"), (5, 8))
    ]


@needs_kernels
def test_a_cpu_without_vectors_gets_the_same_bits(tmp_path: Path) -> None:
    """The portable path: the same file compiled for what the compiler takes for a default, plain x86-64 say."""
    code = (
        "import sys, torch; from runtime.kernels.cpu import build;"
        "build.FLAGS = tuple(flag for flag in build.FLAGS if flag != '-march=native');"
        "from tests.runtime.kernels.test_cast import casts_of_every_loop as casts; torch.save(casts(), sys.argv[1])"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    saved = tmp_path / "plain.pt"
    command = [sys.executable, "-W", "error", "-c", code, str(saved)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=300)
    assert len(list((tmp_path / "lpcompile").glob("cast-*.so"))) == 1
    plain, expected = torch.load(saved), casts_of_every_loop()
    assert len(plain) == len(expected) == 60
    assert all(map(same_bits, plain, expected))


def test_a_machine_without_a_compiler_serves_everything_and_says_once_per_file_what_is_missing(tmp_path: Path) -> None:
    """A process whose PATH has no compiler and whose cache is empty."""
    code = (
        "import sys, torch, warnings\n"
        "from runtime import gemm\n"
        "from runtime.numerics import quantize\n"
        "x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    results = [quantize(x, n, 'stochastic', seed=1) for n in ('e4m3', 'nf4', 'mxfp8') for _ in range(2)]\n"
        "    for name in ('1-6-9/16', '1-6-9/16 rounded', 'fp32'):\n"
        "        results.append(gemm(x, x.T, a_format='e4m3', b_format='e5m2', accumulate=name))\n"
        "torch.save((results, [str(one.message) for one in said]), sys.argv[1])\n"
    )
    outcomes = []
    for number, path in enumerate((os.environ["PATH"], str(tmp_path))):
        saved = tmp_path / f"{number}.pt"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        environment |= {"XDG_CACHE_HOME": str(tmp_path)} if number else {}
        subprocess.run([sys.executable, "-c", code, str(saved)], env=environment, cwd=ROOT, check=True, timeout=300)
        outcomes.append(torch.load(saved))
    (with_kernels, _), (without, said) = outcomes
    assert all(map(same_bits, with_kernels, without))
    assert len(said) == len({one.partition(":")[0] for one in said}) == 4  # cast.cpp, grid.cpp and both of accumulate
    for one in said:
        assert "no C++ compiler: looked for g++, c++, clang++" in one
        assert "the pure-torch path serves, with equal bits and slower" in one
        assert "Install g++" in one
