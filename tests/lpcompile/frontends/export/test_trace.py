"""Exported graphs: the values of the model bit for bit, the sites of the other front ends, and a model left alone."""

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lpcompile import lpcompile, report
from lpcompile.errors import NotSupported
from lpcompile.frontends.export.trace import Exported, export_graph
from lpcompile.frontends.fast_paths import close_fast_paths, reopen_fast_paths
from lpcompile.frontends.graph_code import GraphCode
from lpcompile.frontends.leaves.find import find_leaves
from passes.ir.gemm_nodes import read_gemm, site_names
from passes.ir.program import SITE
from tests.zoo.models import NAMES, ZOO, build

_ONE_LENGTH = ("mamba",)
"""Models of the zoo whose forward has a loop over a size: another batch has another graph."""

_STATEFUL = ("swin",)
"""Models whose forward keeps the sizes of its windows in attributes."""


def _export(model: nn.Module, *args: Any, **kwargs: Any) -> Exported:
    return export_graph(model, args, kwargs, find_leaves(model)[0])


def _run(exported: Exported, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    assert exported.sizes.fits(*tensors)
    with torch.no_grad():
        results = GraphCode(exported.graph)(model, tensors)
    return pytree.tree_unflatten(results, exported.out_spec)


def _sites(exported: Exported, model: nn.Module) -> set[str]:
    found: set[str] = set()
    for node in exported.graph.nodes:
        if node.op == "call_module":
            found |= {leaf.name for leaf in find_leaves(model)[0] if leaf.path == node.target}
        elif (gemm := read_gemm(node)) is not None:
            found |= {*site_names(gemm, node.meta[SITE])}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_zoo_has_the_values_of_the_model_and_the_sites_of_the_other_front_ends(name: str) -> None:
    model, batch = build(name).eval(), ZOO[name].batch(0)
    if name in _STATEFUL:
        with pytest.raises(NotSupported, match="changes attributes of a module"):
            _export(model, **batch)
        return
    before = copy.deepcopy(model.state_dict())
    close_fast_paths(model)  # torch's encoder would call none of its children
    seed, attributes = torch.get_rng_state(), {path: dict(vars(each)) for path, each in model.named_modules()}
    exported = _export(model, **batch)
    assert torch.equal(torch.get_rng_state(), seed)
    for path, module in model.named_modules():
        assert vars(module) == attributes[path], path
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for number in (0, 1):
        batch = ZOO[name].batch(number)
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        if number and not exported.sizes.fits(*tensors):
            assert name in _ONE_LENGTH
            continue
        with torch.no_grad():
            wanted = model(**batch)
        found = _run(exported, model, **batch)
        assert type(found) is type(wanted)
        assert torch.equal(found["loss"], wanted["loss"])
        assert torch.equal(found["logits"], wanted["logits"])
    reopen_fast_paths(model)
    found = report(lpcompile(copy.deepcopy(model), "fp32-emulated", example_kwargs=ZOO[name].batch(0)))
    assert _sites(exported, model) == {row.name for row in found.gemms} - {*found.uncalled}


class _Twice(nn.Module):
    """A child that runs twice, with a leaf and two products of activations in it."""

    def __init__(self) -> None:
        super().__init__()
        self.child = _Products()

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.child(x)) @ x.transpose(-1, -2)


class _Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(self.fc(x), x.transpose(-1, -2))
        return F.relu(torch.einsum("bij,bjk->bik", y, x))


def test_products_are_counted_anew_in_each_call_of_a_module() -> None:
    torch.manual_seed(0)
    model, x = _Twice(), torch.randn(2, 5, 8)
    exported = _export(model, x)
    assert torch.equal(_run(exported, model, x), model(x))
    assert _sites(exported, model) == {"child.fc", "child.matmul_0", "child.einsum_0", "matmul_0"}


def test_weights_are_read_live() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(3, 8)
    exported = _export(model, x)
    for layer in (model[0], model[1]):
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    assert torch.equal(_run(exported, model, x), model(x))
    x = torch.randn(7, 8)
    assert torch.equal(_run(exported, model, x), model(x))
    assert not exported.sizes.fits(torch.randn(7, 9))
    assert not exported.sizes.fits(torch.randn(1, 8))  # a size of 1 may mean another thing


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrence_has_every_length(kind: type[nn.RNNBase], batch_first: bool) -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(8, 6, num_layers=2, bidirectional=True, batch_first=batch_first)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Any]:
            y, state = self.rnn(x)
            return self.head(y), state

    model = Model()
    exported = _export(model, torch.randn(4, 5, 8))
    for sizes in ((4, 5), (7, 5), (3, 2)):
        x = torch.randn(*sizes, 8)
        found, wanted = (pytree.tree_leaves(each) for each in (_run(exported, model, x), model(x)))
        if kind is nn.LSTM:  # oneDNN may add its gates in another order than torch's own operations, as the graph does
            assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(found, wanted, strict=True))
        else:
            assert all(map(torch.equal, found, wanted))


