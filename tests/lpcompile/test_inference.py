"""Compiled models with casts placed and cancelled: the bits of the pipeline without these passes, and fewer casts.

In inference a graph without carriers stands for the forward only where no gradient flows and no hook looks on.
"""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile import lpcompile, report
from lpcompile.api import restore
from lpcompile.compiled import get_compiled
from lpcompile.policy.file import load_policy
from lpcompile.policy.resolve import Policy
from lpcompile.programs import install_text, program_of
from passes.analysis.traffic import Traffic, traffic
from passes.ir.printer import print_program
from passes.manager import parse_passes, run_passes, split_items
from passes.pipelines import PASSES, PIPELINES
from tests.lpcompile.program_results import calls_by_graph
from tests.zoo.models import ZOO

_E4M3 = """
version: 1
name: e4m3
rules:
  - match: {op: [linear, conv2d, matmul]}
    fwd: {x: e4m3, w: e4m3}
    bwd: {dy: e5m2, w: e4m3}
    grad: {dy: e5m2, x: e5m2}
"""


@pytest.fixture(scope="module")
def e4m3(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """No scales, so that casts of different tensors may move together; attention products too."""
    path = tmp_path_factory.mktemp("policy") / "e4m3.yaml"
    path.write_text(_E4M3)
    return load_policy(path)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.pool(self.relu(self.conv1(x))))
        y: Tensor = self.fc(torch.flatten(F.relu(x), 1))
        return y


class Mlp(nn.Module):
    """Two layers with a relu; q, k and v of three reshapes of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(F.relu(self.up(x)))
        q, k, v = self.q(x.reshape(-1, 16)), self.k(x.reshape(-1, 16)), self.v(x.reshape(-1, 16))
        return torch.cat([q * k, v], 1)


class SharedHeads(nn.Module):
    """Eight query heads on one head of k and v, which are expanded before the products."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(64, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = self.q(x).view(rows, length, 8, 8).transpose(1, 2)
        k, v = (
            each.unsqueeze(1).expand(rows, 8, length, 8).reshape(rows, 8, length, 8) for each in self.kv(x).split(8, 2)
        )
        weights = torch.matmul(q, k.transpose(2, 3)).softmax(-1)
        return torch.matmul(weights, v)


_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (ConvNet, (2, 3, 12, 12)),
    "mlp": (Mlp, (4, 5, 16)),
    "shared heads": (SharedHeads, (2, 6, 64)),
}


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Pipelines without some passes."""
    before = dict(PIPELINES)
    try:
        for mode, text in before.items():
            PIPELINES[mode] = ",".join(item for item in split_items(text) if item.partition("{")[0] not in names)
        yield
    finally:
        PIPELINES.update(before)


def _input(name: str, edges: bool = False) -> Tensor:
    x = torch.randn(_MODELS[name][1], generator=torch.Generator().manual_seed(1))
    if edges:
        x.view(-1)[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-30, -1e-30])
    return x


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return _MODELS[name][0]()


def _both(model: nn.Module, policy: str | Policy, run: Callable[[nn.Module], Any], **how: Any) -> list[Any]:
    """What `run` gives of the model compiled without the two passes and with them, and the traffic of both."""
    found: list[Any] = []
    for names in (("place-regions", "cancel-casts"), ()):
        compiled = copy.deepcopy(model)
        with _without(*names):
            lpcompile(compiled, policy, **how)
        found += [run(compiled), traffic(get_compiled(compiled).phase.program)]
        assert calls_by_graph(compiled) == (1, 0)
    return [found[0], found[2], found[1], found[3]]


def _assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """NaN counts as NaN, whatever its payload."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        left, right = (torch.where(each.isnan(), torch.nan, each.detach()) for each in (value, b[key]))
        assert torch.equal(left.view(-1).view(torch.int32), right.view(-1).view(torch.int32)), key


def _infer(*inputs: Any, **batch: Any) -> Callable[[nn.Module], dict[str, Tensor]]:
    @torch.no_grad()
    def run(model: nn.Module) -> dict[str, Tensor]:
        out = model(*inputs, **batch)
        return {"y": out} if isinstance(out, Tensor) else {"loss": out["loss"], "logits": out["logits"]}

    return run


def _train(*inputs: Any, **batch: Any) -> Callable[[nn.Module], dict[str, Tensor]]:
    def run(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(3)
        x = [each.clone().requires_grad_() for each in inputs]
        out = model(*x, **batch)
        loss = out.square().mean() if isinstance(out, Tensor) else out["loss"]
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss, **gradients, **{f"x{n}": each.grad for n, each in enumerate(x) if each.grad is not None}}

    return run


