"""Backends: what torch.compile calls with a graph. It is lowered, then run by Inductor or op by op."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table

from lpcompile.frontends.joint.captured import Captured
from passes.lower_joint import SITE, lower_joint
from runtime.ops.layer import note_ran
from runtime.state import RunState


class Lowering:
    """Rewrites the graphs of one model as they are made."""

    def __init__(self, captured: Captured, state: RunState, print_graph: Callable[[str, str], None] | None) -> None:
        self.captured, self.state, self.print_graph = captured, state, print_graph

    def lower(self, graph: fx.Graph, decompositions: Mapping[Any, Callable[..., Any]] | None) -> None:
        """One graph, with backward or without, in place."""
        if self.print_graph:
            self.print_graph("before", _text(graph))
        done, captured = lower_joint(graph, decompositions), self.captured
        captured.num_graphs += 1
        captured.num_products += done.num_products
        captured.num_casts += done.num_casts
        captured.num_cast_uses += done.num_cast_uses
        for name, roles in done.roles.items():
            captured.roles.setdefault(name, set()).update(roles)
        if self.print_graph:
            self.print_graph("after", _text(graph))


def backend_of(lowering: Lowering) -> Callable[..., Any]:
    """The backend that runs what `lowering` rewrites, as its `captured` says."""
    return _op_by_op(lowering) if lowering.captured.backend == "aot_eager" else _inductor(lowering)


def _text(graph: fx.Graph) -> str:
    """As Python code, each product with its site and role behind it."""
    sites = {node.name: " ".join(node.meta[SITE]) for node in graph.nodes if SITE in node.meta}
    lines = graph.python_code("self").src.splitlines()
    named = [sites.get(line.strip().partition(" = ")[0], "") for line in lines]
    return "\n".join(f"{line}  # {site}" if site else line for line, site in zip(lines, named))


def _inductor(lowering: Lowering) -> Callable[..., Any]:
    patches = {"joint_custom_pre_pass": _Pass(lowering)}
    return partial(compile_fx, config_patches=patches)


class _Pass(CustomGraphPass):
    """The rewriting as Inductor calls it."""

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering

    def __call__(self, graph: fx.Graph) -> None:
        self._lowering.lower(graph, select_decomp_table())

    def uuid(self) -> None:
        """No key: a graph from a cache would not be counted in the certificate."""
        return


def _op_by_op(lowering: Lowering) -> Callable[..., Any]:
    def partition(graph: fx.GraphModule, joint_inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        lowering.lower(graph.graph, None)
        graph.recompile()
        return default_partition(graph, joint_inputs, **options)

    def infer(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        lowering.lower(graph.graph, None)
        graph.recompile()
        return boxed(graph, inputs)

    def boxed(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        calls = [node.meta[SITE] for node in graph.graph.nodes if node.op == "call_function" and SITE in node.meta]
        state = lowering.state

        def run(arguments: list[Any]) -> Any:
            for name, role in calls:
                note_ran(state, name, role)
            return graph(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    backend: Callable[..., Any] = aot_autograd(fw_compiler=boxed, inference_compiler=infer, partition_fn=partition)
    return backend
