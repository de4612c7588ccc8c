"""fold-constants: casts of weights are kept between uses: for an optimizer step in training, for ever at inference.

    %s = lp.scale(%w)            becomes      %s = lp.constant_scale(%w, %state) {lifetime = "step"}
    %q = lp.quantize(%w, %s)                  %q = lp.quantize(%w, %s, %state) {lifetime = "step"}
    %y = lp.gemm(%x, %w, ...)                 %y = lp.gemm(%x, %w, ...) {lifetime = "step"}       for BWD's cast of %w

A weight is a parameter, a buffer, a placeholder that carries one, or what operations that draw no random numbers make
of such alone: a view, a folded batch norm. What is kept is told by the bytes of what is cast, at every use
(runtime/quantize/kept_casts.py); the pass only says where that is worth asking.

A stochastic cast is left alone. Its bits are keyed by the micro-batch, so that the errors of micro-batches are
independent: there is nothing to keep.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from passes.cast_keys import cast_key, cast_spec, gemm_spec
from passes.ir.operands import operands_of
from passes.ir.program import STATE, WEIGHT, Program, state_node
from passes.manager import Pass
from runtime.errors import PassError
from runtime.numerics.specs import QuantSpec
from runtime.ops.dialect import OP_OF, OPS
from runtime.quantize.kept_casts import LIFETIMES

_SCALE, _QUANTIZE, _GEMM = OPS["lp.scale"].run, OPS["lp.quantize"].run, OPS["lp.gemm"].run


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Both keep a cast while the weight is what it was; `step` forgets it after a step that did not ask for it."""

    name: ClassVar[str] = "fold-constants"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "cast")
    lifetime: str = "step"

    def __post_init__(self) -> None:
        if self.lifetime not in LIFETIMES:
            known = " or ".join(LIFETIMES)
            raise PassError("no such lifetime", where="fold-constants{lifetime}", expected=known, got=self.lifetime)

    def run(self, program: Program) -> bool:
        changed = False
        for _, graph in program.graphs():
            constants = find_constants(graph)
            for node in list(graph.nodes):
                if node.target is _QUANTIZE and node.args[0] in constants:
                    changed |= _keep_cast(graph, node, self.lifetime)
                elif node.target is _GEMM and _casts_weight_in_backward(node, constants):
                    node.kwargs = {**node.kwargs, "lifetime": self.lifetime}
                    changed = True
        return changed


def find_constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value follows from parameters and buffers alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            is_constant = node.target != STATE
        elif node.op == "placeholder":
            is_constant = bool(node.meta.get(WEIGHT))
        else:
            inputs = node.all_input_nodes
            is_call = node.op in ("call_function", "call_method") and (
                node.target not in OP_OF or node.target in _FOLDS
            )
            is_constant = is_call and bool(inputs) and found.issuperset(inputs) and not _draws(node)
        if is_constant:
            found.add(node)
    return found


def _keep_cast(graph: fx.Graph, quantize: fx.Node, lifetime: str) -> bool:
    """Mark a cast, and the scale before it, as kept; False where it is not, or is already."""
    x, scale, _ = quantize.args
    attributes: dict[str, Any] = {**quantize.kwargs, "lifetime": lifetime}
    if "lifetime" in quantize.kwargs or not _is_worth_keeping(cast_spec(quantize)):
        return False
    state = state_node(graph)
    if isinstance(scale, fx.Node) and not cast_key(quantize).owner:  # a learned scale is a part of what is kept
        if not _makes_scale_of(scale, quantize):
            return False
        with graph.inserting_before(scale):
            kept = graph.call_function(OPS["lp.constant_scale"].run, (x, state), attributes)
        kept.meta.update(scale.meta)
        scale.replace_all_uses_with(kept)
        graph.erase_node(scale)
        scale = kept
    quantize.args = (x, scale, state)
    quantize.kwargs = attributes
    return True


def _makes_scale_of(scale: fx.Node, quantize: fx.Node) -> bool:
    """Whether the scale is that of the cast, with nothing between the two but lp ops, which do not write."""
    if scale.target is not _SCALE or scale.args != quantize.args[:1] or cast_key(scale) != cast_key(quantize):
        return False
    node = scale.next
    while node is not quantize and node.target in OP_OF:
        node = node.next
    return node is quantize


def _casts_weight_in_backward(gemm: fx.Node, constants: set[fx.Node]) -> bool:
    operands = operands_of(gemm)
    return (
        operands["bwd_rhs"] is None
        and operands["rhs"] in constants
        and "lifetime" not in gemm.kwargs
        and _is_worth_keeping(gemm_spec(gemm).bwd.rhs)
    )


def _is_worth_keeping(spec: QuantSpec) -> bool:
    return not spec.is_identity and not spec.is_stochastic and spec.transform is None


def _draws(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return "dropout" in name or name.rstrip("_") in _RANDOM


_FOLDS = {op.run for name, op in OPS.items() if name.startswith(("lp.norm_", "lp.fold_"))}
"""The ops of the dialect that make a weight of weights: a batch norm that is folded in."""

_RANDOM = frozenset(
    {"bernoulli", "gumbel_softmax", "multinomial", "normal", "poisson", "rand_like", "randint_like", "randn_like"}
    | {"cauchy", "exponential", "geometric", "log_normal", "random", "rrelu", "uniform"}
)
"""Functions of torch that draw random numbers, by name without a last underscore; all dropouts do too."""