def test_a_model_that_is_one_layer_of_several_products_is_run_by_it() -> None:
    model, x = lpcompile(nn.LSTM(8, 8).eval(), "int8", (torch.randn(5, 2, 8),), mode="infer"), torch.randn(3, 2, 8)
    (finding,) = [each for each in report(model).warnings if each.code == "not-exported"]
    assert "it is one layer of several products, LSTM" in finding.what
    with torch.no_grad():
        model(x)
    assert all(row.counts for row in report(model).gemms if row.role == "fwd")


class _Sized(nn.Module):
    """Returns a size, and divides by a count that Trainer hands it as an int or as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, num_items_in_batch: Any = None) -> tuple[Tensor, torch.Size]:
        y = self.fc(x)
        scores = (y @ y.mT) / y.size(-1) ** 0.5
        return scores if num_items_in_batch is None else scores / num_items_in_batch, y.shape


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_size_comes_back_as_a_size_for_every_count(mode: Any) -> None:
    original = _Sized().eval()
    model = lpcompile(copy.deepcopy(original), "fp32-emulated", (torch.randn(2, 5, 8),), mode=mode)
    for x in (torch.randn(2, 5, 8), torch.randn(3, 7, 8)):
        for count in (None, 3, 4, torch.tensor(5.0)):
            with torch.no_grad():
                (found, size), (wanted, _) = model(x, num_items_in_batch=count), original(x, num_items_in_batch=count)
            assert torch.equal(found, wanted)
            assert type(size) is torch.Size
            assert size == x.shape
    assert [row.counts for row in report(model).gemms if row.role == "fwd"] == ["8 of 8 calls"] * 2


def test_what_torch_export_advises_is_not_told_to_users(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        _export(nn.Linear(8, 8), torch.randn(1, 8))
    assert not caplog.records


def test_convolutions_as_functions_have_names() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.t = nn.Parameter(torch.randn(4, 2, 3)), nn.Parameter(torch.randn(4, 2, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv1d(F.conv1d(x, self.w, padding="same"), self.w.transpose(0, 1).contiguous())
            return F.conv_transpose2d(self.w[None, :, :, :1].transpose(0, 1)[:, :1], self.t[:1]) + y.mean()

    model, x = Model(), torch.randn(3, 2, 9)
    assert _sites(_export(model, x), model) == {"conv1d_0", "conv1d_1", "conv_transpose2d_0"}


def test_a_leaf_of_several_products_is_called_as_it_is() -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.attention = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            y, (h, _) = self.lstm(x)
            z, weights = self.attention(y, y, y, need_weights=False)
            return z + h[0][:, None], weights

    model, x = Model().eval(), torch.randn(2, 5, 8)
    exported = _export(model, x)
    assert [node.target for node in exported.graph.find_nodes(op="call_module")] == ["lstm", "attention"]
    for each in (x, torch.randn(3, 5, 8)):  # a recurrence has one length
        found, nothing = _run(exported, model, each)
        with torch.no_grad():
            assert torch.equal(found, model(each)[0])
        assert nothing is None


class _Stateful(nn.Module):
    """A forward of the test's own, which may read and write what is here."""

    run: Any

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.count, self.seen = nn.Linear(8, 8), 0, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _reads_data(self: Any, x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def _counts(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return x + self.fc(x)


def _appends(self: Any, x: Tensor) -> Tensor:
    self.seen.append(x.shape[0] > 1)
    return x + self.fc(x)


def _starts_once(self: Any, x: Tensor) -> Tensor:
    if self.count == 0:
        self.count, x = 1, x * 2
    return x + self.fc(x)


def _keeps_a_size(self: Any, x: Tensor) -> Tensor:
    self.count = x.shape[0]
    return x + self.fc(x)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (_starts_once, "changes attributes of a module"),
        (_keeps_a_size, "changes attributes of a module"),
        (_reads_data, "torch.export says "),
        (_counts, "changes attributes of a module"),
        (_appends, "changes attributes of a module"),
    ],
)
def test_what_has_no_graph_is_told_and_left_as_it_was(forward: Any, why: str) -> None:
    model = _Stateful().eval()
    model.run = forward
    with pytest.raises(NotSupported, match=why):
        _export(model, torch.randn(3, 8))
    assert (model.count, model.seen, float(model.total)) == (0, [], 0.0)
    assert "forward" not in vars(model.fc)


