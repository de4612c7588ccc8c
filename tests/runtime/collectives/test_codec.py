"""The wire format: error bounds, specials, ragged ends, against numpy in float64 and ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch

from runtime.collectives.codec import BlockCodec, PlainCodec, WireSpec
from runtime.errors import WireError

FORMATS = ["e4m3", "e5m2", "fp8-152", "hfp8-143", "int8", "e4m3-fnuz"]
HALF_ULP = {"e4m3": 2.0**-4, "e5m2": 2.0**-3, "fp8-152": 2.0**-3, "hfp8-143": 2.0**-4, "e4m3-fnuz": 2.0**-4}


def through(x: torch.Tensor, codec: BlockCodec) -> torch.Tensor:
    return codec.decode(codec.encode(x), x.numel())


def spread(numel: int, seed: int = 0) -> torch.Tensor:
    """Values over several binades."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator).exp()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 5003])
def test_error_is_at_most_half_an_ulp_of_the_format(format: str, numel: int) -> None:
    spec = BlockCodec(format)
    x = spread(numel)
    y = through(x, spec)
    assert y.shape == x.shape
    padded = torch.nn.functional.pad(x, (0, -numel % 256)).view(-1, 256).double()
    amax = padded.abs().amax(1, keepdim=True).expand_as(padded).flatten()[:numel]
    steps = {"e4m3": 2.0**-9 / 448, "hfp8-143": 2.0**-13 / 30, "int8": 1 / 127, "e4m3-fnuz": 2.0**-10 / 240}
    step_at_bottom = steps.get(format, 2.0**-16 / 57344)
    bound = torch.maximum(x.abs().double() * HALF_ULP.get(format, 0.0), amax * step_at_bottom / 2)
    assert ((y.double() - x.double()).abs() <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize(("format", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)])
def test_bytes_are_codes_then_scales(format: str, dtype: type) -> None:
    x = spread(600)
    buffer = BlockCodec(format).encode(x).numpy()
    blocks = [x.numpy()[start : start + 256] for start in (0, 256, 512)]
    scales = np.array([np.abs(block).max() / np.float32(ml_dtypes.finfo(dtype).max) for block in blocks], np.float32)
    assert buffer.size == 600 + 3 * 4
    np.testing.assert_array_equal(buffer[600:].view(np.float32), scales)
    codes = np.concatenate([(block / scale).astype(dtype) for block, scale in zip(blocks, scales)])
    np.testing.assert_array_equal(buffer[:600], codes.view(np.uint8))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_a_special_spoils_its_own_block_only(format: str, special: float) -> None:
    x = spread(1000)
    clean = through(x, BlockCodec(format))
    x[300] = special
    y = through(x, BlockCodec(format))
    assert not y[256:512].isfinite().any()
    assert torch.equal(y[:256], clean[:256])
    assert torch.equal(y[512:], clean[512:])


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_every_code_decodes_as_ml_dtypes_says(format: str) -> None:
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[format]
    codes = np.arange(256, dtype=np.uint8)
    buffer = torch.cat([torch.from_numpy(codes), torch.ones(1).view(torch.uint8)])
    np.testing.assert_array_equal(BlockCodec(format).decode(buffer, 256).numpy(), codes.view(dtype).astype(np.float32))


def test_zeros_have_scale_one_and_stay_zero() -> None:
    buffer = BlockCodec().encode(torch.zeros(512))
    assert torch.equal(buffer[512:].view(torch.float32), torch.ones(2))
    assert torch.equal(through(torch.zeros(512), BlockCodec()), torch.zeros(512))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 3e38])
def test_extreme_magnitudes_stay_finite(magnitude: float) -> None:
    x = torch.tensor([magnitude, -magnitude, 0.0, magnitude / 2])
    y = through(x, BlockCodec())
    assert y.isfinite().all()
    assert (y - x).abs().max() <= max(magnitude / 16, 2.0**-126 * 2**-9)


def test_blocks_have_scales_of_their_own() -> None:
    x = torch.cat([torch.full((256,), 1e6), torch.full((256,), 1e-6)])
    torch.testing.assert_close(through(x, BlockCodec()), x, rtol=1e-6, atol=0)


def test_nbytes_counts_a_scale_for_the_ragged_block() -> None:
    assert [BlockCodec().nbytes(numel) for numel in (0, 1, 256, 257)] == [0, 5, 260, 265]


@pytest.mark.parametrize("format", ["bf16", "e2m1", "int4"])
def test_refuses_formats_that_are_not_8_bits(format: str) -> None:
    with pytest.raises(WireError, match="8 bits"):
        WireSpec(format)


@pytest.mark.parametrize("format", ["uint8", "e8m0"])
def test_refuses_formats_without_negative_values(format: str) -> None:
    with pytest.raises(WireError, match="no negative values"):
        WireSpec(format)


def test_refuses_an_empty_block() -> None:
    with pytest.raises(WireError, match="block"):
        WireSpec(block=0)


def test_refuses_what_is_not_flat_floats() -> None:
    for x in (torch.zeros(4, 4), torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.complex64)):
        with pytest.raises(WireError, match="flat"):
            BlockCodec().encode(x)


def test_strided_values_are_written_as_they_stand() -> None:
    x = spread(4000)[::2]
    assert torch.equal(BlockCodec().encode(x), BlockCodec().encode(x.contiguous()))
    assert torch.equal(PlainCodec(torch.float32).decode(PlainCodec(torch.float32).encode(x), 2000), x)


def test_plain_bytes_come_back_as_they_were() -> None:
    x = torch.tensor([1.0, -0.0, float("nan"), float("inf"), 3e-40])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codec = PlainCodec(dtype)
        assert torch.equal(codec.decode(codec.encode(x), 5).nan_to_num(7.0), x.to(dtype).float().nan_to_num(7.0))
        assert codec.nbytes(5) == 5 * dtype.itemsize == codec.encode(x).numel()
    with pytest.raises(WireError, match="not a packed buffer"):
        PlainCodec(torch.float32).decode(torch.zeros(5, dtype=torch.uint8), 1)


def test_refuses_a_buffer_of_another_length() -> None:
    with pytest.raises(WireError, match="not a packed buffer"):
        BlockCodec().decode(BlockCodec().encode(torch.zeros(300)), 301)


def test_one_dimensional_and_tiny_gradients_do_not_compress() -> None:
    spec = WireSpec(min_numel=1024)
    assert spec.compresses((32, 32))
    assert not spec.compresses((31, 33))
    assert not spec.compresses((100000,))
    assert not spec.compresses(())
    assert spec.codec((32, 32), torch.bfloat16) == BlockCodec("e4m3", 256)
    assert spec.codec((32,), torch.bfloat16) == PlainCodec(torch.bfloat16)
