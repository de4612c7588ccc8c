"""Fed leaves: a caller casts the input of a leaf, and hands the casts down under the keyword `lp_casts`.

    %y = call_module[fc](%x)      becomes      %q = lp.quantize(%x)
                                               %y = call_module[fc](%x, lp_casts=(%q, None))

lp_casts holds grid values and scale of each cast of the leaf's input, in the order of `casts_of_input`; %x goes on
carrying the gradient.
"""

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from passes.cast_keys import cast_key
from passes.ir.program import CASTS, HANDED, Program, Unit
from runtime.ops.dialect import OPS

SCALE, QUANTIZE = OPS["lp.scale"].run, OPS["lp.quantize"].run
Pair = tuple[fx.Node | None, fx.Node | None]
"""Grid values and their scale."""


def leaf_of(program: Program, unit: Unit, node: fx.Node) -> Unit | None:
    """The leaf that a node of `unit` calls with one tensor, whatever else it is handed; None for any other node, and
    where calls are handed different things, since its fed graph takes one kind.
    """
    is_call = node.op == "call_module" and len(node.args) == 1 and isinstance(node.args[0], fx.Node)
    if not is_call or not node.kwargs.keys() <= {*HANDED}:
        return None
    leaf = program.called_leaf(unit, node)
    return None if leaf is None or (leaf.fed is not None and _has_other_folds(program, leaf)) else leaf


def _has_other_folds(program: Program, leaf: Unit) -> bool:
    """Whether a leaf that is handed more than casts has several calls."""
    calls: list[fx.Node] = []
    parent, _, name = ".".join(("", leaf.path)).rpartition(".")
    while True:  # its callers are the modules around it
        for each in program.modules_at(parent.removeprefix(".")):
            calls += each.graph.find_nodes(op="call_module", target=name, sort=False)
        if not parent:
            break
        parent, _, last = parent.rpartition(".")
        name = f"{last}.{name}"
    return len(calls) > 1 and any(call.kwargs.keys() - {CASTS} for call in calls)


def unfed_leaf(program: Program, unit: Unit, node: fx.Node) -> Unit | None:
    """The leaf that a node calls and that casts its input itself."""
    return None if CASTS in node.kwargs else leaf_of(program, unit, node)


def casts_of_input(graph: fx.Graph) -> list[fx.Node]:
    """The lp.quantize nodes of a leaf's input; none if one rounds stochastically or has a quantizer with state, since
    its bits, or its scale, belong to the leaf.
    """
    x = next(iter(graph.nodes))
    casts = [node for node in graph.nodes if node.target is QUANTIZE and node.args[0] is x]
    return casts if all(is_shareable(cast) and not cast_key(cast).owner for cast in casts) else []


def is_shareable(cast: fx.Node) -> bool:
    return not cast_key(cast).is_drawn


def cast_like(graph: fx.Graph, x: fx.Node, cast: fx.Node) -> Pair:
    """The cast of x that is like a leaf's `cast`, made where the graph inserts nodes."""
    spec = cast.kwargs["spec"]
    scale = None if cast.args[1] is None else graph.call_function(SCALE, (x,), {"spec": spec})
    return graph.call_function(QUANTIZE, (x, scale, None), dict(cast.kwargs)), scale


def feed(call: fx.Node, leaf: Unit, pairs: Sequence[Pair]) -> None:
    """Hand casts to a call of a leaf, one pair per cast of its input; the leaf then has a fed graph."""
    if leaf.fed is None:
        leaf.fed = _fed_copy(leaf.graph)
    elif CASTS not in call.kwargs and call.kwargs:  # it is handed something else already
        leaf.fed = _fed_copy(leaf.fed)
    call.kwargs = {CASTS: tuple(each for pair in pairs for each in pair), **_without(call.kwargs, CASTS)}


def _without(kwargs: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != name}


def _fed_copy(graph: fx.Graph) -> fx.Graph:
    """The leaf's graph with the casts of its input read from the placeholder `lp_casts` = (q0, s0, q1, s1, ...)."""
    fed = copy.deepcopy(graph)
    x = next(iter(fed.nodes))
    with fed.inserting_after(x):
        handed = fed.placeholder(CASTS, default_value=None)
    for number, cast in enumerate(casts_of_input(fed)):
        scale = cast.args[1]
        for position, node in ((2 * number, cast), (2 * number + 1, scale)):
            if isinstance(node, fx.Node):
                with fed.inserting_before(cast if node is cast else node):
                    node.replace_all_uses_with(fed.call_function(operator.getitem, (handed, position)))
        fed.erase_node(cast)
        if isinstance(scale, fx.Node):
            fed.erase_node(scale)
    return fed
