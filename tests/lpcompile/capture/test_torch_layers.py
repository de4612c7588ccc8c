"""torch's layers as graphs for passes: what is in them, which calls may write, and what their guard says."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile.capture.recorder import record
from lpcompile.capture.torch_layers import without_carriers
from lpcompile.frontends.leaves.find import is_leaf
from lpcompile.programs import program_of
from passes.ir.program import WRITES, Program


class Opaque(nn.Module):
    """No graph stands for it: it asks for a truth value."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else x + 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.norm, self.silu, self.opaque = nn.BatchNorm2d(4), nn.SiLU(inplace=True), Opaque()
        self.flatten, self.fc = nn.Flatten(), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.opaque(self.silu(self.norm(self.pool(self.relu(self.conv(x))))))
        y: Tensor = self.fc(self.flatten(x))
        return y


def _program(model: nn.Module) -> Program:
    return program_of(model.eval(), "int8", (torch.randn(2, 3, 8, 8),), mode="infer")


def test_layers_of_one_function_have_a_graph_and_others_have_none() -> None:
    program = _program(Net())
    assert {name for name in program.units if name not in ("#0", "conv", "fc")} == {
        "relu#0",
        "pool#0",
        "flatten#0",
        "norm",
    }
    (x, call, output) = program.units["pool#0"].graph.nodes
    assert call.target is F.max_pool2d
    assert call.args == (x,)
    assert call.kwargs["kernel_size"] == 2
    assert output.args == ((call,),)
    assert tuple(call.meta["tensor_meta"].shape) == (2, 4, 4, 4)


def test_calls_that_may_write_are_marked() -> None:
    calls = {str(node.target): node for node in _program(Net()).units["#0"].graph.find_nodes(op="call_module")}
    assert {name for name, node in calls.items() if node.meta.get(WRITES)} == {"silu", "opaque"}


def test_the_guard_of_a_graph_without_carriers_names_layers_and_children() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    (recording,) = record(model, (x,), {}, is_leaf=is_leaf).recordings[""]
    guard = without_carriers(recording, model).guard
    assert guard.is_forward_only
    assert {"conv", "relu", "pool", "silu"} <= set(guard.unhooked)
    with torch.no_grad():
        assert guard.check(model, (x,), {}) is None
        with model.relu.register_forward_hook(lambda *_: None):
            assert guard.check(model, (x,), {}) == "relu has hooks, which see its input and output"
        model.pool.stride = 1
        assert guard.check(model, (x,), {}) == "attribute pool.stride is 1, recorded 2"
        model.pool = nn.MaxPool2d(2)
        model.relu = nn.ReLU6()  # type: ignore[assignment]
        assert "relu.__class__" in str(guard.check(model, (x,), {}))
    model.relu = nn.ReLU()
    assert guard.check(model, (x,), {}) == "grad mode is on, compiled for inference"
