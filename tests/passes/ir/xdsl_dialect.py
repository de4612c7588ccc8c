"""The dialect: what runtime/ops/dialect.py and passes/ir/structure.py declare, as xdsl dialects that verify the text.

A second reader of texts, which shares the declarations with parser and verifier; only this file imports xdsl.
"""

from collections.abc import Callable, Mapping
from typing import Any

from passes.ir.arguments import ArgumentsError, parse_arguments
from passes.ir.operands import GIVEN, names_of
from passes.ir.printer import meta_attribute
from passes.ir.program import NODE_META, STATE
from passes.ir.records import wrong_choice, wrong_device, wrong_passes
from passes.ir.structure import STRUCTURES, Structure
from passes.ir.syntax import Source, _Reader
from passes.ir.targets import find_target
from runtime.errors import LpError, NotSupported, VerifyError
from runtime.numerics.block_formats import is_block_format
from runtime.numerics.formats import get_format
from runtime.numerics.specs import ROLES, LayerSpec
from runtime.ops.declared import OpDef
from runtime.ops.dialect import OPS
from runtime.ops.types import VALUE, OpType, PlainType, QuantType, accepts

try:
    from xdsl.context import Context
    from xdsl.dialects.builtin import (
        ArrayAttr,
        Builtin,
        DictionaryAttr,
        FloatAttr,
        IntegerAttr,
        StringAttr,
    )
    from xdsl.ir import Attribute, Dialect, Operation, ParametrizedAttribute, TypeAttribute
    from xdsl.irdl import (
        AnyAttr,
        IRDLOperation,
        attr_def,
        irdl_attr_definition,
        irdl_op_definition,
        opt_attr_def,
        opt_prop_def,
        prop_def,
        region_def,
        result_def,
        traits_def,
        var_operand_def,
    )
    from xdsl.parser import Parser
    from xdsl.traits import IsTerminator, SymbolOpInterface
    from xdsl.utils.exceptions import ParseError as XdslParseError
    from xdsl.utils.exceptions import VerifyException
except ModuleNotFoundError as error:
    raise NotSupported(
        "the xdsl dialect needs xdsl, which is not installed",
        where="tests.passes.ir.xdsl_dialect",
        got=str(error),
        hint="pip install 'lpcompile[dev]'",
    ) from error


def verify_text(text: str, file: str = "<text>") -> None:
    """Let xdsl parse and verify a printed program, operations that no declaration knows being errors.

    Raises VerifyError with xdsl's sentence.
    """
    context = Context(allow_unregistered=False)
    for dialect in (Builtin, LP, TORCH):
        context.load_dialect(dialect)
    try:
        Parser(context, text, file).parse_module().verify()
    except (XdslParseError, VerifyException) as error:
        raise VerifyError(str(error), where=file) from error


# -- types -------------------------------------------------------------------------------------------------------------


@irdl_attr_definition
class QuantAttribute(ParametrizedAttribute, TypeAttribute):
    """!lp.quant<"e4m3", "row", 1, tensor<4x8xbf16>>"""

    name = "lp.quant"
    format: StringAttr
    granularity: StringAttr
    axis: Attribute
    storage: Attribute

    def verify(self) -> None:
        try:
            if not is_block_format(self.format.data):
                get_format(self.format.data)
            kind = _read_type(str(self))
        except LpError as error:
            raise VerifyException(str(error)) from error
        axis = {"row": 1, "column": 0, "batched-column": 0}.get(self.granularity.data)
        if not isinstance(kind, QuantType) or kind.axis != axis:
            raise VerifyException(f"{self}: the axis of {self.granularity.data} is {axis}")


@irdl_attr_definition
class StateAttribute(ParametrizedAttribute, TypeAttribute):
    """!lp.state"""

    name = "lp.state"


@irdl_attr_definition
class ValueAttribute(ParametrizedAttribute, TypeAttribute):
    """!torch.value"""

    name = "torch.value"


def _read_type(text: str) -> OpType:
    return _Reader(Source(text, "<type>")).type()


def _type(attribute: Attribute) -> OpType:
    try:
        return _read_type(str(attribute))
    except LpError as error:
        raise VerifyException(f"{attribute} is no type of a value") from error