@pytest.mark.parametrize("edges", [False, True], ids=["numbers", "NaN, Inf and -0"])
@pytest.mark.parametrize("policy", ["int8", "fp8-rowwise", "e4m3"])
@pytest.mark.parametrize("name", _MODELS)
def test_inference_has_the_same_bits_and_moves_fewer_bytes(
    name: str, policy: str, edges: bool, request: pytest.FixtureRequest
) -> None:
    chosen = request.getfixturevalue("e4m3") if policy == "e4m3" else policy
    x, model = _input(name, edges), _model(name).eval()
    before, after, moved, fewer = _both(model, chosen, _infer(x), example_inputs=(x,), mode="infer")
    _assert_same_bits(before, after)
    assert isinstance(fewer, Traffic)
    assert fewer.casts < moved.casts
    assert fewer.bytes < moved.bytes


def test_int8_is_pooled_on_grid_values_if_nothing_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = _input("conv"), _model("conv").eval()
    # a relu that is fused costs nothing, and then a pool is better left before the cast
    monkeypatch.setitem(PIPELINES, "infer", PIPELINES["infer"].replace(",fuse,", ","))
    before, as_ever, moved, some = _both(model, "int8", _infer(x), example_inputs=(x,), mode="infer")
    finite = PIPELINES["infer"].replace("carriers=drop", "carriers=drop,finite=true")
    monkeypatch.setitem(PIPELINES, "infer", finite)
    _, after, _, fewer = _both(model, "int8", _infer(x), example_inputs=(x,), mode="infer")
    _assert_same_bits(before, after)
    _assert_same_bits(before, as_ever)
    assert fewer.bytes < some.bytes < moved.bytes


@pytest.mark.parametrize("policy", ["int8", "fp8-rowwise", "e4m3"])
@pytest.mark.parametrize("name", ["resnet18", "llama", "gpt2"])
def test_the_zoo_in_inference(name: str, policy: str, request: pytest.FixtureRequest) -> None:
    """Compiled for one batch, run on another of other sizes."""
    chosen = request.getfixturevalue("e4m3") if policy == "e4m3" else policy
    torch.manual_seed(0)
    model, batch = ZOO[name].make().eval(), ZOO[name].batch(0)
    run = _infer(**ZOO[name].batch(1))
    before, after, moved, fewer = _both(model, chosen, run, example_kwargs=batch, mode="infer")
    _assert_same_bits(before, after)
    assert fewer.casts < moved.casts
    assert fewer.bytes < moved.bytes


def _compiled(policy: str | Policy) -> tuple[nn.Module, Tensor]:
    x, model = _input("conv"), _model("conv").eval()
    return lpcompile(model, policy, (x,), mode="infer"), x


def test_with_gradients_the_modules_run_and_every_gradient_is_there(e4m3: Policy) -> None:
    x = _input("conv")
    plain = lpcompile(_model("conv").eval(), e4m3)  # leaves alone
    wanted = _train(x)(plain)
    model, _ = _compiled(e4m3)
    _assert_same_bits(_train(x)(model), wanted)
    assert "gradients are on" in report(model).unserved


@pytest.mark.parametrize("where", ["relu", "conv2", "everywhere"])
def test_hooks_see_what_they_would_see(where: str, e4m3: Policy) -> None:
    """A hook set after compiling, on a layer that is in the graph and on one that takes a stand-in."""
    model, x = _compiled(e4m3)
    wanted = _infer(x)(model)
    assert calls_by_graph(model) == (1, 0)
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any) -> None:
        if isinstance(module, (nn.ReLU, nn.Conv2d)):
            seen.append(args[0])

    if where == "everywhere":
        handle = nn.modules.module.register_module_forward_pre_hook(look)
    else:
        handle = model.get_submodule(where).register_forward_pre_hook(look)
    try:
        _assert_same_bits(_infer(x)(model), wanted)
    finally:
        handle.remove()
    assert seen
    assert not any(each.isnan().any() for each in seen), "the values and no stand-in"
    assert "hooks" in report(model).unserved
    _assert_same_bits(_infer(x)(model), wanted)
    assert calls_by_graph(model) == (2, 1)


def test_a_layer_that_is_in_the_graph_may_change_later(e4m3: Policy) -> None:
    model, x = _compiled(e4m3)
    before = _infer(x)(model)["y"]
    model.pool.kernel_size = 2  # type: ignore[union-attr]
    model.pool.padding = 0  # type: ignore[union-attr]
    pooled = _infer(x)(model)["y"]
    assert "attributes, children or hooks of pool are others" in report(model).unserved
    model.pool.kernel_size, model.pool.padding = 3, 1  # type: ignore[union-attr]
    model.relu = nn.Tanh()
    other = _infer(x)(model)["y"]
    assert not torch.equal(before, pooled)
    assert not torch.equal(before, other)
    assert calls_by_graph(model) == (1, 2)


