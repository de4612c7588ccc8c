"""The parser: text that the printer wrote, or a person, as a program. Every error says FILE:line:column.

Syntax is read into a tree (passes/ir/syntax.py), and the tree is checked against the declarations of
runtime/ops/dialect.py and passes/ir/structure.py as the graphs are built: names, operand counts, attributes, types, and
each op's own rules.
"""

import keyword
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import fx

from passes.finding import Finding
from passes.ir.arguments import ArgumentsError, parse_arguments
from passes.ir.operands import GIVEN, names_of
from passes.ir.printer import meta_attribute
from passes.ir.program import NODE_META, Program, Unit, site_numbers
from passes.ir.records import wrong_choice, wrong_device, wrong_passes
from passes.ir.structure import STRUCTURES
from passes.ir.syntax import OpText, Source, read_op
from passes.ir.targets import find_target
from passes.ir.torch_calls import wrong_call
from passes.ir.types import META, tensor_meta, type_of
from passes.ir.verifier import verify, verify_node, verify_site
from passes.manager import split_items
from runtime.errors import LpError, VerifyError, nearest_names
from runtime.kernels.registry import Choice
from runtime.numerics.specs import ROLES, LayerSpec
from runtime.ops.declared import OpDef
from runtime.ops.dialect import OP_OF, OPS
from runtime.ops.types import OpType, TensorType


def parse_program(text: str, file: str = "<text>") -> Program:
    """The program of a text. `print_program(parse_program(text)) == text` for a text that print_program wrote.

    Reading runs nothing that the text names: functions come from the table of passes/ir/targets.py. Raises ParseError.
    """
    program = _ProgramReader(Source(text, file)).program()
    verify(program)
    return program


class _Checker:
    """What an operation says, against a declaration."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def fail(self, place: int, what: str, **parts: str) -> NoReturn:
        self.source.fail(place, what, **parts)

    def attributes(self, op: OpText, required: Mapping[str, type], optional: Mapping[str, type]) -> dict[str, Any]:
        """The values of an operation's own attributes; those of meta and the names of operands are left out."""
        known = {**required, **optional}
        for key, attribute in op.attributes.items():
            if key in _META_KEYS or key == GIVEN:
                continue
            if key not in known:
                names = (*known, *_META_KEYS) if key.startswith("lp.") else tuple(known)
                hint = nearest_names(key, names) if names else ""
                self.fail(attribute.place, f"{op.name} has no attribute {key}", hint=hint)
            if type(attribute.value) is not known[key]:
                what, expected = f"attribute {key} has another type", _KIND_NAMES[known[key]]
                self.fail(attribute.place, what, expected=expected, got=repr(attribute.value))
        for key in required:
            if key not in op.attributes:
                given = ", ".join(op.attributes) or "none"
                self.fail(op.place, f"{op.name} needs the attribute {key}", expected=", ".join(required), got=given)
        return {key: attribute.value for key, attribute in op.attributes.items() if key in known}

    def meta(self, given: Mapping[str, Any], place: int) -> dict[str, Any]:
        """What goes into a node's meta, by its key there."""
        found: dict[str, Any] = {}
        for key, value in given.items():
            if key not in _META_KEYS:
                continue
            name = _META_KEYS[key]
            kind: Any = NODE_META[name]
            is_parsed = hasattr(kind, "parse")
            if type(value) is not (str if is_parsed else kind):
                expected = _KIND_NAMES[str if is_parsed else kind]
                self.fail(place, f"attribute {key} has another type", expected=expected, got=repr(value))
            found[name] = self.parsed(kind, value, place) if is_parsed else value
        return found

    def parsed(self, kind: Any, text: str, place: int) -> Any:
        try:
            return kind.parse(text)
        except (LpError, ValueError, KeyError, TypeError) as error:
            sentence = error.what if isinstance(error, LpError) else f"not a {kind.__name__}"
            hint = error.hint if isinstance(error, LpError) else ""
            expected = error.expected if isinstance(error, LpError) else "fwd: ...; bwd: ...; grad: ..."
            self.fail(place, sentence, expected=expected, got=text, hint=hint)

    def structure(self, op: OpText) -> dict[str, Any]:
        """The attributes of an operation of STRUCTURES, which otherwise is as declared."""
        declared = STRUCTURES[op.name]
        if op.operands and not declared.takes_operands:
            self.fail(op.operands[0].place, f"{op.name} takes no operands")
        if len(op.results) != declared.has_result:
            expected = "one result" if declared.has_result else "no result"
            self.fail(op.place, f"{op.name} has another number of results", expected=expected, got=str(len(op.results)))
        if (op.body is not None) != declared.has_body:
            self.fail(op.place, f"{op.name} has {'a' if declared.has_body else 'no'} region")
        return self.attributes(op, declared.attributes, declared.optional)

    def one_of(self, op: OpText, names: tuple[str, ...], what: str) -> None:
        if op.name not in names:
            self.fail(op.place, f'"{op.name}" is no {what}', hint=nearest_names(op.name, names))