# -- lp ops ------------------------------------------------------------------------------------------------------------


def _lp_op(declared: OpDef) -> type[IRDLOperation]:
    """An lp op: its operands and attributes by name, its rules, and its result's type."""

    def verify_(self: Operation) -> None:
        attributes, given = _values(self), _given(self, declared)
        types = {}
        for operand in declared.operands:
            value = given.get(operand.name)
            if value is None and not operand.is_optional:
                raise VerifyException(f"operand {operand.name} is missing")
            types[operand.name] = kind = None if value is None else _type(value.type)
            if kind is not None and not accepts(operand.kind, kind):
                raise VerifyException(f"operand {operand.name} is no {operand.kind}, but {kind}")
        _refuse_unknown(self, {attribute.name for attribute in declared.attributes})
        for rule in declared.rules:
            if not rule.holds(attributes):
                raise VerifyException(rule.sentence)
        for type_rule in declared.type_rules:
            if not type_rule.holds(types, attributes):
                raise VerifyException(type_rule.sentence)
        try:
            wanted = declared.result(types, attributes)
        except (RuntimeError, ValueError) as error:
            raise VerifyException("the sizes of its operands do not fit") from error
        if wanted is not VALUE and wanted != _type(self.results[0].type):
            raise VerifyException(f"the result is {wanted}, not {self.results[0].type}")

    body: dict[str, Any] = {"verify_": verify_, "result_": result_def(AnyAttr())}
    body["operands_"] = var_operand_def(AnyAttr())
    if any(operand.is_optional for operand in declared.operands):
        body["given_"] = attr_def(ArrayAttr, attr_name=GIVEN)
    for attribute in declared.attributes:
        define = opt_attr_def if attribute.is_optional else attr_def
        body[f"{attribute.name}_"] = define(_KINDS[attribute.kind], attr_name=attribute.name)
    return _define(declared.name, body)


def _given(op: Operation, declared: OpDef) -> dict[str, Any]:
    """The operands of an op by name: as its attribute says, or all that are declared."""
    known = names_of(declared)
    names = _plain(op.attributes[GIVEN]) if GIVEN in op.attributes else known
    if [name for name in known if name in names] != names or len(names) != len(op.operands):
        raise VerifyException(f"{op.name} has {len(op.operands)} operands, and names {names} of {known}")
    return dict(zip(names, op.operands))


# -- the rest ----------------------------------------------------------------------------------------------------------


def _structure(declared: Structure) -> type[IRDLOperation]:
    def verify_(self: Operation) -> None:
        _refuse_unknown(self, {*declared.attributes, *declared.optional})
        _CHECKS.get(declared.name, lambda op, values: None)(self, _values(self))

    body: dict[str, Any] = {"verify_": verify_}
    for names, is_optional in ((declared.attributes, False), (declared.optional, True)):
        for name, kind in names.items():
            if declared.has_body:  # before the region, where properties stand
                body[f"{name}_"] = (opt_prop_def if is_optional else prop_def)(_KINDS[kind], prop_name=name)
            else:
                body[f"{name}_"] = (opt_attr_def if is_optional else attr_def)(_KINDS[kind], attr_name=name)
    if declared.takes_operands:
        body["operands_"] = var_operand_def(AnyAttr())
    if declared.has_result:
        body["result_"] = result_def(AnyAttr())
    if declared.has_body:
        body["body_"] = region_def("single_block")
        body["traits"] = traits_def(SymbolOpInterface())
    if declared.name == "torch.return":
        body["traits"] = traits_def(IsTerminator())
    return _define(declared.name, body)


def _check_call(op: Operation, values: Mapping[str, Any]) -> None:
    if "args" in values:
        try:
            parse_arguments(values["args"], list(op.operands))
        except ArgumentsError as error:
            raise VerifyException(f"args: expected {error.expected}, got {error.got}") from error
    for value in op.operands:
        _type(value.type)
    for result in op.results:
        if isinstance(_type(result.type), QuantType):
            raise VerifyException("only lp ops make quantized values")
    if op.name == "torch.call_function":
        try:
            find_target(values["target"])
        except LookupError as error:
            raise VerifyException(f"{values['target']} is not a function; try {error.args[0]}") from error