_CALLS: dict[str, tuple[Callable[[nn.Module, Tensor], Any], bool]] = {
    "by name": (lambda model, x: model(x=x), True),
    "more rows": (lambda model, x: model(torch.cat([x, x])), True),
    "one row": (lambda model, x: model(x[:1]), False),
    "another layout": (lambda model, x: model(x.to(memory_format=torch.channels_last)), False),
    "under autocast": (lambda model, x: _autocast(model, x), False),
    "in training": (lambda model, x: model.train()(x), False),
}


def _autocast(model: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


@pytest.mark.parametrize("name", _CALLS)
def test_which_calls_the_graph_stands_for(name: str, e4m3: Policy) -> None:
    call, is_by_graph = _CALLS[name]
    model, x = _compiled(e4m3)
    plain = lpcompile(_model("conv").eval(), e4m3)
    with torch.no_grad():
        assert torch.equal(call(model, x), call(plain, x))
    assert calls_by_graph(model) == ((1, 0) if is_by_graph else (0, 1))


def test_it_survives_deepcopy_and_pickle(e4m3: Policy) -> None:
    model, x = _compiled(e4m3)
    wanted = _infer(x)(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _assert_same_bits(_infer(x)(again), wanted)
        assert calls_by_graph(again) == (2, 0)
        again.relu = nn.Tanh()
        assert not torch.equal(_infer(x)(again)["y"], wanted["y"])
        assert calls_by_graph(again) == (2, 1)
    assert calls_by_graph(model) == (1, 0)
    restore(model)
    assert isinstance(model.relu, nn.ReLU)


def test_a_text_gives_the_same_bits(e4m3: Policy) -> None:
    x = _input("conv")
    program = program_of(_model("conv").eval(), e4m3, (x,))
    run_passes(program, parse_passes(PIPELINES["infer"], PASSES))
    model = install_text(_model("conv").eval(), print_program(program), (x,))
    wanted = _infer(x)(_compiled(e4m3)[0])
    _assert_same_bits(_infer(x)(model), wanted)
    assert calls_by_graph(model) == (1, 0)
    _assert_same_bits(_train(x)(model), _train(x)(lpcompile(_model("conv").eval(), e4m3)))


def test_an_inplace_relu_keeps_casts_where_they_are(e4m3: Policy) -> None:
    model, x = _model("conv").eval(), _input("conv")
    model.relu = nn.ReLU(inplace=True)
    before, after, *_ = _both(model, e4m3, _infer(x), example_inputs=(x,), mode="infer")
    _assert_same_bits(before, after)


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.SiLU(inplace=True)])
def test_two_leaves_around_an_inplace_layer_do_not_share_a_cast(layer: nn.Module) -> None:
    """The second reads what the first one's input has become."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.layer, self.b = nn.Linear(8, 8), layer, nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0.0
            first = self.a(x)
            self.layer(x)
            second: Tensor = first + self.b(x)
            return second

    torch.manual_seed(0)
    plain = Around().eval()
    x = torch.randn(4, 8)
    alone = lpcompile(copy.deepcopy(plain), "fp8-rowwise")
    shown = lpcompile(copy.deepcopy(plain), "fp8-rowwise", (x,), mode="infer")
    _assert_same_bits(_infer(x)(shown), _infer(x)(alone))


def test_opt_tells_what_moves(tmp_path: Path) -> None:
    policy, root = tmp_path / "e4m3.yaml", Path(__file__).resolve().parents[2]
    policy.write_text(_E4M3)
    source = ["tests.lpcompile.test_inference:conv_example", "--policy", str(policy), "--mode", "infer", "--stats"]
    command = [sys.executable, "-m", "launch", "opt", *source, "-o", str(tmp_path / "out.lpir")]
    env = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, check=True, cwd=root, capture_output=True, text=True, env=env)
    rows = {line.split()[0].partition("{")[0]: line.split() for line in done.stderr.splitlines() if line.strip()}
    casts, moved = (int(rows["share-casts"][at]) for at in (-2, -1))
    after, fewer = (int(rows["place-regions"][at]) for at in (-2, -1))
    assert after < casts
    assert fewer < moved


def conv_example() -> tuple[nn.Module, tuple[Tensor]]:
    """For `lpcompile opt`: a model and its example arguments."""
    return _model("conv").eval(), (_input("conv"),)