class _ProgramReader:
    def __init__(self, source: Source) -> None:
        self._source, self._check = source, _Checker(source)
        self._program = Program({}, {})
        self._seen: set[tuple[str, str]] = set()
        self._lp_nodes: list[tuple[str, fx.Node, int]] = []

    def program(self) -> Program:
        """Raises ParseError where the text says, VerifyError for what no one place of it is."""
        module = read_op(self._source)
        self._check.one_of(module, ("builtin.module",), "module")
        self._check.structure(module)
        for op in module.body or []:
            self._check.one_of(op, ("lp.program", "lp.finding", "lp.site", "torch.graph"), "part of a module")
            values = self._check.structure(op)
            self._once(op, values)
            if op.name == "torch.graph":
                self._graph(op, values)
            elif op.name == "lp.site":
                self._site(op, values)
            elif op.name == "lp.finding":
                self._program.findings.append(Finding(**values))
            else:
                self._record(op, values)
        numbers = site_numbers(self._program)
        for name, node, place in self._lp_nodes:  # sites may stand after the graphs
            try:
                verify_site(self._program, numbers, name, node)
            except VerifyError as error:
                what, hint = f"{OP_OF[node.target].name}: {error.what}", error.hint  # type: ignore[index]
                self._check.fail(place, what, expected=error.expected, got=error.got, hint=hint)
        return self._program

    def _once(self, op: OpText, values: dict[str, Any]) -> None:
        """A program has one record, and one site of a name."""
        key = op.name, values.get("name", "")
        if op.name in ("lp.program", "lp.site") and key in self._seen:
            place = op.attributes["name"].place if "name" in values else op.place
            self._check.fail(place, f"{op.name} {key[1]} is there twice".replace("  ", " "))
        self._seen.add(key)

    def _record(self, op: OpText, values: dict[str, Any]) -> None:
        for key, wrong in (("device", wrong_device), ("passes", wrong_passes)):
            if expected := wrong(values[key]):
                self._check.fail(op.attributes[key].place, f"not {key}", expected=expected, got=values[key])
        self._program.device = values["device"]
        self._program.passes = split_items(values["passes"])

    def _site(self, op: OpText, values: dict[str, Any]) -> None:
        values = {key: _renamed(value) if key in ROLES else value for key, value in values.items()}
        name, program = values["name"], self._program
        if "spec" in values:
            program.specs[name] = self._check.parsed(LayerSpec, values["spec"], op.attributes["spec"].place)
        if "refusal" in values:
            program.refusals[name] = values["refusal"]
        if "decisions" in values:
            program.decisions[name] = values["decisions"]
        for role in ROLES:
            if role in values:
                if expected := wrong_choice(values[role]):
                    got = ", ".join(f"{key} {value}" for key, value in values[role].items() if key != "reason")
                    self._check.fail(op.attributes[role].place, "not a choice", expected=expected, got=got)
                program.choices.setdefault(name, {})[role] = Choice(**values[role])

    def _graph(self, op: OpText, values: dict[str, Any]) -> None:
        units, name, kind = self._program.units, values["sym_name"], values["kind"]
        place = op.attributes["sym_name"].place
        reader = _GraphReader(self._check, name, op)
        graph = reader.graph(values.get("arg_attrs"))
        self._lp_nodes += [(name, node, place) for node, place in reader.lp_nodes]
        if kind not in ("leaf", "module"):
            place = op.attributes["kind"].place
            self._check.fail(place, "not a kind of graph", expected="leaf or module", got=kind)
        if name in units:
            self._check.fail(place, f'the graph "{name}" is there twice')
        units[name] = Unit(values["path"], graph, kind)


