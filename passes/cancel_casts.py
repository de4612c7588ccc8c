"""cancel-casts: a cast of what is on the grid already is left out.

    lp.quantize(lp.dequantize(%q))           becomes  %q
    lp.quantize(relu(lp.quantize(%x)))       becomes  relu(lp.quantize(%x))

Both casts have the same key and no scale: a grid value is then its own cast, bit for bit, NaN and -0 too. With a scale
that is one node for both, q s / s rounds back to q only while q s is a normal number of fp32: `scaled=true` says so.

The neighbour only: what lies between a cast and its inverse (a view, a relu) place-regions moves out of the way, for
which such a pair costs nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from passes.analysis.grid_ops import read_grid_op
from passes.cast_keys import QUANTIZE, cast_key, cast_spec
from passes.ir.program import Program
from passes.manager import Pass
from runtime.ops.dialect import OPS
from runtime.quantize.qtensor import CastKey

_DEQUANTIZE = OPS["lp.dequantize"].run


@dataclass(frozen=True)
class CancelCasts(Pass):
    """`scaled=true`: also where both casts have one scale; the largest magnitudes are above 2^-100, say."""

    name: ClassVar[str] = "cancel-casts"
    requires: ClassVar[tuple[str, ...]] = ("cast",)
    scaled: bool = False

    def run(self, program: Program) -> bool:
        changed = False
        for unit in program.units.values():
            for node in unit.graph.find_nodes(op="call_function", target=QUANTIZE):
                on_grid = self._on_grid(node)
                if on_grid is not None:
                    dead = node.args[0]
                    node.replace_all_uses_with(on_grid)
                    unit.graph.erase_node(node)
                    if isinstance(dead, fx.Node) and dead.target is _DEQUANTIZE and not dead.users:
                        unit.graph.erase_node(dead)
                    changed = True
        return changed

    def _on_grid(self, cast: fx.Node) -> fx.Node | None:
        """What is the same as the cast, and there already."""
        key, (x, scale, _) = cast_key(cast), cast.args
        spec = key.spec
        if not spec.is_elementwise or key.is_drawn or not isinstance(x, fx.Node):
            return None  # blocks and ranges are laid anew, and a stochastic cast is left to draw
        if x.target is _DEQUANTIZE and cast_spec(x) == spec and x.args[1] is scale:
            is_near = spec.rounding in ("nearest_even", "nearest_away")  # q s / s may lie a little below q
            return x.args[0] if scale is None or (self.scaled and is_near) else None  # type: ignore[return-value]
        return x if scale is None and _holds_casts(x, key) else None


def _holds_casts(node: fx.Node, key: CastKey) -> bool:
    """Whether a value consists of casts of this key, contiguous as a cast is."""
    if node.target is QUANTIZE:
        return cast_key(node) == key
    op = read_grid_op(node)
    is_kept = op is not None and op.kind != "layout"
    return op is not None and is_kept and all(_holds_casts(each, key) for each in op.inputs)
