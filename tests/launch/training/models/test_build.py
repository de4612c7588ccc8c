"""Models: from a config alone, the same bits on every rank, no dropout."""

import pytest
import torch
from torch import nn

from launch.training.config import RunConfig
from launch.training.models.build import build_model
from launch.training.models.registry import MODELS

IMAGES = {"classes": 10, "channels": 1, "size": 8}


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_same_seed_same_weights_and_logits_of_the_right_shape(family: str) -> None:
    config = RunConfig(model=family, layers=1, width=32, heads=2, context=16)
    model, twin = build_model(config, vocab=256), build_model(config, vocab=256)
    x_BT = torch.randint(0, 256, (2, 16))
    logits_BTV = model(input_ids=x_BT).logits
    assert logits_BTV.shape == (2, 16, 256)
    assert torch.equal(logits_BTV, twin(input_ids=x_BT).logits), "train mode: no dropout anywhere"
    other = build_model(config.model_copy(update={"seed": 1}), vocab=256)
    assert not torch.equal(logits_BTV, other(input_ids=x_BT).logits)


@pytest.mark.parametrize("family", ["resnet", "mobilenet"])
@pytest.mark.parametrize(("size", "layers"), [(8, 1), (8, 3), (28, 5), (96, 4)])
def test_a_classifier_takes_pictures_of_any_size(family: str, size: int, layers: int) -> None:
    config = RunConfig(model=family, layers=layers, width=8)
    model, twin = (build_model(config, classes=7, channels=3, size=size) for _ in range(2))
    x_BCHW = torch.randn(2, 3, size, size)
    logits_BK = model(pixel_values=x_BCHW).logits
    assert logits_BK.shape == (2, 7)
    assert torch.equal(logits_BK, twin(pixel_values=x_BCHW).logits)
    assert len(model.blocks) == layers  # type: ignore[arg-type]
    logits_BK.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stages_halve_the_picture_and_double_the_channels() -> None:
    model = build_model(RunConfig(model="resnet", layers=3, width=8), **IMAGES)
    shapes = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    model(pixel_values=torch.randn(2, 1, 8, 8))
    assert shapes == [(2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)]


def test_a_resnet_block_is_written_out() -> None:
    """The first block, against its formula: relu(bn(conv(relu(bn(conv(x))))) + x)."""
    model = build_model(RunConfig(model="resnet", layers=1, width=8), **IMAGES)
    block, x = model.blocks[0], torch.randn(4, 8, 8, 8)  # type: ignore[index]

    def norm(y: torch.Tensor) -> torch.Tensor:
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
        return (y - mean) / (var + 1e-5).sqrt()

    weights = [each.weight for each in block.modules() if isinstance(each, nn.Conv2d)]
    inner = norm(nn.functional.conv2d(x, weights[0], padding=1)).relu()
    expected = (norm(nn.functional.conv2d(inner, weights[1], padding=1)) + x).relu()
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_the_mobilenet_has_depthwise_convolutions_and_stays_linear_after_the_last() -> None:
    model = build_model(RunConfig(model="mobilenet", layers=3, width=8), **IMAGES)
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    depthwise = [each for each in convolutions if each.groups > 1]
    assert len(depthwise) == 3
    assert all(each.groups == each.in_channels == each.out_channels for each in depthwise)
    block, x = model.blocks[0], torch.randn(4, 8, 8, 8)  # type: ignore[index]
    assert (block(x) - x).amin() < 0, "no relu on the way back"


@pytest.mark.parametrize("family", list(MODELS))
def test_dtype_is_that_of_the_parameters(family: str) -> None:
    config = RunConfig(model=family, layers=1, width=16, heads=2, context=8, dtype="bf16", engine="ddp")
    sizes = IMAGES if MODELS[family].reads == "images" else {"vocab": 256}
    model = build_model(config, **sizes)
    norms = {
        name for path, each in model.named_modules() if isinstance(each, nn.BatchNorm2d)
        for name in (f"{path}.weight", f"{path}.bias", f"{path}.running_mean", f"{path}.running_var")
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if name in norms else torch.bfloat16), name
