"""Models: from a config alone, the same bits on every rank, no dropout."""

import pytest
import torch

from launch.training.config import RunConfig
from launch.training.models.build import build_model


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


def test_dtype_is_that_of_the_parameters() -> None:
    model = build_model(RunConfig(layers=1, width=16, heads=2, context=8, dtype="bf16"), vocab=256)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
