"""Constants: a kept cast is found again for the same bytes only, whoever wrote them, and goes when it is stale."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from runtime.numerics.specs import QuantSpec
from runtime.ops.dialect import constant_scale, quantize
from runtime.ops.layer import cast
from runtime.quantize import kept_casts as constants
from runtime.quantize.kept_casts import Constants
from runtime.quantize.qtensor import CastKey
from runtime.state import RunState
from tests.machine_facts import needs_kernels

pytestmark = needs_kernels

SPECS = ["e4m3 nearest_even", "e4m3 nearest_even row/amax", "int8 nearest_even tensor/amax", "mxfp8 nearest_even row"]


def _weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))


def _state() -> RunState:
    state = RunState()
    state.constants.watch(nn.Module())
    return state


def _run(w: Tensor, spec: str, state: RunState, site: int = 0, lifetime: str = "step") -> tuple[Tensor, Tensor | None]:
    """What the lp ops of a weight give after fold-constants: grid values and scale."""
    place = {"spec": spec, "site": site, "slot": 1, "lifetime": lifetime}
    has_scale = QuantSpec.parse(spec).has_scale
    scale = constant_scale(w, state, **place) if has_scale else None  # type: ignore[arg-type]
    return quantize(w, scale, state, **place), scale  # type: ignore[arg-type]


def _assert_cast(w: Tensor, spec: str, found: tuple[Tensor, Tensor | None]) -> None:
    wanted = cast(w, QuantSpec.parse(spec), None, 0, 1)
    assert torch.equal(found[0], wanted.grid)
    assert (found[1] is None) == (wanted.scale is None)
    if found[1] is not None and wanted.scale is not None:
        assert torch.equal(found[1], wanted.scale)


@pytest.mark.parametrize("spec", SPECS)
def test_a_second_use_finds_the_first_cast(spec: str) -> None:
    w, state = _weight(), _state()
    first, second = (_run(w, spec, state) for _ in range(2))
    _assert_cast(w, spec, first)
    assert first[0] is second[0]
    assert first[1] is second[1]


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "p.data.add_": lambda p: p.data.add_(1),
    "p.data.copy_": lambda p: p.data.copy_(torch.ones_like(p)),
    "p.data = ": lambda p: setattr(p, "data", p.data + 1),
    "p.data = the other's, in the same memory": lambda p: setattr(p, "data", p.data.flip(0)),
    "p.data, one element": lambda p: p.data.view(-1)[-1].add_(2.0),
    "rows change places": lambda p: p.data.copy_(p.data.roll(1, 0)),
    "no_grad": lambda p: p.detach().mul_(2),
    "numpy": lambda p: p.detach().numpy().__setitem__((3, 4), 9.0),
    "an older alias": lambda p: p.alias.fill_(0.5),  # type: ignore[operator]
    "storage": lambda p: p.untyped_storage().fill_(0),
    "foreach": lambda p: torch._foreach_add_([p.data], 1.0),
    "to another dtype": lambda p: setattr(p, "data", p.data.bfloat16()),
    "another shape": lambda p: setattr(p, "data", p.data.view(32, 16)),
    "another order in memory": lambda p: setattr(p, "data", p.data.view(32, 16).t()),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("lifetime", ["step", "forever"])
def test_every_write_is_seen_and_the_stale_cast_goes(write: str, spec: str, lifetime: str) -> None:
    w, state = _weight(), _state()
    w.alias = w.data  # type: ignore[attr-defined]
    before, _ = _run(w, spec, state, lifetime=lifetime)
    num_bytes = state.constants.num_bytes
    WRITES[write](w)
    after = _run(w, spec, state, lifetime=lifetime)
    assert after[0] is not before
    _assert_cast(w, spec, after)
    assert state.constants.num_casts == 1
    assert 0 < state.constants.num_bytes <= num_bytes + 4 * 32


def test_data_does_not_share_the_version_of_its_parameter() -> None:
    """Why versions do not do."""
    w = _weight()
    version = w._version
    w.data.add_(1)
    assert w._version == version


def test_places_that_cast_the_same_bytes_alike_have_one_cast_until_both_leave() -> None:
    w, state = _weight(), _state()
    first, second = (_run(w, SPECS[1], state, site)[0] for site in (3, 5))
    assert first is second
    assert state.constants.num_casts == 1
    _run(w, SPECS[0], state, 3)
    assert state.constants.num_casts == 2
    _run(w, SPECS[0], state, 5)
    assert state.constants.num_casts == 1


def test_a_value_that_comes_back_is_cast_again_only_if_it_was_left() -> None:
    w, state = _weight(), _state()
    first = _run(w, SPECS[0], state)[0]
    w.data.add_(1)
    w.data.copy_(_weight().data)
    assert _run(w, SPECS[0], state)[0] is first


def test_what_no_step_asks_for_goes() -> None:
    w, state = _weight(), _state()
    _run(w, SPECS[1], state, 0, "step")
    forever = _run(w, SPECS[0], state, 1, "forever")[0]
    state.constants.end_step()
    assert state.constants.num_casts == 2, "asked for in this step"
    kept = _run(w, SPECS[1], state, 0, "step")[0]
    for num_casts in (2, 1, 1):
        state.constants.end_step()
        assert state.constants.num_casts == num_casts
    assert _run(w, SPECS[0], state, 1, "forever")[0] is forever
    assert _run(w, SPECS[1], state, 0, "step")[0] is not kept
    state.constants.clear()
    assert (state.constants.num_casts, state.constants.num_bytes) == (0, 0)


def test_bytes_are_those_of_grid_and_scale() -> None:
    w, state = _weight(), _state()
    _run(w, SPECS[1], state)
    assert state.constants.num_bytes == 2 * 16 * 32 + 4 * 16


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_copies_and_pickles_start_empty(copied: Callable[[RunState], RunState]) -> None:
    w, state = _weight(), _state()
    _run(w, SPECS[0], state)
    other = RunState()
    vars(other).update(constants=copied(state.constants))  # type: ignore[arg-type]
    assert other.constants.num_casts == 0
    assert other.constants.why_none
    assert copy.deepcopy(state).constants.num_casts == 0
    assert state.constants.num_casts == 1


def test_nothing_is_kept_before_the_model_was_seen() -> None:
    w, state = _weight(), RunState()
    found = _run(w, SPECS[1], state)
    _assert_cast(w, SPECS[1], found)
    assert state.constants.num_casts == 0


def _fsdp(model: nn.Module) -> None:
    model[0]._is_fsdp_managed_module = True  # type: ignore[index]


def _zero3(model: nn.Module) -> None:
    model[0].weight.ds_id = 3  # type: ignore[index]


ENGINES = {"FSDP": _fsdp, "ZeRO-3": _zero3, "loaded": lambda model: model.to("meta")}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_gathers_is_not_kept_and_frees_what_was(engine: str) -> None:
    model, state = nn.Sequential(nn.Linear(4, 4)), RunState()
    state.constants.watch(model)
    w = _weight()
    _run(w, SPECS[1], state)
    assert state.constants.num_casts == 1
    ENGINES[engine](model)
    state.constants.watch(model)
    assert engine in state.constants.why_none
    _assert_cast(w, SPECS[1], _run(w, SPECS[1], state))
    assert state.constants.num_casts == 0


class _Subclass(Tensor):
    pass


def test_tensors_that_are_not_plain_are_cast_each_time() -> None:
    state = _state()
    for w in (_weight().data.as_subclass(_Subclass), torch.zeros(0, 4)):
        quantize(w, None, state, spec=SPECS[0], site=0, slot=1, lifetime="step")
    with FakeTensorMode():
        quantize(torch.randn(4, 4), None, state, spec=SPECS[0], site=0, slot=1, lifetime="step")
    key = CastKey(QuantSpec.parse(SPECS[0]))
    torch.func.vmap(lambda w: w if state.constants.find(w, key, 0, 1, "step") is None else -w)(torch.ones(2, 3))
    assert state.constants.num_casts == 0


def test_under_a_dispatch_mode_every_cast_is_an_operation() -> None:
    w, state = _weight(), _state()
    _run(w, SPECS[0], state)
    with FlopCounterMode(display=False):
        assert state.constants.find(w, CastKey(QuantSpec.parse(SPECS[0])), 0, 1, "step") is None


def test_a_cast_made_in_inference_mode_serves_a_later_backward() -> None:
    w, state = _weight(), _state()
    with torch.inference_mode():
        grid, scale = _run(w, SPECS[1], state)
    assert scale is not None
    assert not grid.is_inference()
    assert not scale.is_inference()
    assert not grid.requires_grad
    assert _run(w, SPECS[1], state)[0] is grid


def test_without_a_compiler_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "fingerprint", lambda x: None)
    w, state = _weight(), _state()
    _assert_cast(w, SPECS[1], _run(w, SPECS[1], state))
    assert state.constants.num_casts == 0


def test_a_cast_that_was_kept_holds_no_weight() -> None:
    """Nothing of the weight itself lives on in the cache."""
    w, state = _weight(), _state()
    _run(w, SPECS[1], state)
    held = [each for kept in state.constants._kept.values() for each in (kept.grid, kept.scale)]
    assert all(each is not None and each.untyped_storage().data_ptr() != w.data_ptr() for each in held)


def test_constants_are_no_part_of_what_a_state_equals() -> None:
    w, state = _weight(), _state()
    _run(w, SPECS[0], state)
    assert state == RunState()
    assert isinstance(state.constants, Constants)


@pytest.mark.parametrize("lifetime", ["step", "forever"])
def test_an_edit_of_only_the_scale_is_another_cast(lifetime: str) -> None:
    w, state, spec = _weight(), _state(), "int8 nearest_even tensor/amax"
    place: dict[str, Any] = {"spec": spec, "site": 0, "slot": 1, "lifetime": lifetime}
    first, scale = _run(w, spec, state, lifetime=lifetime)
    assert scale is not None
    scale.mul_(2)
    second = quantize(w, scale, state, **place)
    assert torch.equal(second.float(), (w / scale).round())
    assert not torch.equal(second, first)
    _assert_cast(w, spec, _run(w, spec, state, lifetime=lifetime))  # its own scale again
