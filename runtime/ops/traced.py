"""Traced: the lp ops as torch.compile and torch.export see them.

    lp::scale, lp::quantize, lp::gemm    one node each in the graph of a frontend. They are composite: below it, casts
                                         become operations that a compiler fuses, and a GEMM its three roles
    lp::fwd, lp::bwd, lp::grad           one multiplication each, opaque, the ops of eager code (products.py)
    lp::cast_gradient                    a cast that stays opaque: of a gradient whose overflow is watched

A role that runs as torch's own op in the tensor's dtype (`as_is`) is traced into that op.

torch keeps compiled code on disk under what it read of a graph, and of the first three it reads names and arguments
only: `code`, a digest of this package's sources, is one of them, so that other sources are compiled anew.

What changes from call to call enters as numbers: the clock (seed, rank, step, micro-batch), and only where a cast or a
sum is stochastic, since each is an input of the graph; and the key of the RunState whose overflow flag a backward sets.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.compile_marks import constant_result
from runtime.kernels.cast.grid import roomy_dtype
from runtime.kernels.cast.scales import compute_scale
from runtime.kernels.torch_ops import declare
from runtime.numerics.specs import LayerSpec, QuantSpec
from runtime.ops import layer as gemms
from runtime.ops.draws import draw_of
from runtime.ops.layer import CAST_NAMES
from runtime.ops.observed import cast_observed_shape
from runtime.ops.plan import GemmPlan, plan_text
from runtime.quantize.qtensor import QTensor
from runtime.quantize.quantizer import to_grid, turned
from runtime.quantize.storage import storage_dtype
from runtime.state import RunState, find_state
from runtime.streams import NO_CLOCK, SITE_BITS, Turn


def scale(x: Tensor, spec: str) -> Tensor:
    """lp.scale in a graph that is compiled."""
    result: Tensor = torch.ops.lp.scale(x, spec, _code())
    return result


def quantize(x: Tensor, s: Tensor | None, state: RunState | None, spec: str, site: int, slot: int) -> Tensor:
    """lp.quantize in a graph that is compiled."""
    clock, site = find_clock(state, _draws(spec), site)
    result: Tensor = torch.ops.lp.quantize(x, s, clock, spec, site, slot, _code())
    return result


def cast_traced(x: Tensor, state: RunState, spec: str, site: int, slot: int, owner: str) -> tuple[Tensor, Tensor]:
    """Grid and scale of an observed operand in a graph that is compiled: one opaque op."""
    clock, site = find_clock(state, _draws(spec), site)
    looks, key = torch.is_grad_enabled(), int(state.key_text)
    made: tuple[Tensor, Tensor] = torch.ops.lp.cast_observed(x.detach(), spec, clock, key, site, slot, owner, looks)
    return made


def rotate(x: Tensor, state: RunState | None, spec: str, site: int, slot: int) -> Tensor:
    """lp.rotate in a graph that is compiled."""
    clock, site = find_clock(state, _draws(spec), site)
    result: Tensor = torch.ops.lp.rotate(x, clock, spec, site, slot, _code())
    return result


def gemm(
    lhs: Tensor, rhs: Tensor, bias: Tensor | None, casts: Sequence[Tensor | None], state: RunState,
    kind: str, spec: str, kernels: str, site: int, geometry: str, residual: Tensor | None, activation: str, name: str,
) -> Tensor:  # fmt: skip
    """lp.gemm in a graph that is compiled. casts: grid and scale of fwd_lhs, fwd_rhs, bwd_rhs, grad_lhs."""
    is_named = state.watch_overflow or _observes(spec)
    key, name = (int(state.key_text), name) if is_named else (-1, "")
    clock, site = find_clock(state, layer_draws(spec), site)
    plan = plan_text(kind, spec, kernels, site, geometry, name)
    result: Tensor = torch.ops.lp.gemm(lhs, rhs, bias, list(casts), clock, key, plan, residual, activation, _code())
    return result


@constant_result
def _code() -> str:
    return _digest_of_sources()


@lru_cache(maxsize=1)
def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for source in sorted(root.rglob("*.py")):
        digest.update(source.relative_to(root).as_posix().encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def find_clock(state: RunState | None, is_stochastic: bool, site: int) -> tuple[tuple[int, ...], int]:
    """The clock, and the site with what the clock does not say of its call. Zeros where nothing is stochastic: what is
    read is an input of the graph.
    """
    if state is None or not is_stochastic:
        return NO_CLOCK, site
    if not torch.compiler.is_dynamo_compiling():
        return state.clock, site
    return state.compiled_clock(site), site % (1 << SITE_BITS)


@constant_result
def _draws(spec: str) -> bool:
    return QuantSpec.parse(spec).is_stochastic


@constant_result
def layer_draws(spec: str) -> bool:
    layer = LayerSpec.parse(spec)
    roles = (layer.fwd, layer.bwd, layer.grad)
    return layer.is_stochastic or any(role.accumulator.mode == "stochastic" for role in roles)


@constant_result
def _observes(spec: str) -> bool:
    return LayerSpec.parse(spec).observes


def _state(key: int) -> RunState:
    """Whose overflow is watched; a clock comes with the call."""
    owner = find_state(key)
    state = RunState(watch_overflow=owner is not None and owner.watch_overflow)
    state.key, state.is_scaled = key, True  # whose loss scale it is, is for the state with this key
    return state


def _scale(x: Tensor, spec: str, code: str) -> Tensor:
    found = compute_scale(x.detach(), QuantSpec.parse(spec))
    assert found is not None
    return found


def _quantize(x: Tensor, s: Tensor | None, clock: Sequence[int], spec: str, site: int, slot: int, code: str) -> Tensor:
    parsed = QuantSpec.parse(spec)
    return to_grid(x, s, parsed, draw_of(parsed, Turn(tuple(clock), site), site, slot))


def _rotate(x: Tensor, clock: Sequence[int], spec: str, site: int, slot: int, code: str) -> Tensor:
    parsed = QuantSpec.parse(spec)
    return turned(x, parsed, draw_of(parsed, Turn(tuple(clock), site), site, slot))


def _gemm(
    lhs: Tensor, rhs: Tensor, bias: Tensor | None, flat: Sequence[Tensor | None], clock: Sequence[int], key: int,
    plan: str, residual: Tensor | None, activation: str, code: str,
) -> Tensor:  # fmt: skip
    parsed = GemmPlan.read(plan)
    layer = parsed.spec
    specs = (layer.fwd.lhs, layer.fwd.rhs, layer.bwd.rhs, layer.grad.rhs)
    casts: dict[str, QTensor | None] = {}
    for number, (name, cast) in enumerate(zip(CAST_NAMES, specs)):
        grid = flat[2 * number]
        casts[name] = None if grid is None else QTensor(grid, flat[2 * number + 1], cast)
    turn = Turn(tuple(clock), parsed.site)
    return gemms.run_gemm(lhs, rhs, bias, casts, _state(key), parsed, residual, activation, turn)


def _cast_gradient(
    dy: Tensor, spec: str, clock: Sequence[int], key: int, site: int, slot: int, owner: str
) -> tuple[Tensor, Tensor]:
    state, turn = find_state(key), Turn(tuple(clock), site)
    return _pair(dy, gemms.cast_gradient(dy, QuantSpec.parse(spec), state, site, slot, turn, owner))


def cast_result(x: Tensor, spec: str, clock: Sequence[int], site: int, slot: int) -> tuple[Tensor, Tensor]:
    """Grid and scale of a cast, scale 1 where the spec has none; neither is x itself."""
    return _pair(x, gemms.cast(x, QuantSpec.parse(spec), Turn(tuple(clock), site), site, slot))


def _pair(x: Tensor, operand: QTensor) -> tuple[Tensor, Tensor]:
    scale = operand.scale if operand.scale is not None else x.new_ones((), dtype=torch.float32)
    scale = scale.clone() if operand.spec.observes else scale  # what a compiler is given it may write into
    if operand.spec.is_identity:
        return operand.grid.clone(memory_format=torch.contiguous_format), scale
    return operand.grid.to(_roomy_dtype(operand.spec)), scale


def _cast_gradient_shape(
    dy: Tensor, spec: str, clock: Sequence[int], key: int, site: int, slot: int, owner: str
) -> tuple[Tensor, Tensor]:
    return cast_observed_shape(dy, spec) if QuantSpec.parse(spec).observes else cast_shape(dy, spec)


def cast_shape(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """As `cast_result`, of tensors without values."""
    parsed = QuantSpec.parse(spec)
    dtype = x.dtype if parsed.is_identity else _roomy_dtype(parsed)
    scale = compute_scale(x, parsed) if parsed.has_scale else None
    ones = x.new_empty((), dtype=torch.float32) if scale is None else scale
    return torch.empty(x.shape, dtype=dtype, device=x.device), ones


def _roomy_dtype(spec: QuantSpec) -> torch.dtype:
    return roomy_dtype(spec, storage_dtype(spec.format))


declare("scale(Tensor x, str spec, str code) -> Tensor", _scale, fake=None)
declare(
    "rotate(Tensor x, SymInt[] clock, str spec, int site, int slot, str code) -> Tensor", _rotate, fake=None,
)  # fmt: skip
declare(
    "quantize(Tensor x, Tensor? s, SymInt[] clock, str spec, int site, int slot, str code) -> Tensor",
    _quantize, fake=None,
)  # fmt: skip
declare(
    "gemm(Tensor lhs, Tensor rhs, Tensor? bias, Tensor?[] casts, SymInt[] clock, int key, str plan, Tensor? residual, "
    "str activation, str code) -> Tensor",
    _gemm,
    fake=None,
)
declare(
    "cast_gradient(Tensor dy, str spec, SymInt[] clock, int key, int site, int slot, str owner) -> (Tensor, Tensor)",
    _cast_gradient,
    fake=_cast_gradient_shape,
)
