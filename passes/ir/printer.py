"""The printer: a program as text, which passes/ir/parser.py reads back. docs/ir.md has the grammar."""

from collections.abc import Mapping
from typing import Any

from torch import fx

from passes.ir.arguments import Unprintable, print_arguments
from passes.ir.operands import GIVEN, operands_of
from passes.ir.program import NODE_META, Program, Unit
from passes.ir.syntax import Attribute, OpText, Value, write_attribute, write_op
from passes.ir.targets import is_target, name_of
from passes.ir.types import types_of
from runtime.errors import NotSupported
from runtime.numerics.specs import ROLES
from runtime.ops.declared import OpDef
from runtime.ops.dialect import OP_OF


def print_program(program: Program) -> str:
    """Generic MLIR: one builtin.module of the record, the sites and every graph. The program must verify.

    Raises NotSupported, naming the node, for a value or a function that has no text.
    """
    body = [_op("lp.program", {"device": program.device, "passes": ",".join(program.passes)})]
    body += [_op("lp.finding", vars(finding)) for finding in program.findings]
    body += [_op("lp.site", _site(program, name)) for name in _site_names(program)]
    for name, unit in program.units.items():
        body.append(_graph(name, unit))
    return "\n".join(write_op(OpText("builtin.module", 0, body=body))) + "\n"


def _site_names(program: Program) -> list[str]:
    return list(dict.fromkeys([*program.specs, *program.refusals, *program.decisions, *program.choices]))


def _site(program: Program, name: str) -> dict[str, Any]:
    site: dict[str, Any] = {"name": name}
    if name in program.specs:
        site["spec"] = str(program.specs[name])
    if name in program.refusals:
        site["refusal"] = program.refusals[name]
    if name in program.decisions:
        site["decisions"] = dict(program.decisions[name])
    for role in ROLES:
        if role in program.choices.get(name, {}):
            site[role] = dict(vars(program.choices[name][role]))
    return site


def _graph(name: str, unit: Unit) -> OpText:
    graph = unit.graph
    printer = _GraphPrinter(name, graph)
    attributes: dict[str, Any] = {"sym_name": name, "path": unit.path, "kind": unit.kind}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if placeholders != list(graph.nodes)[: len(placeholders)]:
        raise NotSupported("a placeholder after other nodes has no text", where=name)
    inputs = [printer.input(node) for node in placeholders]
    if any(inputs):
        attributes["arg_attrs"] = inputs
    op = _op("torch.graph", attributes)
    op.inputs = [(Value(node.name, 0), printer.types[node]) for node in placeholders]
    op.body = [printer.node(node) for node in graph.nodes if node.op != "placeholder"]
    return op


class _GraphPrinter:
    """Nodes of one graph as operations; knows the graph's name, for errors."""

    def __init__(self, name: str, graph: fx.Graph) -> None:
        self._name, self.types = name, types_of(graph)

    def input(self, node: fx.Node) -> dict[str, Any]:
        """What is known of a placeholder beside its name and type."""
        attributes: dict[str, Any] = {}
        if node.target != node.name:
            attributes["name"] = node.target
        if node.args:
            attributes["default"] = self._arguments(node)[0]
        return {**attributes, **self._meta(node)}

    def node(self, node: fx.Node) -> OpText:
        if node.op == "call_function" and node.target in OP_OF:
            return self._lp(node, OP_OF[node.target])
        attributes: dict[str, Any] = {}
        if node.op != "output":
            attributes["target"] = self._target(node)
        args = node.args[0] if node.op == "output" else node.args
        text, operands = self._arguments(node)
        if node.kwargs or not isinstance(args, tuple) or args != tuple(operands):
            attributes["args"] = text
        name = "torch.return" if node.op == "output" else f"torch.{node.op}"
        return self._with_values(_op(name, {**attributes, **self._meta(node)}), node, operands)

    def _lp(self, node: fx.Node, op: OpDef) -> OpText:
        attributes = {each.name: node.kwargs[each.name] for each in op.attributes if each.name in node.kwargs}
        if any(each.is_optional for each in op.operands):
            attributes[GIVEN] = [name for name, value in operands_of(node).items() if value is not None]
        operands = [value for value in node.args if isinstance(value, fx.Node)]
        return self._with_values(_op(op.name, {**attributes, **self._meta(node)}), node, operands)

    def _with_values(self, op: OpText, node: fx.Node, operands: list[fx.Node]) -> OpText:
        op.operands = [Value(operand.name, 0) for operand in operands]
        op.operand_types = [(self.types[operand], 0) for operand in operands]
        if node.op != "output":
            op.results, op.result_types = [Value(node.name, 0)], [(self.types[node], 0)]
        return op

    def _target(self, node: fx.Node) -> str:
        if isinstance(node.target, str):
            return node.target
        name = name_of(node.target)
        if name is None or not is_target(name):
            raise self._unprintable(node, f"the function {node.target!r}", "a function that is found by its name")
        return name

    def _arguments(self, node: fx.Node) -> tuple[str, list[fx.Node]]:
        try:
            return print_arguments(node.args, dict(node.kwargs))
        except Unprintable as error:
            raise self._unprintable(node, str(error), "plain values, and tuples, lists and dicts of them") from None

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        printed: dict[str, Any] = {}
        for key, value in node.meta.items():
            if not key.startswith("lp_") or not value:
                continue
            if key not in NODE_META:
                raise self._unprintable(node, f"meta key {key}", f"one of {', '.join(NODE_META)}")
            printed[meta_attribute(key)] = str(value) if hasattr(NODE_META[key], "parse") else value
            try:
                write_attribute(printed[meta_attribute(key)])
            except TypeError as error:
                raise self._unprintable(node, f"{error} under {key}", "a plain value") from None
        return printed

    def _unprintable(self, node: fx.Node, what: str, expected: str) -> NotSupported:
        return NotSupported(f"{what} has no text", where=f"{self._name}: %{node.name}", expected=expected)


def meta_attribute(key: str) -> str:
    """How a key of `node.meta` is written: lp_site as lp.site."""
    return f"lp.{key.removeprefix('lp_')}"


def _op(name: str, attributes: Mapping[str, Any]) -> OpText:
    return OpText(name, 0, attributes={key: Attribute(value, 0) for key, value in attributes.items()})