def test_a_plain_value_that_changes_nothing_may_be_written() -> None:
    """As the classifiers of transformers write the kind of their loss into the config."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.count == 0:
            self.count = 1
        return x + self.fc(x) if self.count == 1 else x

    model, x = _Stateful().eval(), torch.randn(3, 8)
    model.run = forward
    exported = _export(model, x)
    assert model.count == 0
    assert torch.equal(_run(exported, model, x), copy.deepcopy(model)(x))


def test_a_write_into_a_buffer_is_an_operation_of_the_graph() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.total.add_(1)
        return x + self.fc(x) * self.total

    model, x = _Stateful().eval(), torch.randn(3, 8)
    model.run = forward
    exported, twin = _export(model, x), copy.deepcopy(model)
    assert float(model.total) == 0
    for _ in range(2):
        assert torch.equal(_run(exported, model, x), twin(x))
    assert float(model.total) == 2


def test_hooks_of_the_root_do_not_see_the_trace() -> None:
    model, seen = nn.Sequential(nn.Linear(8, 8)), []
    model.register_forward_hook(lambda *_: seen.append(1))
    _export(model, torch.randn(3, 8))
    assert not seen
    model(torch.randn(3, 8))
    assert seen


def test_an_argument_that_no_graph_can_take_is_told() -> None:
    with pytest.raises(NotSupported, match="an argument is a object"):
        _export(nn.Linear(8, 8), object())


def test_gradients_and_random_numbers_of_the_caller_stay() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval(), torch.randn(3, 8, requires_grad=True)
    exported = _export(model, x)
    assert torch.is_grad_enabled()
    assert [str(node.op) for node in exported.graph.nodes].count("call_function") == 1  # dropout does nothing here
    assert torch.equal(_run(exported, model, x), model(x))


class _Plain:
    """A config."""

    def __init__(self) -> None:
        self.total = torch.zeros(2)


def _adds_to_a_tensor(self: Any, x: Tensor) -> Tensor:
    return x + self.fc(x) * self.held.add_(1).sum()


def _adds_to_the_first(self: Any, x: Tensor) -> Tensor:
    self.held[0] += 1
    return x + self.fc(x) * float(self.held[0])


def _adds_to_a_tensor_in_a_list(self: Any, x: Tensor) -> Tensor:
    return x + self.fc(x) * self.held[0].add_(1).sum()


def _adds_inside(self: Any, x: Tensor) -> Tensor:
    self.held["a"][0] += 1
    return x + self.fc(x) * self.held["a"][0]


def _adds_in_a_config(self: Any, x: Tensor) -> Tensor:
    return x + self.fc(x) * self.held.total.add_(1).sum()


@pytest.mark.parametrize(
    ("forward", "make", "has_graph"),
    [
        (_adds_to_a_tensor, lambda: torch.zeros(2), True),
        (_adds_to_a_tensor_in_a_list, lambda: [torch.zeros(2)], False),
        (_adds_to_the_first, lambda: np.zeros(2), False),
        (_adds_to_the_first, lambda: bytearray(2), False),
        (_adds_inside, lambda: {"a": [0.0]}, False),
        (_adds_in_a_config, _Plain, False),
    ],
)
def test_what_a_forward_writes_in_place_is_written_by_calls_alone(forward: Any, make: Any, has_graph: bool) -> None:
    torch.manual_seed(0)
    model, x = _Stateful().eval(), torch.randn(3, 8)
    model.run, model.held = forward, make()
    original, before = copy.deepcopy(model), pickle.dumps(model.held)
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    assert pickle.dumps(model.held) == before
    assert ("not-exported" not in [each.code for each in report(model).warnings]) is has_graph
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(model(x), original(x))
    assert not report(model).unserved


@pytest.mark.parametrize("draw", [lambda _: np.random.rand(), lambda _: random.random(), lambda held: held.random()])
def test_numbers_that_torch_does_not_draw_are_no_part_of_a_graph(draw: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.fc(x) * float(draw(self.seen[0]))

    model, x = _Stateful().eval(), torch.randn(3, 8)
    model.run, model.seen = forward, [np.random.default_rng(0)]
    original, results = copy.deepcopy(model), []
    for each in (model, original):
        np.random.seed(0)
        random.seed(0)
        if each is model:
            lpcompile(model, "fp32-emulated", (x,), mode="infer")
        with torch.no_grad():
            results.append([each(x) for _ in range(2)])
    assert all(map(torch.equal, *results))
