"""Joint graph: what `lpcompile opt MODEL --joint` shows, the graphs of torch.compile with FWD, BWD and GRAD in them."""

import torch
from torch import nn

from launch.commands.example_models import example_model
from lpcompile.api import lpcompile
from lpcompile.errors import LpError
from lpcompile.frontends.joint.compiling import compile_joint


def joint_graphs(source: str, policy: str) -> list[tuple[str, str]]:
    """(before, after) lowering, as Python code, of every graph that one call of the model in training has, in the order
    in which they are made: several where a graph breaks. Raises LpError where no call of the model is known.
    """
    example = example_model(source)
    if example.args is None and example.kwargs is None:
        what = "no call of the model is known, and a joint graph is made of one"
        raise LpError(what, where=source, hint="module:callable that returns (model, example arguments)")
    texts: dict[str, list[str]] = {"before": [], "after": []}
    model: nn.Module = lpcompile(example.model.train(), policy)
    torch._dynamo.reset()
    compile_joint(model, backend="aot_eager", print_graph=lambda when, text: texts[when].append(text))
    model(*(example.args or ()), **(example.kwargs or {}))
    return list(zip(texts["before"], texts["after"], strict=True))


def print_graphs(texts: list[str]) -> str:
    """All graphs under a line that counts them."""
    return "".join(f"# ----- graph {number} of {len(texts)} -----{text}\n" for number, text in enumerate(texts, 1))
