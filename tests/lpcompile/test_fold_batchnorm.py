"""Folded batch norms in compiled models: what numbers they give, when the graph holds, and what stays as it was."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile import Policy, lpcompile, report
from lpcompile.api import restore
from lpcompile.compiled import get_compiled
from lpcompile.frontends.install import installed
from lpcompile.programs import install_text, program_of
from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.ir.program import num_op
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES
from runtime.numerics import quantize
from runtime.ops.batch_norm import fold_bias, fold_input_bias, fold_weight, norm_scale, norm_shift
from tests.lpcompile.program_results import calls_by_graph
from tests.machine_facts import HAS_COMPILER
from tests.passes.ir.xdsl_dialect import verify_text
from tests.zoo.models import ZOO, build

_BatchNorm = nn.modules.batchnorm._BatchNorm
_OPS = [*(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)), "linear"]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    """An exported graph stands for calls without them."""
    with torch.no_grad():
        yield


def _policy(operand: str | dict[str, object]) -> Policy:
    fwd, rest = {"x": operand, "w": operand}, {"dy": "fp32", "w": "fp32"}
    rule = {"match": {"op": _OPS}, "fwd": fwd, "bwd": rest, "grad": {"dy": "fp32", "x": "fp32"}}
    return Policy.model_validate({"name": "p", "rules": [rule]})


INT8 = _policy({"format": "int8", "scale": {"granularity": "tensor", "rule": "amax"}})
E4M3 = _policy("e4m3")


def _varied(model: nn.Module) -> nn.Module:
    """The model with batch norms that have something to do, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for value, low, high in (
                (module.running_mean, -1.0, 1.0), (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5), (module.bias, -1.0, 1.0),
            ):  # fmt: skip
                if value is not None:
                    value.data.uniform_(low, high, generator=generator)
    return model.eval()


Pair = Callable[[], tuple[nn.Module, nn.Module]]

AFTER: dict[str, tuple[Pair, tuple[int, ...]]] = {
    "linear": (lambda: (nn.Linear(6, 8), nn.BatchNorm1d(8)), (5, 6)),
    "conv1d": (lambda: (nn.Conv1d(6, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8)), (2, 6, 9)),
    "conv2d": (lambda: (nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)), (2, 6, 8, 8)),
    "conv3d": (lambda: (nn.Conv3d(6, 8, 2), nn.BatchNorm3d(8, eps=1e-3)), (2, 6, 4, 5, 4)),
    "padded": (lambda: (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)), (2, 6, 8, 8)),
    "grouped": (lambda: (nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8)), (2, 6, 8, 8)),
    "depthwise": (lambda: (nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)), (2, 6, 8, 8)),
    "transposed": (lambda: (nn.ConvTranspose2d(6, 8, 3, stride=2), nn.BatchNorm2d(8)), (2, 6, 4, 4)),
    "grouped transposed": (
        lambda: (nn.ConvTranspose1d(6, 8, 3, groups=2, bias=False), nn.BatchNorm1d(8, affine=False)),
        (2, 6, 5),
    ),
}
BEFORE: dict[str, tuple[Pair, tuple[int, ...]]] = {
    "linear": (lambda: (nn.BatchNorm1d(6), nn.Linear(6, 8)), (5, 6)),
    "conv1d": (lambda: (nn.BatchNorm1d(6), nn.Conv1d(6, 8, 3)), (2, 6, 9)),
    "grouped": (lambda: (nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, groups=2, bias=False)), (2, 6, 8, 8)),
}
CASES = [pytest.param(*AFTER[name], id=f"{name}, norm") for name in AFTER]
CASES += [pytest.param(*BEFORE[name], id=f"norm, {name}") for name in BEFORE]


def _pair(make: Pair, shape: tuple[int, ...]) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(*make())
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    return _varied(model), torch.randn(shape)


def _folded_layer(model: nn.Sequential) -> nn.Module:
    """The layer alone with folded weight and bias, by the documented formula."""
    first, second = model
    is_after = isinstance(second, _BatchNorm)
    layer, norm = copy.deepcopy((first, second) if is_after else (second, first))
    s = norm_scale(norm.weight, norm.running_var, eps=norm.eps)
    t = norm_shift(norm.bias, norm.running_mean, s)
    is_transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    along = {"axis": int(is_transposed) if is_after else int(not is_transposed), "groups": getattr(layer, "groups", 1)}
    w, b = layer.weight, layer.bias
    bias = fold_bias(w, b, s, t) if is_after else fold_input_bias(w, b, t, **along)
    layer.weight, layer.bias = nn.Parameter(fold_weight(w, s, **along)), nn.Parameter(bias)
    return layer


