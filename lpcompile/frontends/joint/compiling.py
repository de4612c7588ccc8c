"""Joint: a compiled model under torch.compile, with FWD, BWD and GRAD of every GEMM as nodes of autograd's joint graph.

    model = compile_joint(lpcompile(model, "fp8-rowwise"))
    model(**batch).loss.backward()
    print(report(model).to_text())

Leaves and scopes, which reach the products in eager code, reach them here too: torch.compile traces them, and each
product is a node with its site's name, lp::site_fwd, of which autograd makes those of backward. passes/lower_joint.py
rewrites them. So names, random bits, schedules and the certificate are those of eager code; a name is a constant of its
graph, which torch.compile guards, and what runs outside of graphs runs as it does without this front end.
"""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from lpcompile.api import lpcompile
from lpcompile.compiled import COMPILED, end_joint, find_compiled, find_root, get_compiled, get_root
from lpcompile.errors import LpError, NotSupported
from lpcompile.frontends.joint.captured import Captured
from lpcompile.policy.resolve import Policy

Backend = Literal["inductor", "aot_eager"]
PrintGraph = Callable[[str, str], None]
Model = TypeVar("Model", bound=nn.Module)
_ALONE = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
"""Code behind a graph break is that of all models, and its graphs are counted by model where torch can."""


def compile_joint(
    model: Model,
    policy: str | Path | Policy | None = None,
    *,
    backend: Backend = "inductor",
    fullgraph: bool = False,
    dynamic: bool | None = None,
    print_graph: PrintGraph | None = None,
) -> Model:
    """Let torch.compile run a compiled model, in place; returns `model`.

    model: what lpcompile() compiled, also wrapped: by DDP, FSDP2, a DeepSpeed engine with ZeRO 0 to 2, accelerate.
    `policy` compiles one that is not compiled yet, by lpcompile(model, policy). backend "aot_eager" runs the graphs op
    by op, with the bits of eager code; "inductor" fuses, and adds in other orders. print_graph("before" or "after",
    text) is shown every joint graph. Graphs are made as the model is called; `report(model)` counts them.

    Raises LpError for a model that is not compiled, or for a policy beside one that is; NotSupported under ZeRO-3.
    """
    if backend not in ("inductor", "aot_eager"):
        raise LpError(
            "not a backend", where="compile_joint(backend=...)", expected="inductor or aot_eager", got=repr(backend)
        )
    if policy is not None:
        if find_compiled(model) is not None:
            raise LpError("this model is compiled already", where="compile_joint", hint="leave the policy out")
        lpcompile(model, policy)
    from lpcompile.frontends.joint.backends import Lowering, backend_of  # imports Inductor

    inner, compiled = get_root(model), get_compiled(model)
    if any(hasattr(parameter, "ds_id") for parameter in inner.parameters()):
        raise NotSupported(
            "graphs do not hold weights that ZeRO-3 partitions while they are traced",
            where="compile_joint",
            expected="DDP, FSDP2, or DeepSpeed with ZeRO 0, 1 or 2",
            hint="the model as lpcompile() left it, which runs under ZeRO-3 in eager code",
        )
    remove_joint(model)
    compiled.joint, compiled.state.is_joint = Captured(backend), True
    if any(isinstance(module, nn.RNNBase) for module in inner.modules()):
        torch._dynamo.config.allow_rnn = True  # for the process; what runs is products and elementwise operations
    compile_call: Any = torch.compile  # whose overloads leave recompile_limit out
    compiled_call = compile_call(
        _call_of(inner),
        backend=backend_of(Lowering(compiled.joint, compiled.state, print_graph)),
        fullgraph=fullgraph,
        dynamic=dynamic,
        recompile_limit=8 + 4 * len(compiled.sites),  # behind a graph break every site has graphs of its own
        **_ALONE,
    )
    # A scope lays its frame on the mode and takes it off again: no side effect that recomputation would have to repeat.
    traced = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
    inner._compiled_call_impl = traced(compiled_call)  # as nn.Module.compile: keys, class and wrappers stay
    return model


def remove_joint(model: nn.Module) -> None:
    """Let the model run in eager code again. Does nothing to one without a joint front end."""
    if (root := find_root(model)) is not None:
        end_joint(root, vars(root)[COMPILED])


def _call_of(model: nn.Module) -> Callable[..., Any]:
    """A call of the model with its hooks. torch.compile does not trace torch's own code from there on its own. Its code
    is the model's alone: torch.compile counts graphs by code, and after the limit, of all models together, makes no
    more.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call
