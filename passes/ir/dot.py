"""Dot: a program as Graphviz text. One cluster per graph; an edge that carries grid values has the colour of its format
and says it.

    lpcompile opt gpt --policy hfp8 --dot gpt.dot && dot -Tsvg gpt.dot -o gpt.svg
"""

from collections.abc import Iterator

from torch import fx

from passes.ir.program import SITE, Program
from passes.ir.targets import name_of
from passes.ir.types import types_of
from runtime.ops.dialect import OP_OF
from runtime.ops.types import QuantType


def print_dot(program: Program) -> str:
    """The text of a directed graph; formats get colours in the order in which they appear."""
    colours: dict[str, str] = {}
    lines = ["digraph lpcompile {", "  rankdir=TB; node [shape=box, fontname=monospace, fontsize=10];"]
    for number, (name, graph) in enumerate(program.graphs()):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(name)};"]
        lines += [f"    {line}" for line in _nodes(graph, number)]
        lines += [f"    {line}" for line in _edges(graph, number, colours)]
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def _nodes(graph: fx.Graph, number: int) -> Iterator[str]:
    for node in graph.nodes:
        label = f"%{node.name}\n{_what(node)}"
        if SITE in node.meta:
            label += f"\n{node.meta[SITE]}"
        style = ", style=filled, fillcolor=lightyellow" if node.target in OP_OF else ""
        yield f"n{number}_{node.name} [label={_quoted(label)}{style}];"


def _edges(graph: fx.Graph, number: int, colours: dict[str, str]) -> Iterator[str]:
    types = types_of(graph)
    for node in graph.nodes:
        for source in node.all_input_nodes:
            kind, style = types[source], ""
            if isinstance(kind, QuantType):
                colour = colours.setdefault(kind.format, _COLOURS[len(colours) % len(_COLOURS)])
                style = f" [color={colour}, fontcolor={colour}, penwidth=2, label={_quoted(kind.format)}]"
            yield f"n{number}_{source.name} -> n{number}_{node.name}{style};"


def _what(node: fx.Node) -> str:
    if node.op == "call_function" and node.target in OP_OF:
        return OP_OF[node.target].name
    if node.op in ("placeholder", "output"):
        return node.op
    target = node.target if isinstance(node.target, str) else name_of(node.target) or str(node.target)
    return f"{node.op} {target}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


_COLOURS = ("red3", "blue3", "darkgreen", "darkorange", "purple3", "deeppink3", "turquoise4", "sienna")
