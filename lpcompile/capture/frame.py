"""Frame: the graph of one call of one module's forward, while it grows.

A live tensor stands for the node that made it, by identity. What the graph cannot say ends the frame with a reason;
the forward runs on, since its children are recorded all the same.
"""

import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from lpcompile.capture.bystanders import FRAMEWORK, Held, Watch, held_objects
from lpcompile.capture.guards import (
    Fact,
    Guard,
    SizeFact,
    TensorFact,
    ValueFact,
    argument_facts,
    autocast_state,
    flatten_arguments,
    is_plain,
    plain_copy,
    with_article,
)
from lpcompile.capture.looks import Unseen, look_at
from lpcompile.capture.outside import Named, Outside
from lpcompile.capture.precedents import Precedent, Precedents
from lpcompile.capture.recording import LostProduct, Opaque, Recording
from lpcompile.capture.replay import Tape
from lpcompile.capture.script import look_outside
from lpcompile.capture.shapes import Shapes, concrete, hint
from lpcompile.frontends.graph_code import compile_graph, is_same_graph
from passes.ir.gemm_nodes import is_gemm, read_gemm


class Refusal(Exception):
    """A sentence about what a graph cannot say; completes "the forward of this module ..."."""


@dataclass(frozen=True)
class FunctionCall:
    """An autograd.Function as one target of a graph: its backward stays its own."""

    function: type[torch.autograd.Function]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)

    @property
    def __name__(self) -> str:
        return self.function.__name__


