"""Cast origins: whether the casts that a caller hands to a leaf are still those of the tensor that arrives there.

    %q = lp.quantize(%x)                               becomes   %n = note(%x, a)
    %y = call_module[a](%x, lp_casts=(%q, None))                 %q = lp.quantize(%x)
                                                                 %y = call_module[a](%x, lp_casts=(%q, None),
                                                                                     lp_origins=(%n,))

No node of the graph writes into %x between the two (passes/analysis/writes.py), but hooks run there, which may hand the
leaf another tensor, or write into this one. The leaf then casts what arrives. Engines that hand down an alias of %x, as
ZeRO-3 does to be told of backward, still share its casts.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from passes.fed_leaves import QUANTIZE, SCALE
from passes.ir.program import CASTS

ORIGINS = "lp_origins"
"""The keyword of the notes, beside `lp_casts`: that of the leaf's input, then those of what else was cast."""

Note = tuple[Tensor, int] | None
"""A tensor and its version when it was cast; None where hooks may change it unseen."""


def note(x: Tensor, *called: nn.Module) -> Note:
    """What is known of x when it is cast, to be read when the last of `called` is entered.

    Traced code and inference tensors have no versions: there the casts stand only if nothing has hooks.
    """
    if torch.compiler.is_compiling() or x.is_inference():
        is_hooked = any(each._forward_pre_hooks or each._forward_hooks for root in called for each in root.modules())
        return None if is_hooked or any(_GLOBAL_HOOKS) else (x, 0)
    return x, x._version


def is_origin(x: Tensor, notes: Sequence[Note]) -> bool:
    """Whether x is what the first note is of, or an alias of it, and nothing noted has been written into."""
    for each in notes:
        if each is None:
            return False
        if torch.compiler.is_compiling() or each[0].is_inference():
            continue
        if each[0]._version != each[1]:
            return False
    first = notes[0]
    return first is not None and (x is first[0] or _is_alias(x, first[0]))


def with_origins(graph: fx.Graph) -> fx.Graph:
    """A copy of a module's graph that notes the origins of the casts it hands down; the graph itself if there are
    none.
    """
    if not any(CASTS in node.kwargs for node in graph.nodes):
        return graph
    graph = copy.deepcopy(graph)
    order = {node: number for number, node in enumerate(graph.nodes)}
    last_call: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    wanted: list[tuple[fx.Node, list[tuple[fx.Node, fx.Node]]]] = []
    for call in graph.find_nodes(op="call_module"):
        if CASTS in call.kwargs:
            keys = _notes_of(call, order)
            last_call |= dict.fromkeys(keys, call)
            wanted.append((call, keys))
    calls = graph.find_nodes(op="call_module")
    made: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for (x, place), last in last_call.items():
        called = dict.fromkeys(str(each.target) for each in calls if order[place] <= order[each] <= order[last])
        with graph.inserting_before(place):
            children = [graph.get_attr(path) for path in called]
            made[x, place] = graph.call_function(note, (x, *children))
    for call, keys in wanted:
        call.kwargs = {**call.kwargs, ORIGINS: tuple(made[key] for key in keys)}
    return graph


def _notes_of(call: fx.Node, order: dict[fx.Node, int]) -> list[tuple[fx.Node, fx.Node]]:
    """(tensor, node before which to note it) of what a call's casts were made from, its input first: each before its
    first cast, and an input that is only made after it where it is made.
    """
    (x,) = call.args
    assert isinstance(x, fx.Node)
    first: dict[fx.Node, fx.Node] = {}
    for cast in sorted(_casts(call), key=order.__getitem__):
        source = cast.args[0]
        assert isinstance(source, fx.Node)
        first.setdefault(source, cast)
    place = first.pop(x, x.next)
    while place.op == "placeholder":
        place = place.next
    return [(x, place), *first.items()]


def _casts(call: fx.Node) -> set[fx.Node]:
    """The casts that those handed to a call are, or were cut and copied from."""
    waiting = [each for each in call.kwargs[CASTS] if isinstance(each, fx.Node)]  # type: ignore[union-attr]
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node.target in (QUANTIZE, SCALE):
            found.add(node)
        elif node.op != "call_module":
            waiting += node.all_input_nodes
    return found


def _is_alias(x: Tensor, other: Tensor) -> bool:
    return (
        type(x) is type(other)
        and x.untyped_storage()._cdata == other.untyped_storage()._cdata
        and x.storage_offset() == other.storage_offset()
        and (x.shape, x.stride(), x.dtype, x.device) == (other.shape, other.stride(), other.dtype, other.device)
        and (x.is_inference() or x._version == other._version)
    )


_GLOBAL_HOOKS = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
)
