"""capture_more: kinds of call that a compiled model was not shown run as compiled once it is shown them."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile import advance, capture_more, lpcompile, report
from lpcompile.api import CountMicroBatches, WatchWeights, run_state
from lpcompile.capture.calls import MAX_VARIANTS
from lpcompile.compiled import get_compiled
from lpcompile.errors import LpError
from lpcompile.frontends.install import CapturedForward, captured
from lpcompile.programs import install_text
from passes.ir.printer import print_program
from tests.models_for_tests import tiny_llama, token_batch
from tests.zoo.models import ZOO, build, differences, run

Call = dict[str, Any]


def counts(model: nn.Module) -> tuple[int, int]:
    """(hits, misses) of every captured module."""
    found = [r for module in model.modules() if isinstance(r := captured(module), CapturedForward)]
    return sum(r.num_hits for r in found), sum(r.num_misses for r in found)


def without_padding(call: Call) -> Call:
    return {**call, "attention_mask": torch.ones_like(call["attention_mask"])}


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_with_and_without_padding(name: str) -> None:
    original = build(name)
    padded = ZOO[name].batch(0)
    other = without_padding(padded)
    model = lpcompile(copy.deepcopy(original), "fp32-emulated", example_kwargs=padded)
    run(model, other)
    assert counts(model)[1] > 0
    (sentence, *_) = report(model).guard_misses.values()
    assert " ran the original forward, first as " in sentence
    assert "None" in sentence or "structure" in sentence
    capture_more(model, example_kwargs=other)
    assert counts(model) == (0, 0)
    for training in (True, False):
        model.train(training), original.train(training)
        for call in (padded, other):
            assert differences(run(model, call), run(original, call), 0.0) == []
    hits, misses = counts(model)
    assert hits > 0
    assert misses == 0
    assert report(model).guard_misses == {}


def test_another_dtype_after_compiling() -> None:
    original, call = tiny_llama(), token_batch()
    model = lpcompile(copy.deepcopy(original), "fp32-emulated", example_kwargs=call)
    model.to(torch.bfloat16), original.to(torch.bfloat16)
    model(**call)
    assert any("bfloat16" in sentence for sentence in report(model).guard_misses.values())
    capture_more(model, example_kwargs=call)
    assert differences(run(model, call), run(original, call), 0.0) == []
    assert counts(model)[1] == 0


def test_batch_of_one_and_length_of_one() -> None:
    original, call = tiny_llama(), token_batch()
    one = {"input_ids": call["input_ids"][:1], "labels": call["input_ids"][:1]}
    step = {"input_ids": call["input_ids"][:, :1]}
    model = lpcompile(copy.deepcopy(original), "fp32-emulated", example_kwargs=call)
    capture_more(model, example_kwargs=one)
    capture_more(model, example_inputs=(step["input_ids"],))
    for each in (call, one):
        assert differences(run(model, each), run(original, each), 0.0) == []
    model.eval(), original.eval()
    assert torch.equal(model(step["input_ids"]).logits, original(step["input_ids"]).logits)
    assert counts(model)[1] == 0


def test_the_same_call_again_adds_nothing() -> None:
    def num_variants() -> list[int]:
        found = [r for module in model.modules() if isinstance(r := captured(module), CapturedForward)]
        return [len(record.variants) for record in found]

    model = lpcompile(tiny_llama(), "fp32-emulated", example_kwargs=token_batch())
    before = num_variants()
    capture_more(model, example_kwargs=token_batch(3, 10))
    assert num_variants() == before


def test_model_that_runs_a_text_is_refused() -> None:
    model, x = lpcompile(nn.Sequential(nn.Linear(4, 4)), "fp32-emulated"), torch.ones(2, 4)
    install_text(model, print_program(get_compiled(model).phase.program))
    with pytest.raises(LpError, match="compiled from a text"):
        capture_more(model, (x,))


class Pooled(nn.Module):
    """F.max_pool2d is a closure, which pickle cannot name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.weight = nn.Parameter(torch.randn(36, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(self.conv(x), 2).flatten(1) @ self.weight


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_take_more_calls_of_their_own(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = lpcompile(Pooled(), "fp32-emulated", (torch.randn(2, 3, 8, 8),))
    one = torch.randn(1, 3, 8, 8)
    expected = model(one)
    twin = capture_more(clone(model), (one,))
    assert torch.equal(twin(one), expected)
    assert report(twin).guard_misses == {}
    assert report(model).guard_misses[""].startswith("1 call ran")
    assert report(twin).gemms == report(model).gemms
    assert run_state(twin) is not run_state(model)


def test_clock_and_stochastic_streams_stay(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "version: 1\nrules:\n  - match: {op: linear}\n    fwd: {x: {format: e4m3, rounding: stochastic}, w: e4m3}\n"
    )
    call = token_batch()
    model = lpcompile(tiny_llama(), file, example_kwargs=call, seed=3)
    model.eval()
    advance(model, to_step=5)
    state = run_state(model)
    before = model(**call).logits
    capture_more(model, example_kwargs={"input_ids": call["input_ids"][:1]})
    assert run_state(model) is state
    assert torch.equal(model(**call).logits, before)
    hooks = [type(hook) for hook in model._forward_pre_hooks.values()]
    assert hooks == [CountMicroBatches, WatchWeights]


def test_a_call_that_raises_changes_nothing() -> None:
    call = token_batch()
    model = lpcompile(tiny_llama(), "fp32-emulated", example_kwargs=call)
    with pytest.raises(Exception, match="input_ids"):
        capture_more(model, example_kwargs={})
    model(**call)
    assert counts(model)[0] > 0
    assert report(model).guard_misses == {}


def test_a_call_that_is_refused_under_strict_changes_nothing(tmp_path: Path) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor, product: bool) -> Tensor:
            return x @ self.weight if product else torch.tensordot(x, self.weight, 1)

    model = lpcompile(Either(), "fp32-emulated", (torch.ones(2, 4), True), strict=True)
    with pytest.raises(LpError, match="tensordot has no lp form"):
        capture_more(model, (torch.ones(2, 4), False))
    assert {row.name for row in report(model).gemms} == {"matmul_0"}
    model(torch.ones(2, 4), True)
    assert counts(model) == (1, 0)


def test_a_miss_is_told_by_the_recording_of_the_same_mode() -> None:
    model = lpcompile(tiny_llama(), "fp32-emulated", example_kwargs=token_batch())
    model.eval()
    with torch.no_grad():
        model(input_ids=token_batch()["input_ids"][:1])
    misses = report(model).guard_misses
    assert misses
    assert not any("training" in sentence for sentence in misses.values())


def test_through_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **call: Tensor) -> Any:
            return self.module(**call)

    call = token_batch()
    one = {name: tensor[:1] for name, tensor in call.items()}
    model = Wrapper(lpcompile(tiny_llama(), "fp32-emulated", example_kwargs=call))
    assert capture_more(model, example_kwargs=one) is model
    model(**one)
    assert counts(model)[1] == 0


def test_number_of_variants_is_bounded_and_told() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor, scale: int) -> Tensor:
            return x @ self.weight * scale

    model, x = lpcompile(Scaled(), "fp32-emulated", (torch.ones(2, 4), 0), mode="infer"), torch.ones(2, 4)
    model.eval()
    for scale in range(1, MAX_VARIANTS + 2):
        capture_more(model, (x, scale))
    for scale in range(MAX_VARIANTS + 2):
        assert torch.equal(model(x, scale), x * scale)
    assert counts(model) == (MAX_VARIANTS, 2)
    assert "1 more kinds of call than the 8 kept" in report(model).opaque[""]
    assert report(model).guard_misses[""].startswith("2 calls ran the original forward, first as scale is 8")


def test_wrapped_modules_and_plain_models_get_a_sentence() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(4, 4)), "fp32-emulated", (torch.ones(2, 4),))
    model[0].__class__ = type("Sharded", (type(model[0]),), {})
    with pytest.raises(LpError, match="before the model is wrapped"):
        capture_more(model, (torch.ones(1, 4),))
    with pytest.raises(LpError, match="was not compiled"):
        capture_more(nn.Linear(4, 4), (torch.ones(1, 4),))