class Frame:
    """One call of `module.forward(*args, **kwargs)`, from entry to `finish`."""

    def __init__(
        self,
        module: nn.Module,
        path: str,
        forward: Callable[..., Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        caller: "Frame | None" = None,
        is_symbolic: bool = True,
        precedents: Precedents | None = None,
        signature: int | None = None,
        outside: Outside | None = None,
        held: Held | None = None,
    ) -> None:
        """Arguments that are sizes become sizes of this call: run the forward on `arguments`. `signature` is the
        module's, for finding a call in `precedents` to follow."""
        self.module, self.path = module, path
        self.opaque: Opaque | None = None
        self.reads_data = False
        self.reads_sizes = False
        self.reads_strides = False
        self.reads_grad_mode = False
        self.reads_inference_mode = False
        self.switches_grad_mode = False
        self.writes: dict[tuple[int, str], str] = {}
        """Where an attribute was last set: (id of the module, attribute) -> file:line."""
        self.tape = Tape()
        self.is_symbolic = is_symbolic
        self._products: list[LostProduct] = []
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._sizes: dict[sympy.Basic, fx.Node | int] = {}
        self._kept: list[Tensor] = []  # alive, so that no id is used twice
        self._unsized: set[int] = set()
        self._child_paths: dict[int, str] | None = None
        self._own_tensors: dict[int, str] | None = None
        self.definition = _definition(forward)
        self._grad_enabled = torch.is_grad_enabled()
        self._ambient = _ambient()
        self._training = module.training
        self._autocast = autocast_state()
        self._attributes: dict[str, ValueFact] = {}
        self._looks: dict[str, Any] = {}
        self._named: dict[Named, Any] = {}
        self._outside = outside or Outside()
        self._default_dtype = torch.get_default_dtype()
        self._inference_mode = torch.is_inference_mode_enabled()
        self._reads_made_sizes = False
        self._held = {id(held): name for name, held in held_objects(module).items()}
        self._subtree = list(module.modules())
        leaves, self._in_spec = flatten_arguments(args, kwargs)
        self._precedents = precedents
        self._precedent: Precedent | None = None
        key = None if precedents is None or not is_symbolic else _key(leaves, caller)
        self._key = None if key is None else (signature, self._ambient, key)
        if precedents is not None and self._key is not None:
            self._precedent = precedents.find(module, self._key, self._in_spec)
        self._shapes = Shapes(self._precedent.script if self._precedent else None) if is_symbolic else None
        self._leaves = self._take_sizes(leaves, caller)
        self.arguments: tuple[Any, Any] = (args, kwargs)
        if any(now is not before for now, before in zip(self._leaves, leaves)):
            self.arguments = pytree.tree_unflatten(self._leaves, self._in_spec)
        self._names = _leaf_names(forward, args, kwargs)
        self._facts = argument_facts(self._leaves)
        self._watch = Watch(module, self._subtree, held)
        self._follow(forward)
        self._note_unwatched()
        self._add_placeholders()

    # -- what the forward does ---------------------------------------------------------------------------------------

    @property
    def shapes(self) -> Shapes | None:
        """None where sizes are plain numbers: once the frame has failed, or by choice."""
        return self._shapes if self.opaque is None else None

    def tell_caller(self, caller: "Frame | None", result: Any) -> Any:
        """The result with sizes as the caller has them, who learns the sizes of its tensors."""
        if self.shapes is None or caller is None or caller.shapes is None:
            return concrete(result)
        return self.shapes.tell(caller.shapes, result)

    def fail(self, reason: str, *, where: str | None = None) -> None:
        """End the graph. The first reason counts."""
        if self.opaque is None:
            self.opaque = Opaque(reason, where or self._line())
            self.tape = Tape()

    def note_product(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A function runs that may multiply matrices. If the frame ends without a graph, it is lost, and told."""
        if not is_gemm(function):
            return
        scratch = fx.Graph()

        def stand(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            node = scratch.placeholder("operand")
            node.meta["tensor_meta"] = _extract_tensor_metadata(value)
            return node

        operands = fx.node.map_aggregate(tuple(args), stand), fx.node.map_aggregate(dict(kwargs), stand)
        gemm = read_gemm(scratch.call_function(function, *operands))
        if gemm is not None:
            self._products.append(LostProduct(gemm, self._line()))

    def note_event(
        self,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any = None,
        *,
        error: Exception | None = None,
    ) -> None:
        """An operation or a child gave `result` or raised, which a second run must find again."""
        if self.opaque is None:
            self.tape.add(target, args, kwargs, result, error)

    def prepare(self, op: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Node | None:
        """The node of an operation that is about to run; None once the frame has failed."""
        if self.opaque is not None:
            return None
        if _ambient() != self._ambient:
            self.fail("changes autocast, inference mode or the attention backend on its way")
            return None
        try:
            operands = tuple(self._operand(arg) for arg in args)
            options = {name: self._operand(arg) for name, arg in kwargs.items()}
        except Refusal as refusal:
            self.fail(f"passes {refusal} to {_target_name(target)}")
            return None
        return self._graph.create_node(op, target, operands, options)

    def bind(self, node: fx.Node | None, target: Any, result: Any, *, writes: bool = False) -> Any:
        """Let the tensors in `result` stand for `node`. Returns what the forward goes on with.

        A tensor handed through unchanged (a dropout with p = 0) is replaced by an alias: under another p the two
        differ, so they must be two nodes. In-place operations (`writes`) keep their tensor.
        """
        if node is None:
            return result
        try:
            return self._bind(node, result, writes)
        except Refusal as refusal:
            self.fail(f"gets {refusal} from {_target_name(target)}")
            return result

    def withdraw(self, node: fx.Node | None) -> None:
        """Take back the node of an operation that raised."""
        if node is not None:
            self._graph.erase_node(node)

    def child_path(self, module: nn.Module) -> str | None:
        """Path of a descendant relative to this module."""
        if self._child_paths is None:
            self._child_paths = {id(child): path for path, child in self.module.named_modules()}
        return self._child_paths.get(id(module)) or None

    def taint(self, result: Any) -> None:
        """The sizes of these tensors depend on data: reading them would burn data into the graph."""
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._unsized.add(id(leaf))
                self._kept.append(leaf)

    def is_tainted(self, values: Iterable[object]) -> bool:
        return bool(self._unsized) and any(id(leaf) in self._unsized for leaf in pytree.tree_leaves(list(values)))

    def note_read(self, owner: object, name: str, value: object) -> None:
        """The forward read an attribute of the module, a descendant or an object the module holds."""
        self.touch(owner)
        if name == "__dict__":
            return
        if owner is self.module:
            path = "" if name not in FRAMEWORK and not is_checkpoint_flag(owner, name) else None
        elif isinstance(owner, nn.Module):
            path = self.child_path(owner) if name == "training" or name not in FRAMEWORK else None
        else:
            path = self._held.get(id(owner))
        if path is None or self.opaque is not None:
            return
        path = f"{path}.{name}" if path else name
        copied = plain_copy(value)
        if copied is not None or value is None:
            self._attributes.setdefault(path, ValueFact(type(value), copied))
        elif not isinstance(value, (Tensor, nn.Module)) and id(value) not in self._held and path not in self._looks:
            try:
                self._looks[path] = look_at(value)
            except Unseen as reason:
                self.fail(f"reads the attribute {path}, {reason}")
            if callable(value):
                self._follow(value)

    def note_size_read(self, tensor: Tensor) -> None:
        """The forward read the size of a tensor. Of an argument it is in the guard, of a parameter it is its own, and
        of what was made it may be that of any parameter used."""
        if self.opaque is not None or any(tensor is leaf for leaf in self._leaves):
            return
        path = self._own_path(tensor)
        if path is None:
            self._reads_made_sizes = True
        else:
            self._looks.setdefault(f"{path}.shape", look_at(tensor.shape))

    def _follow(self, function: Callable[..., Any]) -> None:
        """What the function names outside of its arguments counts as read."""
        reads = self._outside.reads(function, type(self.module))
        self.reads_grad_mode |= reads.grad_mode
        if reads.refusal is not None:
            self.fail(reads.refusal, where=self.definition)
        for named in reads.named:
            if self.opaque is None and named not in self._named:
                value = named.value()
                self._watch.add_named(named, value)
                try:
                    self._named[named] = look_at(value)
                except Unseen as reason:
                    self.fail(f"reads {named}, {reason}", where=self.definition)

    def _note_shapes(self) -> None:
        """The shapes of the parameters that the graph uses, where the forward read a size that follows from them."""
        for node in self._graph.nodes:
            if node.op == "get_attr":
                tensor = operator.attrgetter(node.target)(self.module)
                self._looks.setdefault(f"{node.target}.shape", look_at(tensor.shape))
            elif node.op == "call_module":
                for name, parameter in self.module.get_submodule(node.target)._parameters.items():
                    if parameter is not None:
                        self._looks.setdefault(f"{node.target}.{name}.shape", look_at(parameter.shape))

    def note_kind_read(self, tensor: Tensor) -> None:
        """The forward read dtype or device of a tensor. Those of an argument are in the guard; those of a parameter
        are its own; those of whatever else follow from both, and for the module's parameters stands the first of each
        dtype and device: a model is moved as a whole."""
        if self.opaque is not None or any(tensor is leaf for leaf in self._leaves):
            return
        path = self._own_path(tensor)
        for each in self._kinds() if path is None else [path]:
            own = operator.attrgetter(each)(self.module)
            for name, value in (("dtype", own.dtype), ("device", own.device)):
                self._attributes.setdefault(f"{each}.{name}", ValueFact(type(value), value))

    def _kinds(self) -> list[str]:
        """The first parameter or buffer of each floating dtype and device in the module."""
        named = (*self.module.named_parameters(), *self.module.named_buffers())
        kinds = {(own.dtype, own.device): path for path, own in reversed(named) if own.is_floating_point()}
        return list(kinds.values())

    def touch(self, owner: object) -> None:
        """The forward is at an attribute of a module, which it may go on to change."""
        if self.opaque is None and isinstance(owner, nn.Module):
            self._watch.add(owner)

    def _note_unwatched(self) -> None:
        """Of an object whose class cannot be watched, every attribute counts as read."""
        for held in held_objects(self.module).values():
            if not is_watchable(type(held)):
                for name, value in vars(held).items():
                    self.note_read(held, name, value)

    # -- Python side effects -----------------------------------------------------------------------------------------

    def pause(self) -> None:
        """A child runs next: what changed until here, this forward changed."""
        if self.opaque is not None:
            return
        change = self._watch.first_change()
        if change is not None:
            owner, name = change
            if owner is None:
                self.fail(f"changes {name}, which it names", where=self.definition)
                return
            path = self.child_path(owner)
            label = f"{path}.{name}" if path else name
            self.fail(f"changes the attribute {label}", where=self._written_at(owner, name))
        elif self._watch.has_drawn():
            self.fail("draws from Python's or numpy's global random generator", where=self.definition)

    def resume(self) -> None:
        """The child is done: what it changed is its own affair."""
        if self.opaque is None:
            self._watch.start()

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self, result: Any) -> Recording | Opaque:
        """The recording, or why there is none."""
        self.pause()
        if torch.is_grad_enabled() is not self._grad_enabled:
            self.fail("leaves another grad mode behind", where=self.definition)
        leaves, spec = flatten_arguments(*self.arguments)
        if spec != self._in_spec or any(now is not before for now, before in zip(leaves, self._leaves)):
            self.fail("writes to a container among its arguments", where=self.definition)
        recording = self._seal(result) if self.opaque is None else None
        self._nodes.clear()
        self._kept.clear()
        self.tape = Tape()
        self._leaves = []
        self.arguments = ((), {})
        if recording is None:
            assert self.opaque is not None
            return replace(self.opaque, products=tuple(self._products))
        return recording

    def returns_tainted(self, result: Any) -> bool:
        return self.reads_data or self.is_tainted([result])

    def _seal(self, result: Any) -> Recording | None:
        leaves, out_spec = pytree.tree_flatten(result, is_leaf=lambda value: not isinstance(value, (tuple, list, dict)))
        try:
            outputs = tuple(self._operand(leaf) for leaf in leaves)
        except Refusal as refusal:
            self.fail(f"returns {refusal}", where=self.definition)
            return None
        self._graph.output(outputs)
        for node in reversed(self._graph.nodes):
            if node.target is operator.getitem and not node.users:
                self._graph.erase_node(node)
        recording = self._like_precedent(out_spec)
        if recording is not None:
            return recording
        try:
            compile_graph(self._graph)
        except (RuntimeError, SyntaxError, AttributeError) as error:
            self.fail(f"has no source text: {error}", where=self.definition)
            return None
        recording = Recording(self.path, self._graph, self._guard(), out_spec, self.switches_grad_mode)
        self._become_precedent(recording)
        return recording

    def _like_precedent(self, out_spec: pytree.TreeSpec) -> Recording | None:
        """The recording with the graph of the call that was followed; None if the two are not the same throughout."""
        if self._precedent is None:
            return None
        assert self._shapes is not None
        guard, twin = self._guard(), self._precedent.recording
        if self._shapes.script.state != self._precedent.state:
            self._shapes.forbid_following()  # this call made a condition that those after it need not obey
        if not self._shapes.follows or out_spec != twin.out_spec or not is_same_graph(self._graph, twin.graph):
            return None
        switches = self.switches_grad_mode
        return Recording(self.path, twin.graph, twin.guard if guard == twin.guard else guard, twin.out_spec, switches)

    def _become_precedent(self, recording: Recording) -> None:
        if self._precedents is None or self._key is None or self._precedent is not None or self._shapes is None:
            return
        script = self._shapes.script
        if script.is_good:
            precedent = Precedent(script, self._in_spec, recording, script.state)
            self._precedents.add(self.module, self._key, precedent)

    def _guard(self) -> Guard:
        if self.reads_strides and self._shapes is not None:
            self._shapes.fix_arguments()
        if self._reads_made_sizes:
            self._note_shapes()
        sizes, conditions = ({}, ()) if self._shapes is None else self._shapes.facts()
        facts = tuple(self._fact(fact, sizes.get(index)) for index, fact in enumerate(self._facts))
        return Guard(
            in_spec=self._in_spec,
            leaves=facts,
            names=self._names,
            training=self._training,
            grad_enabled=self._grad_enabled if self.reads_grad_mode or self.switches_grad_mode else None,
            autocast=self._autocast,
            attributes=tuple(self._attributes.items()),
            conditions=conditions,
            looks=tuple(self._looks.items()),
            outside=tuple(self._named.items()),
            default_dtype=self._default_dtype,
            inference_mode=self._inference_mode if self.reads_inference_mode else None,
        )

    def _fact(self, fact: Fact, sizes: tuple[int | str, ...] | None) -> Fact:
        if isinstance(fact, TensorFact):
            return replace(fact, shape=sizes or fact.shape, stride=fact.stride if self.reads_strides else None)
        return SizeFact(sizes[0]) if isinstance(fact, SizeFact) and sizes else fact

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _take_sizes(self, leaves: Sequence[Any], caller: "Frame | None") -> list[Any]:
        """The leaves, where sizes are those of this call."""
        shapes, known = self._shapes, caller.shapes if caller else None
        if shapes is None:
            return [concrete(leaf) for leaf in leaves]
        taken: list[Any] = []
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                is_known = known is not None and caller is not None and not caller.is_tainted([leaf])
                shapes.add_tensor(index, leaf, known.sizes(leaf) if known and is_known else None)
                taken.append(leaf)
            elif isinstance(leaf, torch.SymInt):
                taken.append(shapes.add_size(index, leaf, known=known is not None))
            else:
                if known is not None:
                    known.fix(list(leaf) if isinstance(leaf, torch.Size) else leaf)
                taken.append(concrete(leaf))
        return taken

    def _add_placeholders(self) -> None:
        self._placeholders: dict[int, fx.Node] = {}
        for index, (name, leaf) in enumerate(zip(self._names, self._leaves)):
            if isinstance(leaf, Tensor):
                if id(leaf) not in self._nodes:
                    self._placeholders[index] = self._graph.placeholder(_identifier(name))
                    self._stand_for(self._placeholders[index], leaf)
            elif isinstance(leaf, torch.SymInt):
                self._placeholders[index] = self._graph.placeholder(_identifier(name))
            elif not is_plain(leaf):
                self.fail(
                    f"takes {with_article(leaf)} as {name}, and only tensors, plain values and their tuples, lists"
                    " and dicts can be arguments of a graph",
                    where=self.definition,
                )

    def _stand_for(self, node: fx.Node, tensor: Tensor) -> None:
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)
        if tensor.layout is torch.strided:
            node.meta["tensor_meta"] = _extract_tensor_metadata(tensor)

    def _operand(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._nodes.get(id(value)) or self._own_tensor(value)
        if isinstance(value, torch.SymInt):
            return self._size(value.node.expr)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            return float(value) if isinstance(value, torch.SymFloat) else bool(value)
        if isinstance(value, torch.Size):
            return tuple(self._operand(size) for size in value)
        if type(value) is slice:
            return slice(self._operand(value.start), self._operand(value.stop), self._operand(value.step))
        if type(value) in (tuple, list):
            return type(value)(self._operand(item) for item in value)
        if type(value) is dict and all(type(key) is str for key in value):
            return {key: self._operand(item) for key, item in value.items()}
        if is_plain(value):
            return value
        raise Refusal(with_article(value))

    def _size(self, expression: sympy.Basic) -> fx.Node | int:
        """The nodes that compute a size from those of the arguments; a number where there is no node for it."""
        assert self._shapes is not None
        if expression.is_Integer:
            return int(expression)
        if expression not in self._sizes:
            self._sizes[expression] = self._new_size(self._shapes, expression)
        return self._sizes[expression]

    def _new_size(self, shapes: Shapes, expression: sympy.Basic) -> fx.Node | int:
        origin = shapes.origin(expression)
        if origin is not None:
            leaf, dim = origin
            if dim is None:
                return self._placeholders[leaf]
            # at the top, before an operation in place can change the argument's shape
            with self._graph.inserting_after(list(self._placeholders.values())[-1]):
                return self._graph.call_function(Tensor.size, (self._placeholders[leaf], dim))
        function = _SIZE_FUNCTIONS.get(type(expression))
        if function is None:
            return shapes.fix_expression(expression)
        number, *others = (self._size(argument) for argument in expression.args)
        for other in others:
            if isinstance(number, int) and isinstance(other, int):
                number = function(number, other)
            else:
                number = self._graph.call_function(function, (number, other))
        return number

    def _own_path(self, tensor: Tensor) -> str | None:
        """Path of a parameter or buffer of the module or a descendant."""
        if self._own_tensors is None:
            named = [
                *self.module.named_parameters(remove_duplicate=False),
                *self.module.named_buffers(remove_duplicate=False),
            ]
            self._own_tensors = {id(own): path for path, own in reversed(named)}
        return self._own_tensors.get(id(tensor))

    def _own_tensor(self, tensor: Tensor) -> fx.Node:
        path = self._own_path(tensor)
        if path is None:
            raise Refusal(
                "a tensor that is no argument, parameter or buffer of it and was made by no recorded operation"
            )
        node = self._graph.create_node("get_attr", path)
        self._stand_for(node, tensor)
        return node

    def _bind(self, node: fx.Node, value: Any, writes: bool) -> Any:
        if isinstance(value, Tensor):
            if id(value) in self._nodes and not writes:
                with torch.enable_grad(), torch._C.DisableTorchFunction():
                    alias = value.view_as(value)
                self.tape.add_alias(alias, value)
                if self.shapes is not None:
                    self.shapes.add_alias(alias, value)
                value = alias
            self._stand_for(node, value)
            return value
        if value is None or isinstance(value, torch.SymInt):
            return value  # a size is computed from those of the arguments
        if isinstance(value, dict):
            for key, item in list(value.items()):
                bound = self._bind_item(node, key, item, writes)
                if bound is not item:
                    value[key] = bound
            return value
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            items = [self._bind_item(node, index, item, writes) for index, item in enumerate(value)]
            if all(bound is item for bound, item in zip(items, value)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        raise Refusal(with_article(value))

    def _bind_item(self, node: fx.Node, key: Any, item: Any, writes: bool) -> Any:
        if item is None or isinstance(item, torch.SymInt):
            return item
        return self._bind(self._graph.call_function(operator.getitem, (node, key)), item, writes)

    # -- lines -------------------------------------------------------------------------------------------------------

    def note_write(self, owner: nn.Module, name: str) -> None:
        self.writes[id(owner), name] = self._line()

    def _written_at(self, owner: nn.Module, name: str) -> str:
        for key in (name, *dict(owner.named_parameters(recurse=False)), *dict(owner.named_buffers(recurse=False))):
            if (id(owner), key) in self.writes and (key == name or name in ("_parameters", "_buffers")):
                return self.writes[id(owner), key]
        return self.definition

    def _line(self) -> str:
        """The innermost line of a method of this module on the stack, else the definition of its forward."""
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if not code.co_filename.startswith(_NOT_THE_USERS) and frame.f_locals.get("self") is self.module:
                return f"{code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return self.definition


def is_watchable(cls: type) -> bool:
    """Whether reads can be watched: a class made by a class statement (Py_TPFLAGS_HEAPTYPE) takes new attributes."""
    return bool(cls.__flags__ & 1 << 9)


def is_checkpoint_flag(module: object, name: str) -> bool:
    """Whether the attribute only tells the class to wrap its forward, generated or not, in a checkpoint."""
    return name == CHECKPOINT_FLAG and hasattr(type(module), name)


def _ambient() -> tuple[Any, ...]:
    """State of the process that an operation depends on and a graph does not carry."""
    return (
        autocast_state(),
        torch.is_inference_mode_enabled(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def _key(leaves: Sequence[Any], caller: Frame | None) -> Any:
    """What two calls must share for their sizes to begin as the same symbols; None for arguments no graph can take."""
    known = caller.shapes if caller is not None else None
    expressions: dict[sympy.Basic, int] = {}
    seen: dict[int, int] = {}

    def name(size: int | torch.SymInt, real: int, is_free: bool) -> Any:
        if real in (0, 1) or (isinstance(size, int) and not is_free):
            return real
        return real, "free" if is_free else expressions.setdefault(size.node.expr, len(expressions))  # type: ignore[union-attr]

    keys: list[Any] = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            is_free = known is None or (caller is not None and caller.is_tainted([leaf]))
            given = tuple(leaf.shape) if is_free or known is None else known.sizes(leaf)
            sizes = tuple(name(size, real, is_free) for size, real in zip(given, leaf.shape))
            keys.append((seen.setdefault(id(leaf), index), sizes, leaf.requires_grad, look_outside(leaf)))
        elif isinstance(leaf, torch.SymInt):
            keys.append((torch.SymInt, name(leaf, hint(leaf), known is None)))
        elif is_plain(leaf):
            keys.append((type(leaf), repr(leaf)))
        else:
            return None
    return tuple(keys)


def _definition(forward: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else "<unknown>:0"


def _leaf_names(forward: Callable[..., Any], args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[str, ...]:
    """What a reader calls each leaf: the parameter's name, and indices into it."""
    try:
        parameters = list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for index, arg in enumerate(args):
        label = parameters[index] if index < len(parameters) else f"argument_{index}"
        names += [label + suffix for suffix in _suffixes(arg)]
    for label, arg in kwargs.items():
        names += [label + suffix for suffix in _suffixes(arg)]
    return tuple(names)


def _suffixes(value: object) -> list[str]:
    leaves, _ = flatten_arguments((value,), {})
    return [""] if len(leaves) == 1 and leaves[0] is value else [f"_{index}" for index in range(len(leaves))]


def _identifier(name: str) -> str:
    return name if name.isidentifier() else "argument"


def _target_name(target: Any) -> str:
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


CHECKPOINT_FLAG = "gradient_checkpointing"

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))

_SIZE_FUNCTIONS: dict[type, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
    sympy.Pow: operator.pow,
}
"""How sympy's expressions of sizes are written as nodes."""