class _GraphReader:
    """One graph, node by node."""

    def __init__(self, check: _Checker, name: str, op: OpText) -> None:
        self._check, self._name, self._op = check, name, op
        self._graph = fx.Graph()
        self._values: dict[str, fx.Node] = {}
        self._types: dict[fx.Node, OpType] = {}
        self.lp_nodes: list[tuple[fx.Node, int]] = []

    def graph(self, inputs: list[Any] | None) -> fx.Graph:
        op = self._op
        place = op.attributes["arg_attrs"].place if inputs is not None else op.place
        inputs = [{} for _ in op.inputs] if inputs is None else inputs
        if len(inputs) != len(op.inputs) or not all(isinstance(each, dict) for each in inputs):
            self._check.fail(place, "arg_attrs are not one {...} per argument", expected=str(len(op.inputs)))
        for (value, kind), given in zip(op.inputs, inputs):
            unknown = [key for key in given if key not in ("name", "default", *_META_KEYS)]
            if unknown:
                hint = nearest_names(unknown[0], ("name", "default", *_META_KEYS))
                self._check.fail(place, f"an argument has no attribute {unknown[0]}", hint=hint)
            if not all(isinstance(given.get(key, ""), str) for key in ("name", "default")):
                self._check.fail(place, "the name and the default of an argument are strings", got=str(given))
            if not _is_name(given.get("name", "x").removeprefix("*").removeprefix("*")):
                self._check.fail(place, f'"{given["name"]}" is no name of an argument', expected=_A_NAME)
            args = self._arguments(given["default"], [], place)[0] if "default" in given else ()
            node = self._create(value.place, "placeholder", given.get("name", value.name), args, {}, value.name)
            self._finish(node, kind, value.place, self._check.meta(given, place))
        body = op.body or []
        if not body or body[-1].name != "torch.return":
            self._check.fail((body or [op])[-1].place, "a graph ends with torch.return")
        for each in body:
            self._node(each, is_last=each is body[-1])
        return self._graph

    def _node(self, op: OpText, is_last: bool) -> None:
        self._check.one_of(op, (*_NODE_OPS, *OPS), "operation of a graph")
        if (op.name == "torch.return") is not is_last:
            self._check.fail(op.place, "torch.return is not at the end of its graph")
        if op.name in OPS:
            self._lp(op, OPS[op.name])
            return
        values = self._check.structure(op)
        operands = self._operands(op)
        args: tuple[Any, ...] = tuple(operands)
        kwargs: dict[str, Any] = {}
        if "args" in values:
            args, kwargs = self._arguments(values["args"], operands, op.attributes["args"].place)
        if is_last:
            if "args" in values and (kwargs or len(args) != 1):
                self._check.fail(op.attributes["args"].place, "a graph gives one value", got=values["args"])
            self._graph.output(args[0] if "args" in values else args)
            return
        kind, target = op.name.removeprefix("torch."), values["target"]
        if kind == "call_function":
            target = self._function(target, op.attributes["target"].place)
        elif not (_is_name(target) if kind == "call_method" else _is_path(target)):
            expected = _A_NAME if kind == "call_method" else "a path, as layers.0.weight"
            self._check.fail(op.attributes["target"].place, f"not a target of {op.name}", expected=expected, got=target)
        node = self._create(op.results[0].place, kind, target, args, kwargs, op.results[0].name)
        if kind in ("call_function", "call_method") and len(op.result_types) == 1:
            expected, got = wrong_call(node, self._types, op.result_types[0][0])
            if expected:
                self._check.fail(op.place, f"{values['target']} is not called so", expected=expected, got=got)
        self._finish_op(node, op)

    def _lp(self, op: OpText, declared: OpDef) -> None:
        if len(op.results) != 1:
            self._check.fail(op.place, f"{op.name} has one result", got=str(len(op.results)))
        op.attributes = _renamed(op.attributes)
        required = {each.name: each.kind for each in declared.attributes if not each.is_optional}
        optional = {each.name: each.kind for each in declared.attributes if each.is_optional}
        values = self._check.attributes(op, required, optional)
        args = self._by_name(op, declared, self._operands(op))
        node = self._create(op.results[0].place, "call_function", declared.run, args, values, op.results[0].name)
        try:
            verify_node(self._name, node, declared, self._types)
        except VerifyError as error:
            self._check.fail(op.place, f"{op.name}: {error.what}", expected=error.expected, got=error.got)
        self.lp_nodes.append((node, op.place))
        self._finish_op(node, op)

    def _by_name(self, op: OpText, declared: OpDef, operands: list[fx.Node]) -> tuple[fx.Node | None, ...]:
        """One operand or None for each that is declared."""
        known, given = names_of(declared), op.attributes.get(GIVEN)
        listed = ", ".join(map(str, declared.operands))
        if not any(each.is_optional for each in declared.operands):
            if given is not None:
                self._check.fail(given.place, f"{op.name} has no optional operands")
            if len(operands) != len(known):
                self._check.fail(op.place, "wrong number of operands", expected=listed, got=str(len(operands)))
            return tuple(operands)
        if given is None:
            expected = f"the names of those that are given, of {listed}"
            self._check.fail(op.place, f"{op.name} needs {GIVEN}", expected=expected)
        names = given.value
        if not isinstance(names, list) or [name for name in known if name in names] != names:
            self._check.fail(given.place, f"wrong {GIVEN}", expected=f"names in the order {listed}", got=str(names))
        if len(names) != len(operands):
            expected = f"{len(names)}, as {GIVEN} says"
            self._check.fail(op.place, "wrong number of operands", expected=expected, got=str(len(operands)))
        return tuple(dict(zip(names, operands)).get(name) for name in known)

    def _operands(self, op: OpText) -> list[fx.Node]:
        if len(op.operands) != len(op.operand_types):
            expected = f"{len(op.operands)}, one for each operand"
            self._check.fail(
                op.place, "wrong number of operand types", expected=expected, got=str(len(op.operand_types))
            )
        operands = []
        for value, (kind, place) in zip(op.operands, op.operand_types):
            if value.name not in self._values:
                hint = nearest_names(value.name, tuple(self._values)) if self._values else ""
                self._check.fail(value.place, f"%{value.name} is not defined before its use", hint=hint)
            node = self._values[value.name]
            self._same_type(f"%{value.name}", self._types[node], kind, place)
            operands.append(node)
        return operands

    def _finish_op(self, node: fx.Node, op: OpText) -> None:
        meta = {key: each.value for key, each in op.attributes.items()}
        if len(op.result_types) != 1:
            self._check.fail(op.place, "wrong number of result types", expected="1", got=str(len(op.result_types)))
        self._finish(node, *op.result_types[0], self._check.meta(meta, op.place))

    def _finish(self, node: fx.Node, kind: OpType, place: int, meta: dict[str, Any]) -> None:
        node.meta.update(meta)
        if isinstance(kind, TensorType) and type_of(node, self._types) != kind:
            node.meta[META] = tensor_meta(kind)
        self._types[node] = type_of(node, self._types)
        self._same_type(f"%{node.name}", self._types[node], kind, place)

    def _same_type(self, what: str, expected: OpType, got: OpType, place: int) -> None:
        if expected != got:
            self._check.fail(place, f"{what} has another type", expected=str(expected), got=str(got))

    def _arguments(self, text: str, operands: list[fx.Node], place: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            return parse_arguments(text, operands)
        except ArgumentsError as error:
            what = f"cannot read these arguments at column {error.column + 1} of the text"
            self._check.fail(place, what, expected=error.expected, got=error.got)

    def _function(self, name: str, place: int) -> Any:
        try:
            return find_target(name)
        except LookupError as error:
            self._check.fail(place, f'"{name}" is not a function', hint=str(error.args[0]))

    def _create(self, place: int, op: str, target: Any, args: Any, kwargs: Any, name: str) -> fx.Node:
        if name in self._values:
            self._check.fail(place, f"%{name} is defined twice")
        if not _is_name(name):
            self._check.fail(place, f"%{name} is no name of a node", expected=_A_NAME)
        node = self._graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            self._check.fail(place, f"%{name} is no name of a node", expected=f"another, as %{node.name}")
        self._values[name] = node
        return node


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """With names as they are now, of a text that was written when some were others."""
    return {_OLD_NAMES.get(key, key): value for key, value in values.items()}


def _is_name(text: str) -> bool:
    return len(text) <= _LONGEST_NAME and text.isidentifier() and not keyword.iskeyword(text)


def _is_path(text: str) -> bool:
    """Of a module or a parameter: parts with a dot between two, and nothing that ends a string of Python's."""
    return all(part and part.isprintable() and not set(part) & set("\"'\\") for part in text.split("."))


_OLD_NAMES = {"method": "kernel", "methods": "kernels"}
_LONGEST_NAME = 500
_A_NAME = f"a name that Python can have, of at most {_LONGEST_NAME} characters"
_NODE_OPS = ("torch.get_attr", "torch.call_module", "torch.call_method", "torch.call_function", "torch.return")
_META_KEYS = {meta_attribute(key): key for key in NODE_META}
_KIND_NAMES = {
    str: "a string",
    int: "an integer",
    bool: "true or false",
    float: "a number",
    list: "[...]",
    dict: "{...}",
}
