"""Architectures of other libraries that the zoo does not have: no bit changes, every product that a policy names is
counted, and a compiled model is still the model.

`pytest -m slow tests/outside -s` prints a line for each. Those of timm are left out where it is not installed.
"""

import copy
import importlib.util
import pickle
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import is_parametrized

from lpcompile import Policy, lpcompile, report
from lpcompile.api import restore
from tests.outside.architectures import ARCHITECTURES, Batch
from tests.outside.vision import VISION
from tests.zoo.counting import count_products

ALL = {**ARCHITECTURES, **VISION}
EVERYTHING = Policy.model_validate(
    {"version": 1, "name": "everything", "rules": [{"match": {"name": "*"}, "fwd": {"x": "e4m3", "w": "e4m3"}}]}
)
IS_QUICK = {"mamba2"}
_NO_TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


def _parameters(names: Mapping[str, Any]) -> list[Any]:
    return [
        pytest.param(name, marks=[*([] if name in IS_QUICK else [pytest.mark.slow]), *([_NO_TIMM] * (name in VISION))])
        for name in names
    ]


NAMES = _parameters(ALL)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ALL[name].make()


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Those in dicts, lists and tuples, by path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping | list | tuple):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from tensors(each, f"{path}.{key}")


def run(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Every output and buffer after one forward, and in training every gradient, of the loss or what stands for it."""
    torch.manual_seed(5), random.seed(5)
    model.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):
        with torch.set_grad_enabled(model.training):
            outputs = dict(tensors(model(**batch)))
        differentiable = [each for each in outputs.values() if each.requires_grad]
        loss = outputs.get(".loss")
        if model.training:
            (sum(each.square().mean() for each in differentiable) if loss is None else loss).backward()
    gradients = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert bool(gradients) == model.training
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return {**{name: each.detach() for name, each in outputs.items()}, **gradients, **buffers}


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0) -> list[str]:
    assert found.keys() == wanted.keys()
    if tolerance:
        close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        return [key for key in wanted if not torch.allclose(found[key], wanted[key], **close)]
    return [key for key in wanted if not torch.equal(found[key].nan_to_num(7), wanted[key].nan_to_num(7))]


@pytest.mark.parametrize("name", NAMES)
def test_no_bit_changes(name: str) -> None:
    """In training and evaluation, of two sizes; and generate() gives the same tokens with the default cache."""
    batch, original = ALL[name].batch, build(name)
    model = lpcompile(copy.deepcopy(original), "fp32-emulated")
    compared = 0
    for training in (True, False):
        for seed in (0, 1):
            for each in (model, original):
                each.train(training)
            found, wanted = run(model, batch(seed)), run(original, batch(seed))
            assert differences(found, wanted, ALL[name].tolerance) == [], (training, seed)
            compared += len(wanted)
    if ALL[name].can_generate:
        assert torch.equal(generate(model, batch(0)), generate(original, batch(0)))
    how = f"within {ALL[name].tolerance}" if ALL[name].tolerance else "bitwise equal"
    print(f"{name}: {compared} outputs, gradients and buffers {how}")


def generate(model: nn.Module, batch: Batch) -> Tensor:
    prompt = {
        key: value if key == "pixel_values" else value[:, :6] if value.dim() == 2 and "grid" not in key else value
        for key, value in batch.items()
        if key != "labels"
    }
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with sdpa_kernel(SDPBackend.MATH):
        return model.eval().generate(**prompt, **options)


@pytest.mark.parametrize("name", NAMES)
def test_every_product_is_reached(name: str) -> None:
    """Of those torch functions that multiply matrices none is left beside the compiled ones, but what the report
    refuses by name: XLNet's einsum of three operands.
    """
    batch, model = ALL[name].batch(0), build(name)
    total = count_products(model, batch).total()
    lpcompile(model, EVERYTHING)
    for training in (True, False):
        model.train(training)(**batch)  # kernels are tried here once
        left = count_products(model, batch)
        found = report(model)
        refused = [row for row in found.gemms if row.role == "fwd" and not row.runs_as_policy_says]
        assert (left.total(), {*left}) == (len(refused), {"einsum"} if refused else set())
        assert all("two operands" in row.reason for row in refused)
    assert total == 0 or found.gemms
    assert found.unreached == {}
    print(f"{name}: {total} products, {len(refused)} refused by name, none missed")


@pytest.mark.parametrize("policy", ["hfp8", "fp8-rowwise"])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_policy_names_is_counted(name: str, policy: str) -> None:
    """Calls of every named product, in training, evaluation, another size and generate(), with and without examples."""
    batch, counts = ALL[name].batch, []
    for examples in (None, batch(0)):
        model = lpcompile(build(name), policy, example_kwargs=examples)
        for training, seed in ((True, 0), (True, 1), (False, 0)):
            run(model.train(training), batch(seed))
        if ALL[name].can_generate:
            generate(model, batch(0))
        found = report(model)
        rows = found.called
        # fp8-rowwise names no convolution, and resnetv2 has nothing else
        assert rows or found.unmatched_rules or examples is None
        assert found.unreached == {}
        assert [row.name for row in rows if not row.runs_as_policy_says] == []
        assert [row.name for row in rows if row.role == "fwd" and not row.calls] == []
        assert found.to_text().splitlines()[0]
        counts.append({(row.name, row.role): row.calls for row in rows})
        values = dict(tensors(model(**batch(0))))
        assert all(each.isfinite().all() for key, each in values.items() if key in (".loss", ".logits"))
    assert counts[0].keys() == counts[1].keys()
    total = sum(counts[0].values())
    print(f"{name}: {policy}: {len(counts[0])} products, {total} calls, all as the policy says")


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_the_model(name: str) -> None:
    """deepcopy, pickle, and the state_dict to and from the original."""
    batch, original = ALL[name].batch(0), build(name)
    model = lpcompile(copy.deepcopy(original), "hfp8")
    assert isinstance(model, type(original))
    assert list(model.state_dict()) == list(original.state_dict())
    copies = [copy.deepcopy(model)]
    if not any(is_parametrized(module) for module in model.modules()):  # torch pickles none of those
        copies.append(pickle.loads(pickle.dumps(model)))
    copies.append(lpcompile(copy.deepcopy(original), "hfp8"))
    with torch.no_grad():
        for parameter in copies[-1].parameters():
            parameter.add_(1)
    copies[-1].load_state_dict(model.state_dict(), strict=True)
    wanted = run(model, batch)
    for each in copies:
        assert differences(run(each, batch), wanted) == []
    original.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_compiling_leaves_no_trace(name: str) -> None:
    """In attributes, buffers, classes, the modules that they come from, and random generators; and what restore()
    gives is the original.
    """
    model, batch = build(name), ALL[name].batch(0)
    run(model.eval(), batch)  # RecurrentGemma keeps a state, with its gradient in training, which no deepcopy takes
    before, values = _surroundings(model), {key: value.clone() for key, value in model.state_dict().items()}
    lpcompile(model, "hfp8", example_kwargs=batch)
    after = _surroundings(model)
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == set()
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
    restore(model)
    assert not [path for path, module in model.named_modules() if any(key.startswith("_lp") for key in vars(module))]
    names = [str(type(module)) for module in build(name).modules()]  # a parametrized module has a class of its own
    assert [str(type(module)) for module in model.modules()] == names


def _surroundings(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"torch's generator": torch.get_rng_state().tolist(), "Python's": random.getstate()}
    for path, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if not key.startswith("_lp")}
        for key, value in attributes.items():
            if key == "_forward_pre_hooks":  # ours leave with restore()
                value = [each for each in value.values() if not type(each).__module__.startswith("lpcompile")]
            if isinstance(value, dict | list | set):
                value = repr([id(each) for each in (value.values() if isinstance(value, dict) else value)])
            found[f"{path}.{key}"] = value if isinstance(value, str) else id(value)
        for cls in type(module).__mro__:
            if cls.__module__ == type(model).__module__ or cls.__module__.startswith(("transformers", "timm", "torch")):
                found[f"class {cls.__module__}.{cls.__qualname__}"] = [
                    (k, id(v))
                    for k, v in vars(cls).items()
                    if k != "__slotnames__"  # which copy keeps there
                ]
            source = sys.modules.get(cls.__module__)
            found[f"module {cls.__module__}"] = [(key, id(value)) for key, value in vars(source).items()]
    return found