def _count(model: nn.Module) -> int:
    return num_op(get_compiled(model).phase.program, "lp.norm_scale")


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_in_fp32_a_fold_is_within_rounding_of_float64(make: Pair, shape: tuple[int, ...]) -> None:
    model, x = _pair(make, shape)
    wanted = copy.deepcopy(model).double()(x.double())
    layer = _folded_layer(model).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.abs_()
    sizes = layer(x.abs()).double()
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    assert _count(model) == 1
    assert ((model(x).double() - wanted).abs() <= 8 * 2**-24 * sizes + 1e-6).all()
    assert calls_by_graph(model) == (1, 0)
    assert not report(model).warnings


@pytest.mark.parametrize("policy", [INT8, E4M3], ids=["int8", "e4m3"])
@pytest.mark.parametrize(("make", "shape"), CASES)
def test_what_is_cast_is_the_folded_weight_bit_for_bit(make: Pair, shape: tuple[int, ...], policy: Policy) -> None:
    model, x = _pair(make, shape)
    reference = lpcompile(_folded_layer(model), policy)
    lpcompile(model, policy, (x,), mode="infer")
    assert _count(model) == 1
    assert torch.equal(model(x), reference(x))


def test_int8_is_the_oracles_cast_of_the_folded_weight_and_an_exact_product() -> None:
    model, x = _pair(*AFTER["conv2d"])
    layer = _folded_layer(model)
    lpcompile(model, INT8, (x,), mode="infer")
    scales = [value.abs().max() / 127 for value in (x, layer.weight.detach())]
    grids = [quantize(value / scale, "int8").double() for value, scale in zip((x, layer.weight.detach()), scales)]
    exact = F.conv2d(*grids, None, (2, 2), (1, 1))
    assert exact.abs().max() < 2**24
    wanted = exact.float() * scales[0] * scales[1] + layer.bias.view(-1, 1, 1)
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize(
    ("name", "num_norms"), [("resnet18", 20), pytest.param("mobilenet", 52, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("policy", ["fp32-emulated", "int8"])
def test_every_batch_norm_of_a_network_is_folded(name: str, num_norms: int, policy: str) -> None:
    model, batch = _varied(build(name)), ZOO[name].batch(0)
    assert sum(isinstance(module, _BatchNorm) for module in model.modules()) == num_norms
    keys = list(model.state_dict())
    wanted = model(**batch)["logits"]
    lpcompile(model, policy, example_kwargs=batch, mode="infer")
    got = model(**batch)["logits"]
    assert _count(model) == num_norms
    assert list(model.state_dict()) == keys
    assert calls_by_graph(model) == (1, 0)
    assert not [finding for finding in report(model).warnings if finding.code == "batch-norm-kept"]
    bound = 1e-5 if policy == "fp32-emulated" else 0.05
    assert (got - wanted).abs().max() <= bound * wanted.abs().max()


def test_a_network_under_int8_is_the_network_of_folded_layers_bit_for_bit() -> None:
    model, batch = _varied(build("resnet18")), ZOO["resnet18"].batch(0)
    reference = copy.deepcopy(model)
    for module in list(reference.modules()):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("0", "1")):
            if isinstance(getattr(module, norm, None), _BatchNorm):
                pair = nn.Sequential(getattr(module, conv), getattr(module, norm))
                setattr(module, conv, _folded_layer(pair))
                setattr(module, norm, nn.Identity())
    lpcompile(model, "int8", example_kwargs=batch, mode="infer")
    lpcompile(reference, "int8", example_kwargs=batch, mode="infer")
    assert torch.equal(model(**batch)["logits"], reference(**batch)["logits"])


def test_under_a_policy_that_names_nothing_nothing_changes() -> None:
    model, x = _pair(*AFTER["conv2d"])
    wanted = model(x)
    lpcompile(model, "fp32", (x,), mode="infer")
    assert _count(model) == 0
    assert torch.equal(model(x), wanted)


def test_training_is_what_it_was() -> None:
    model, x = _pair(*AFTER["conv2d"])
    twin = lpcompile(copy.deepcopy(model), "fp32-emulated")
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    with torch.enable_grad():
        for each in (model, twin):
            each.train()
            each(x).sum().backward()
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters()))
    assert _count(lpcompile(twin.eval(), "fp32-emulated", (x,))) == 0, "mode=train folds nothing"
    restore(model)
    assert type(model[0]) is nn.Conv2d


def test_the_fold_follows_a_batch_norm_that_changes() -> None:
    model, x = _pair(*AFTER["conv2d"])
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    model[1].load_state_dict({**model[1].state_dict(), "bias": torch.full((8,), 3.0)})
    restored = restored_copy(model)
    torch.testing.assert_close(model(x), restored(x), rtol=1e-4, atol=1e-4)


