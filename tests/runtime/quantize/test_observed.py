"""Scales that follow from earlier steps against their rules by hand: delayed scaling, GradScale, casts that look."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from runtime.errors import FormatError, ScaleError, ScaleWarning
from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cast.observed import to_grid_observed
from runtime.kernels.cast.scales import compute_scale
from runtime.numerics.quantizer_specs import DelayedSpec, GradScaleSpec, QuantizerSpec
from runtime.numerics.specs import QuantSpec
from runtime.quantize.kinds import make_quantizer
from runtime.quantize.observed.end_step import end_step
from runtime.quantize.observed.quantizer import Observed
from runtime.quantize.storage import storage_dtype

RATIO = 8 / 448


def _make(text: str, owner: str = "fc.dy") -> Observed:
    quantizer = make_quantizer(QuantSpec.parse(text), owner, is_weight=False)
    assert isinstance(quantizer, Observed)
    return quantizer


def _steps(quantizer: Observed, *amaxes: float) -> float:
    """The scale after steps that saw these."""
    for amax in amaxes:
        quantizer.note(torch.tensor(amax), torch.tensor(amax))
        end_step({"fc.dy": quantizer}, strict=True)
    return float(quantizer.in_force)


@pytest.mark.parametrize(
    ("text", "inverse"), [("e4m3 nearest_even delayed", 56), ("e5m2 nearest_even delayed[history=3]", 7168)]
)
def test_a_history_of_2_8_4_gives_the_scale_of_the_reference(text: str, inverse: int) -> None:
    quantizer = _make(text)
    _steps(quantizer, 2.0, 8.0, 4.0)
    assert float(quantizer.in_force) == torch.tensor(1 / inverse, dtype=torch.float64).float().item()
    assert quantizer.amax_history[:3].tolist() == [4.0, 8.0, 2.0]


def test_a_new_outlier_saturates_at_the_old_scale() -> None:
    quantizer = _make("e4m3 nearest_even delayed")
    _steps(quantizer, 2.0, 8.0, 4.0)
    x = torch.tensor([1.0, 10.0, -10.0])
    grid, amax = to_grid_observed(x, quantizer.spec, quantizer.scale(x), torch.bfloat16)
    assert grid.tolist() == [56.0, 448.0, -448.0]
    assert (grid.float() * quantizer.scale(x)).tolist() == [1.0, 8.0, -8.0]
    assert float(amax) == 10.0


@pytest.mark.parametrize(
    ("options", "amaxes", "wanted"),
    [
        ("", (8.0, 0.0), 8.0),
        ("[history=1]", (8.0, 0.0), 8.0),  # amax 0: the old scale
        ("[history=2]", (8.0, 4.0, 2.0), 4.0),
        ("[history=2]", (8.0, 4.0), 8.0),
        ("[algorithm=most_recent]", (8.0, 2.0), 2.0),
        ("[algorithm=most_recent]", (8.0, 2.0, 0.0), 2.0),
        ("[margin=2]", (8.0,), 32.0),
        ("", (8.0, math.inf), 8.0),
        ("", (8.0, math.nan, 4.0), 8.0),
        ("[algorithm=most_recent]", (8.0, math.nan), 8.0),
        ("", (math.inf,), 0.0),  # nothing was seen
        ("", (0.0,), 0.0),
        ("", (2.0**-140,), 448 * 2.0**-126),  # no smaller scale than fp32's normal numbers
    ],
)
def test_the_scale_after_some_steps(options: str, amaxes: tuple[float, ...], wanted: float) -> None:
    scale = _steps(_make(f"e4m3 nearest_even delayed{options}"), *amaxes)
    assert scale == torch.tensor(float(Fraction(wanted) / 448), dtype=torch.float64).float().item()


def test_steps_that_saw_nothing_finite_are_no_part_of_a_history() -> None:
    quantizer = _make("e4m3 nearest_even delayed[history=2]")
    _steps(quantizer, 8.0, math.inf)
    end_step({"fc.dy": quantizer}, strict=True)  # not reached
    assert quantizer.amax_history.tolist() == [8.0, 0.0]


def test_until_a_step_was_seen_the_scale_is_that_of_the_tensor() -> None:
    quantizer, x = _make("e4m3 nearest_even delayed[margin=1]"), torch.randn(7, 9) * 0.005
    assert quantizer.is_waiting
    current = compute_scale(x, QuantSpec.parse("e4m3 nearest_even tensor/amax"))
    assert current is not None
    assert torch.equal(quantizer.scale(x), 2 * current)
    quantizer.note(x, x.abs().max())
    assert torch.equal(quantizer.scale(3 * x), 2 * (3 * x).abs().max() / 448)
    _steps(quantizer, 0.01)
    assert not quantizer.is_waiting
    assert torch.equal(quantizer.scale(x), quantizer.scale(100 * x))


def test_a_scale_that_was_given_out_is_not_written_into() -> None:
    quantizer = _make("e4m3 nearest_even delayed[history=1]")
    _steps(quantizer, 8.0)
    given = quantizer.scale(torch.ones(2))
    _steps(quantizer, 2.0)
    assert float(given) == pytest.approx(RATIO)
    assert float(quantizer.scale(torch.ones(2))) == pytest.approx(2 / 448)


def test_a_model_in_bf16_leaves_the_state_in_fp32() -> None:
    quantizer = _make("e4m3 nearest_even delayed")
    before = _steps(quantizer, 2.7182817)
    quantizer.bfloat16()
    assert {each.dtype for each in quantizer.buffers()} == {torch.float32}
    assert float(quantizer.in_force) == before
    quantizer.double()
    assert float(quantizer.in_force) == before
    meta = _make("e4m3 nearest_even delayed").to("meta")
    assert meta.scale(torch.empty(3, device="meta")).is_meta
    meta.to_empty(device="cpu").reset_parameters()  # type: ignore[operator]
    assert _steps(meta, 8.0) == pytest.approx(RATIO)


def test_the_state_of_another_recipe_is_a_sentence() -> None:
    state = _make("e4m3 nearest_even delayed[history=16]").state_dict()
    with pytest.raises(
        RuntimeError, match=r"amax_history: the state of another recipe. Expected \(1024,\).*Got \(16,\)"
    ):
        _make("e4m3 nearest_even delayed").load_state_dict(state)


def test_equal_scales_of_one_spec_make_one_cast_and_others_another() -> None:
    one, other = _make("e4m3 nearest_even delayed", "q.x"), _make("e4m3 nearest_even delayed", "k.x")
    _steps(one, 8.0)
    _steps(other, 8.0)
    assert one.key == other.key
    _steps(other, 16.0)
    assert one.key != other.key
    before = one.key
    _steps(one, 16.0)
    assert one.key != before
    assert one.key == other.key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["e4m3", "e5m2", "int8", "int4", "fp4-radix4", "fp16", "nf4", "dlfloat16"])
def test_one_pass_has_the_bits_of_two(format: str, dtype: torch.dtype) -> None:
    spec = QuantSpec.parse(f"{format} {QuantSpec.parse(format).rounding} delayed")
    generator = torch.Generator().manual_seed(0)
    for x in (
        torch.randn(33, 257, generator=generator),
        torch.randn(257, 33, generator=generator).t(),
        torch.randn(1, generator=generator),
        torch.empty(0, 5),
        torch.tensor([1.0, math.inf, -3.0]),
        torch.tensor([1.0, math.nan, math.inf]),
    ):
        values, scale = x.to(dtype), torch.tensor(0.013)
        grid, amax = to_grid_observed(values, spec, scale, storage_dtype(format))
        wanted = fast_to_grid(values, spec, scale, dtype=storage_dtype(format))
        assert grid.dtype == wanted.dtype
        torch.testing.assert_close(grid, wanted, rtol=0, atol=0, equal_nan=True)
        largest = values.abs().max().float() if values.numel() else torch.zeros(())
        torch.testing.assert_close(amax, largest, rtol=0, atol=0, equal_nan=True)


def test_stochastic_rounding_draws_what_a_cast_without_a_look_draws() -> None:
    spec, x = QuantSpec.parse("fp4-luq stochastic delayed"), torch.randn(100, 100)
    draw = {"seed": 3, "step": 2, "stream": 77}
    grid, _ = to_grid_observed(x, spec, torch.tensor(0.1), storage_dtype("fp4-luq"), **draw)
    assert torch.equal(grid, fast_to_grid(x, spec, torch.tensor(0.1), dtype=storage_dtype("fp4-luq"), **draw))


def _grad_scale(rule: str, format: str = "fp4-radix4") -> Observed:
    return _make(f"{format} nearest_away grad-scale[rule={rule}]")


def test_max_align_halves_above_the_top_and_doubles_below_half_of_it() -> None:
    quantizer = _grad_scale("max-align")
    s = [1 / _steps(quantizer, amax) for amax in (3.0, 3.0, 5.0, 5.0, 1.0, 1.0, 4.0, 0.0)]
    # begins as exact does: 16 * 3 = 48; 5 saturates at 16; 8 * 5 = 40 stays; 8 and 16 lie below 32; 32 * 4 saturates
    assert s == [16, 16, 8, 8, 16, 32, 16, 16]


def test_exact_is_the_power_of_two_of_the_present_gradient() -> None:
    quantizer = _grad_scale("exact")
    for scale in (1.0, 1e-6, 300.0):
        x = torch.randn(50) * scale
        amax = float(x.abs().max())
        assert 1 / float(quantizer.scale(x)) == 2.0 ** math.floor(math.log2(64 / amax))
        assert torch.equal(
            quantizer.scale(x), compute_scale(x, QuantSpec.parse("fp4-radix4 nearest_away tensor/pow2")) or Tensor()
        )
        _steps(quantizer, amax)
        assert not quantizer.is_waiting


def test_dalle_grows_by_a_thousandth_backs_off_by_a_root_and_not_twice_within_125_steps() -> None:
    quantizer = _grad_scale("dalle")
    tiny, huge = torch.full((10,), 1e-5), torch.full((10,), 1.0)

    def step(x: Tensor) -> float:
        quantizer.note(x, x.abs().max())
        end_step({"fc.dy": quantizer}, strict=False)
        return float(quantizer.exponent)

    assert 1 / float(quantizer.scale(tiny)) == 2.0**13
    assert step(tiny) == pytest.approx(13.001)
    assert step(tiny) == pytest.approx(13.002)
    assert step(huge) == pytest.approx(12.502)  # 2^13 * 1 > 64
    assert 1 / float(quantizer.scale(tiny)) == 2.0**12
    for _ in range(125):
        assert step(huge) == pytest.approx(12.502)
    assert step(huge) == pytest.approx(12.002)


@pytest.mark.parametrize(("rule", "x", "end"), [("max-align", 2.0**-140, 126), ("dalle", 1e30, 7)])
def test_a_grad_scale_that_diverges_is_told_once_by_layer_and_role(rule: str, x: float, end: int) -> None:
    quantizer = make_quantizer(QuantSpec.parse(f"fp4-radix4 nearest_away grad-scale[rule={rule}]"), "h.0.fc.dy", False)
    assert isinstance(quantizer, Observed)
    told = []
    for _ in range(125 * 14):
        quantizer.note(torch.tensor([x]), torch.tensor(x))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda text, *_, **__: told.append(text))
            end_step({"h.0.fc.dy": quantizer}, strict=False)
        if told:
            break
    assert len(told) == 1
    assert "h.0.fc bwd" in told[0]
    assert f"2^{end}" in told[0]
    quantizer.note(torch.tensor([x]), torch.tensor(x))
    end_step({"h.0.fc.dy": quantizer}, strict=True)  # told already


def test_under_strict_it_is_an_error() -> None:
    quantizer = _grad_scale("max-align")
    quantizer.note(torch.tensor(2.0**-140), torch.tensor(2.0**-140))
    with pytest.raises(ScaleError, match="fc bwd: its scale would be"):
        end_step({"fc.dy": quantizer}, strict=True)
    other = _grad_scale("max-align")
    other.note(torch.tensor(2.0**-140), torch.tensor(2.0**-140))
    with pytest.warns(ScaleWarning, match="a GradScale diverges"):
        end_step({"fc.dy": other}, strict=False)


@pytest.mark.parametrize(
    "text",
    ["delayed", "delayed[history=16,algorithm=most_recent,margin=1,per_rank=true]", "grad-scale",
     "grad-scale[rule=dalle,per_rank=true]", "pact[init=2.0]", "lsq"],
)  # fmt: skip
def test_a_quantizer_prints_what_it_parses(text: str) -> None:
    spec = QuantizerSpec.parse(text)
    assert str(spec) == text
    format = "int4" if spec.learns else "e4m3"
    assert QuantSpec.parse(f"{format} nearest_even {text}").quantizer == spec


def test_what_is_no_quantizer_is_refused() -> None:
    for text in (
        "delayed[history=0]",
        "delayed[histor=3]",
        "delayed[history=x]",
        "delayed[per_rank=1]",
        "grad-scale[a]",
    ):
        with pytest.raises(FormatError):
            QuantizerSpec.parse(text)
    for make in (lambda: DelayedSpec(margin=-1), lambda: GradScaleSpec("b"), lambda: DelayedSpec(algorithm="min")):  # type: ignore[arg-type]
        with pytest.raises(FormatError):
            make()
    with pytest.raises(FormatError, match="makes its own scales"):
        QuantSpec.parse("mxfp8 nearest_even").__class__("mxfp8", quantizer=DelayedSpec())
