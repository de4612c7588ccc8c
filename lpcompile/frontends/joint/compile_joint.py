"""Joint: a plain model under torch.compile, with FWD, BWD and GRAD of every GEMM rewritten in autograd's graph.

    compiled = compile_joint(model, "fp8-rowwise")      # a torch.compile of the model, which itself stays as it was
    compiled(**batch).loss.backward()
    print(joint_report(model).to_text())

Leaves keep their own forward; a stamp puts the leaf's name on what it traces, and torch.compile guards the name, so two
layers of one class have two graphs where a graph break would otherwise let them share one. A call that torch.compile
does not trace runs as the uncompiled model does; it is counted and told. Products of activations are named after the
module that writes them, which is known where the whole model is one graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.fx.traceback import annotate

from lpcompile.compiled import JOINT, find_compiled
from lpcompile.errors import LpError, NotSupported
from lpcompile.frontends.install import RECORD, install, uninstall
from lpcompile.frontends.joint.warnings_once import leave_warnings_once_out_of_graphs
from lpcompile.frontends.leaves.find import Leaf, composite_forward, find_leaves
from lpcompile.policy.describe import describe
from lpcompile.policy.file import load_policy
from lpcompile.policy.resolution import Resolution
from lpcompile.policy.resolve import Policy
from lpcompile.policy.rules import Site
from lpcompile.reporting.rows import GemmRow
from lpcompile.reporting.text import table
from passes.joint_products import ROOT_KEY, SITE_KEY, UNNAMED, NameProducts, find_joint_sites
from passes.lower_joint import Lowered, lower_joint
from runtime.kernels.registry import Choice
from runtime.numerics.specs import ROLES, LayerSpec, Role
from runtime.state import RunState

Backend = Literal["inductor", "aot_eager"]
PrintGraph = Callable[[str, str], None]


def compile_joint(
    model: nn.Module,
    policy: str | Path | Policy,
    *,
    backend: Backend = "inductor",
    fullgraph: bool = False,
    dynamic: bool | None = None,
    print_graph: PrintGraph | None = None,
) -> Callable[..., Any]:
    """torch.compile(model), with the GEMMs that `policy` names run as it says.

    backend "aot_eager" runs the same graphs op by op, for tests. print_graph("before" or "after", text) is shown every
    joint graph. What was lowered is known once graphs are compiled: `joint_report(model)`. Raises NotSupported for a
    policy with a schedule, LpError for a model that lpcompile() compiled already.
    """
    loaded = load_policy(policy)
    if find_compiled(model) is not None:
        raise LpError(
            "this model is compiled already",
            where="compile_joint",
            hint="torch.compile(lpcompile(model, policy)), or a model as it was before",
        )
    if len(loaded.phases) != 1:
        raise NotSupported(
            f"policy {loaded.name} has a schedule",
            where="compile_joint",
            expected="one phase",
            hint="torch.compile(lpcompile(model, policy)) changes phases",
        )
    remove_joint(model)
    record = _stamp(model, loaded)
    record.print_graph = print_graph
    leave_warnings_once_out_of_graphs()
    compile_model: Any = torch.compile  # whose overloads leave recompile_limit out
    run: Callable[..., Any] = compile_model(
        model,
        backend=_inductor(record) if backend == "inductor" else _aot_eager(record),
        fullgraph=fullgraph,
        dynamic=dynamic,
        recompile_limit=8 + 4 * len(record.leaves),  # behind a graph break every leaf has graphs of its own
    )
    return run


def joint_report(model: nn.Module) -> "JointReport":
    """What the graphs compiled so far run every named GEMM as."""
    record = _find(model)
    if record is None:
        raise LpError("this model has no joint front end", where="joint_report", hint="compile_joint(model, policy)")
    return record.report()


def joint_state(model: nn.Module) -> RunState | None:
    """The state whose `overflow` the compiled backward sets; None without a joint front end."""
    record = _find(model)
    return record.state if record else None


def remove_joint(model: nn.Module) -> None:
    """Take the stamps away. Does nothing to a model without them."""
    if _find(model) is None:
        return
    for module in model.modules():
        if isinstance(vars(module).get(RECORD), _Stamp):
            uninstall(module)
    del model.__dict__[JOINT]


@dataclass(frozen=True)
class JointReport:
    """The certificate of a joint front end, of the graphs compiled so far."""

    policy: str
    gemms: list[GemmRow]
    left_alone: list[str]
    """Sites that no rule names."""
    unnamed: int
    """Products of activations behind a graph break: their module is not known, so no rule was asked about them."""
    eager_calls: dict[str, int]
    """Calls of leaves outside of compiled graphs, which ran as the uncompiled model does."""
    num_graphs: int
    num_casts: int
    """Casts in all graphs."""
    num_cast_uses: int
    """Operands that read them."""

    def to_text(self) -> str:
        running = sum(row.runs_as_policy_says for row in self.gemms)
        lines = [
            f"policy {self.policy}: {running} of {len(self.gemms)} named GEMMs run so in {self.num_graphs} joint "
            f"graphs; {len(self.left_alone)} sites are not named and left alone",
            f"casts in the graphs: {self.num_casts}, read by {self.num_cast_uses} operands",
        ]
        lines += table(self.gemms)
        lines += [f"left alone: {name}" for name in self.left_alone]
        if self.unnamed:
            lines.append(f"not named: {self.unnamed} products of activations lie behind a graph break, left alone")
        lines += [
            f"not compiled: {name}: {count} calls ran outside of compiled graphs, as the uncompiled model does"
            for name, count in self.eager_calls.items()
        ]
        return "\n".join(lines)


@dataclass
class _Joint:
    """What is known of one model: its policy, and what became of the graphs compiled so far."""

    policy: Policy
    leaves: list[Leaf]
    sites: dict[str, Site]
    resolution: Resolution
    paths: dict[str, str]
    """Of every module by its id as text."""
    device: str
    state: RunState
    print_graph: PrintGraph | None = None
    num_graphs: int = 0
    unnamed: int = 0
    lowered: Lowered = field(default_factory=Lowered)
    stamps: dict[str, "_Leaf"] = field(default_factory=dict)

    def lower(self, graph: fx.Graph, decompositions: Mapping[Any, Callable[..., Any]] | None) -> None:
        """Rewrite one graph, with backward or without, in place."""
        self.num_graphs += 1
        if self.print_graph:
            self.print_graph("before", _text(graph))
        sites = find_joint_sites(graph, NameProducts(self.paths))
        self.unnamed += sum(site.name.startswith(UNNAMED) for site in sites)
        for site in sites:
            if site.name not in self.sites and not site.name.startswith(UNNAMED):
                self.sites[site.name] = Site(site.name, "matmul", None, len(self.leaves), None, None)
        self.resolution = self.policy.resolve(list(self.sites.values()))
        lowered = lower_joint(
            graph,
            sites,
            self.specs,
            device=self.device,
            decompositions=decompositions,
            overflow_key=self.state.key if self.state.watch_overflow else -1,
        )
        if self.print_graph:
            self.print_graph("after", _text(graph))
        self._add(lowered)

    @property
    def specs(self) -> dict[str, LayerSpec]:
        return {name: spec for name, spec in self.resolution.specs.items() if spec is not None}

    def _add(self, more: Lowered) -> None:
        for name, choices in more.choices.items():
            self.lowered.choices.setdefault(name, {}).update(choices)
        self.lowered.specs.update(more.specs)
        self.lowered.refusals.update(more.refusals)
        self.lowered.num_casts += more.num_casts
        self.lowered.num_cast_uses += more.num_cast_uses

    def report(self) -> JointReport:
        rows = [self._row(name, role) for name in self.specs for role in ROLES]
        left = [name for name in self.sites if name not in self.specs]
        eager = {name: stamp.num_eager for name, stamp in self.stamps.items() if stamp.num_eager and name in self.specs}
        counts = self.lowered.num_casts, self.lowered.num_cast_uses
        return JointReport(self.policy.name, rows, left, self.unnamed, eager, self.num_graphs, *counts)

    def _row(self, name: str, role: Role) -> GemmRow:
        gemm = self.lowered.specs.get(name, self.specs[name]).role(role)
        choice: Choice | None = self.lowered.choices.get(name, {}).get(role)
        accumulate = gemm.accumulate + (f"/{gemm.chunk}" if gemm.chunk else "")
        missing = "no graph compiled so far holds it"
        how = (
            ("original", "refused", self.lowered.refusals.get(name, missing))
            if choice is None
            else (choice.backend, choice.fidelity, choice.reason)
        )
        rule = self.resolution.rule_of.get(name, {}).get(role, "no rule: fp32")
        op = self.sites[name].op
        return GemmRow(name, op, role, str(gemm.lhs), str(gemm.rhs), accumulate, gemm.out, *how, rule)


class _Stamp:
    """What is installed under a module that is traced: its own forward, and a mark on what that traces."""

    is_picklable = False


@dataclass
class _Leaf(_Stamp):
    """The stamp of a leaf. torch.compile guards what it reads: here the name."""

    name: str
    num_eager: int = 0

    def run(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            with annotate({SITE_KEY: self.name}):
                return original(module, *args, **kwargs)
        self.num_eager += 1
        return original(module, *args, **kwargs)


@dataclass
class _Root(_Stamp):
    """The stamp of the model: marks that all of it is one graph. torch.compile cannot break a graph inside an
    annotation: where it must, the model's own forward is traced piece by piece, without this mark.
    """

    def run(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            with annotate({ROOT_KEY: True}):
                return original(module, *args, **kwargs)
        return original(module, *args, **kwargs)


def _stamp(model: nn.Module, policy: Policy) -> _Joint:
    leaves, _ = find_leaves(model)
    count = sum(leaf.index is not None for leaf in leaves)
    found = [Site(leaf.name, leaf.op, leaf.index, count, leaf.n, leaf.k) for leaf in leaves]
    sites = {site.name: site for site in describe(found, model)}
    parameter = next(model.parameters(), None)
    state = RunState(watch_overflow=policy.loss_scale.kind != "none")
    device = parameter.device.type if parameter is not None else "cpu"
    (_, only), modules = policy.phases[0], dict(model.named_modules())
    paths = {str(id(module)): path for path, module in modules.items()}
    joint = _Joint(only, leaves, sites, only.resolve(list(sites.values())), paths, device, state)
    install(model, _Root())
    for leaf in leaves:
        if composite_forward(modules[leaf.path]) is None:
            joint.stamps[leaf.name] = _Leaf(leaf.name)
            install(modules[leaf.path], joint.stamps[leaf.name])
    model.__dict__[JOINT] = joint
    return joint


def _find(model: nn.Module) -> _Joint | None:
    return model.__dict__.get(JOINT)


def _text(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _inductor(joint: _Joint) -> Callable[..., Any]:
    decompositions = {op: run for op, run in select_decomp_table().items() if op not in _KEPT}
    patches = {"joint_custom_pre_pass": _Pass(joint, decompositions)}
    return partial(compile_fx, config_patches=patches, decompositions=decompositions)


class _Pass(CustomGraphPass):
    """The rewriting as Inductor calls it."""

    def __init__(self, joint: _Joint, decompositions: Mapping[Any, Callable[..., Any]] | None) -> None:
        self._joint = joint
        self._decompositions = decompositions

    def __call__(self, graph: fx.Graph) -> None:
        self._joint.lower(graph, self._decompositions)

    def uuid(self) -> None:
        """No key: a graph from a cache would not be rewritten, nor told of in the certificate."""
        return


def _aot_eager(joint: _Joint) -> Callable[..., Any]:
    def partition(graph: fx.GraphModule, joint_inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        joint.lower(graph.graph, None)
        graph.recompile()
        return default_partition(graph, joint_inputs, **options)

    def infer(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        joint.lower(graph.graph, None)
        graph.recompile()
        return _boxed(graph, inputs)

    backend: Callable[..., Any] = aot_autograd(fw_compiler=_boxed, inference_compiler=infer, partition_fn=partition)
    return backend


def _boxed(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    def run(arguments: list[Any]) -> Any:
        return graph(*arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


_KEPT = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})
"""What Inductor would take apart for some sizes, before anyone sees the product."""