def test_the_kept_cast_of_a_folded_weight_follows_both() -> None:
    model, x = _pair(*AFTER["conv2d"])
    twin = copy.deepcopy(model)
    lpcompile(model, "int8", (x,), mode="infer")
    state = get_compiled(model).state
    for change in (None, lambda each: each[1].weight.data.mul_(3), lambda each: each[0].weight.data.neg_()):
        if change is not None:
            change(model), change(twin)
        fresh = lpcompile(copy.deepcopy(twin), "int8", (x,), mode="infer")
        with torch.no_grad():
            assert torch.equal(model(x), fresh(x))
            assert torch.equal(model(x), fresh(x))
        assert state.constants.num_casts == HAS_COMPILER  # without one nothing tells that a weight is as it was


def restored_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    restore(copied)
    return copied


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "attributes, children or hooks of 1": lambda model: model[1].register_forward_hook(lambda m, args, y: None),
    "attributes, children or hooks of 0": lambda model: model[0].register_forward_hook(lambda m, args, y: None),
    "hooks of 1 are others": lambda model: model[1].train(),
    "children or hooks of 1 are": lambda model: setattr(model[1], "eps", 0.5),
    "children or hooks of 0 are": lambda model: setattr(model[0], "padding_mode", "circular"),
    "hooks of the model are others": lambda model: setattr(model, "1", nn.Identity()),
    "1.running_mean is gone": lambda model: setattr(model[1], "running_mean", None),
    "0.weight has another": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(4, 6, 3, 3))),
}


@pytest.mark.parametrize("why", CHANGES)
def test_where_the_fold_no_longer_holds_the_modules_run(why: str) -> None:
    model, x = _pair(*AFTER["conv2d"])
    original = copy.deepcopy(model)
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    model(x)
    for each in (model, original):
        CHANGES[why](each)
    if "weight" in why:  # 4 features for a batch norm of 8
        with pytest.raises(RuntimeError):
            model(x)
    elif "running_mean" in why:
        with pytest.raises(RuntimeError, match="running_mean"):
            model(x)
    else:
        assert torch.equal(model(x), original(x))
    assert calls_by_graph(model) == (1, 1)
    assert why in installed(model).first_unserved


@pytest.mark.parametrize("place", [0, 1])
def test_hooks_that_are_there_keep_the_modules(place: int) -> None:
    model, x = _pair(*AFTER["conv2d"])
    seen: list[Tensor] = []
    model[place].register_forward_hook(lambda module, args, y: seen.append(y))
    wanted = model(x)
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    seen.clear()
    assert torch.equal(model(x), wanted)
    assert len(seen) == 1
    (finding,) = report(model).warnings
    assert (finding.code, finding.where) == ("not-exported", str(place))
    assert "hooks" in finding.what


def test_a_batch_norm_without_statistics_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(2, 3, 8, 8)
    wanted = model(x)
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    assert torch.equal(model(x), wanted)
    assert "no running statistics" in report(model).warnings[0].what


def test_features_along_another_dim_are_not_folded() -> None:
    """A batch norm of (N, C, L) after a linear layer norms over C, which is not the layer's output."""
    torch.manual_seed(0)
    model, x = _varied(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))), torch.randn(4, 8, 6)
    wanted = model(x)
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    assert torch.equal(model(x), wanted)
    assert "a tensor of 2 dims is expected" in report(model).warnings[0].what


class _Shared(nn.Module):
    """One convolution, two batch norms, as a detection head has per level; and once none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 3, 1), nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](self.conv(x)) + self.norms[1](self.conv(x)) + self.conv(x)


def test_each_call_of_a_shared_layer_has_its_own_batch_norm() -> None:
    torch.manual_seed(0)
    model, x = _varied(_Shared()), torch.randn(2, 3, 5, 5)
    wanted = model(x)
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    assert _count(model) == 2
    torch.testing.assert_close(model(x), wanted)
    quantized = lpcompile(_varied(_Shared()), E4M3, (x,), mode="infer")
    assert _count(quantized) == 2
    assert quantized(x).shape == wanted.shape


def test_a_folded_model_is_copied_and_pickled_with_the_same_bits() -> None:
    model, x = _varied(nn.Sequential(*AFTER["conv2d"][0](), nn.ReLU())), torch.randn(2, 6, 8, 8)
    lpcompile(model, E4M3, (x,), mode="infer")
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(copy.deepcopy(model)(x), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
    assert calls_by_graph(model) == (1, 0)


@pytest.mark.parametrize("name", ["conv2d", "transposed"])
def test_the_text_of_a_folded_model_runs_as_the_model(name: str) -> None:
    model, x = _pair(*AFTER[name])
    program = program_of(model, E4M3, (x,))
    run_passes(program, parse_passes(PIPELINES["infer"], PASSES))
    text = print_program(program)
    assert print_program(parse_program(text)) == text
    verify_text(text)
    twin = copy.deepcopy(model)
    lpcompile(model, E4M3, (x,), mode="infer")
    install_text(twin, text, (x,))
    assert _count(twin) == 1
    assert torch.equal(twin(x), model(x))
