"""The two identity policies change nothing: not outputs, gradients or buffers, in training and evaluation, and for a
batch of another size and length. torch's LSTM kernel alone is held to a bound and not to the bit.
"""

import copy

import pytest

from lpcompile import lpcompile
from tests.zoo.models import NAMES, ZOO, build, differences, run


@pytest.mark.parametrize("policy", ["fp32", "fp32-emulated"])
@pytest.mark.parametrize("name", NAMES)
def test_no_bit_changes(name: str, policy: str) -> None:
    entry, original = ZOO[name], build(name)
    model = lpcompile(copy.deepcopy(original), policy, example_kwargs=entry.batch(0))
    tolerance = entry.tolerance if policy == "fp32-emulated" else 0.0
    for training in (True, False, True):
        model.train(training), original.train(training)
        for seed in (0, 1):
            batch = entry.batch(seed)
            assert differences(run(model, batch), run(original, batch), tolerance) == []


def test_a_disturbed_weight_is_seen() -> None:
    """The comparison can fail."""
    original = build("llama")
    model = lpcompile(copy.deepcopy(original), "fp32-emulated", example_kwargs=ZOO["llama"].batch(0))
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 2**-10
    batch = ZOO["llama"].batch(0)
    assert {"logits", "loss"} <= set(differences(run(model, batch), run(original, batch)))