def _check_get_attr(op: Operation, values: Mapping[str, Any]) -> None:
    if (values["target"] == STATE) != (_type(op.results[0].type) is PlainType.STATE):
        raise VerifyException(f"!lp.state is the type of {STATE}, and of nothing else")


def _check_graph(op: Operation, values: Mapping[str, Any]) -> None:
    block = op.regions[0].block
    last = block.last_op
    if last is None or last.name != "torch.return":
        raise VerifyException("a graph ends with torch.return")
    if values["kind"] not in ("leaf", "module"):
        raise VerifyException(f"{values['kind']} is no kind of graph")
    if "arg_attrs" in values and len(values["arg_attrs"]) != len(block.args):
        raise VerifyException("arg_attrs are one {...} per argument")


def _check_site(op: Operation, values: Mapping[str, Any]) -> None:
    if "spec" in values:
        _parse_spec(values["spec"])
    for role in ROLES:
        if role in values and (expected := wrong_choice(values[role])):
            raise VerifyException(f"{role} is not a choice: expected {expected}")


def _check_program(op: Operation, values: Mapping[str, Any]) -> None:
    for key, wrong in (("device", wrong_device), ("passes", wrong_passes)):
        if expected := wrong(values[key]):
            raise VerifyException(f"{key}: expected {expected}, got {values[key]}")


def _parse_spec(text: str) -> None:
    try:
        LayerSpec.parse(text)
    except (LpError, ValueError, KeyError, TypeError) as error:
        raise VerifyException(f"not a LayerSpec: {text}") from error


_CHECKS: dict[str, Callable[[Operation, Mapping[str, Any]], None]] = {
    "torch.call_function": _check_call,
    "torch.call_method": _check_call,
    "torch.call_module": _check_call,
    "torch.return": _check_call,
    "torch.get_attr": _check_get_attr,
    "torch.graph": _check_graph,
    "lp.site": _check_site,
    "lp.program": _check_program,
}


def _refuse_unknown(op: Operation, declared: set[str]) -> None:
    """MLIR keeps attributes that nobody declared; a misspelt one must not pass."""
    for key, value in op.attributes.items():
        if key in _META:
            kind = NODE_META[_META[key]]
            is_parsed = hasattr(kind, "parse")
            if not isinstance(value, _KINDS[str if is_parsed else kind]):
                raise VerifyException(f"attribute {key} is {value}")
            if is_parsed:
                _parse_spec(_plain(value))
        elif key not in declared and key != GIVEN:
            raise VerifyException(f"{op.name} has no attribute {key}")


def _values(op: Operation) -> dict[str, Any]:
    """Declared attributes and properties as plain values."""
    given = {**op.properties, **op.attributes}
    return {key: _plain(value) for key, value in given.items() if key not in _META and key != GIVEN}


def _plain(value: Attribute) -> Any:
    if isinstance(value, StringAttr):
        return value.data
    if isinstance(value, IntegerAttr | FloatAttr):
        return value.value.data
    if isinstance(value, ArrayAttr):
        return [_plain(each) for each in value.data]
    if isinstance(value, DictionaryAttr):
        return {key: _plain(each) for key, each in value.data.items()}
    return value


def _define(name: str, body: dict[str, Any]) -> type[IRDLOperation]:
    return irdl_op_definition(type(name.replace(".", "_"), (IRDLOperation,), {"name": name, **body}))


_META = {meta_attribute(key): key for key in NODE_META}
_KINDS: dict[type, Any] = {
    str: StringAttr,
    int: IntegerAttr,
    float: FloatAttr,
    bool: IntegerAttr,
    list: ArrayAttr,
    dict: DictionaryAttr,
}

LP = Dialect(
    "lp",
    [*map(_lp_op, OPS.values()), *(_structure(each) for name, each in STRUCTURES.items() if name.startswith("lp."))],
    [QuantAttribute, StateAttribute],
)
TORCH = Dialect(
    "torch", [_structure(each) for name, each in STRUCTURES.items() if name.startswith("torch.")], [ValueAttribute]
)
