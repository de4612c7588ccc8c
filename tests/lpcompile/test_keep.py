"""keep: codes: what backward reads is kept in the bits of its format, and no bit of a result changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpcompile import Policy, load_policy, lpcompile, report
from lpcompile.errors import PolicyError
from tests.models_for_tests import build

LINEAR_POLICIES = (
    "fp8-rowwise",
    "hfp8",
    "hfp8-2019",
    "int8",
    "int4-fp4-2020",
    "mxfp8",
    "fqt-4-psq",
    "luq",
    "te-current",
)
BLOCKS = ("mxfp4", "nvfp4", "e5m2", "int4")


def policy_of(name: str, keep: str) -> Policy:
    if name in BLOCKS:
        rule = {"fwd": {"x": name, "w": name}, "bwd": {"dy": name, "w": name}, "grad": {"dy": name, "x": name}}
        return load_policy(Policy.model_validate({"version": 1, "rules": [rule], "keep": keep}))
    return load_policy(name).model_copy(update={"keep": keep})


def results(make: Callable[[], nn.Module], x: Tensor, policy: Policy, call: Any = None, **how: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = lpcompile(make(), policy, **how)
    given = x.clone().requires_grad_()
    y = call(model, given) if call else model(given)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    return [y.detach(), given.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


def check_alike(make: Callable[[], nn.Module], x: Tensor, name: str, call: Any = None, **how: Any) -> None:
    grid, codes = (results(make, x, policy_of(name, keep), call, **how) for keep in ("grid", "codes"))
    assert all(torch.equal(a, b) for a, b in zip(grid, codes, strict=True))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(200, 96), nn.GELU(), nn.Linear(96, 130))


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.q(x), self.k(x).transpose(-1, -2)) @ x


@pytest.mark.parametrize("name", [*LINEAR_POLICIES, *BLOCKS])
def test_leaves(name: str) -> None:
    check_alike(mlp, torch.randn(3, 65, 200), name)


@pytest.mark.parametrize("name", ["fp8-rowwise", "hfp8", "int8", "mxfp8", "e5m2", "int4", "mxfp4", "nvfp4"])
def test_products_of_activations(name: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 33, 64)
    check_alike(Scores, x, name, example_inputs=(x,))


@pytest.mark.parametrize("name", ["hfp8", "int8", "e5m2", "int4"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions(name: str, layout: torch.memory_format) -> None:
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=layout)

    def convolutions() -> nn.Module:
        grouped = nn.Conv2d(12, 6, 3, groups=2)
        return nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), grouped, nn.ConvTranspose2d(6, 4, 2))

    check_alike(convolutions, x, name)


@pytest.mark.parametrize("name", ["hfp8", "mxfp8", "int4"])
@pytest.mark.parametrize("is_reentrant", [True, False])
def test_checkpointing(name: str, is_reentrant: bool) -> None:
    x = torch.randn(70, 200)
    check_alike(mlp, x, name, lambda model, x: checkpoint(model, x, use_reentrant=is_reentrant))


@pytest.mark.parametrize("name", ["hfp8", "mxfp4", "fp8-rowwise"])
def test_bf16_models_and_autocast(name: str) -> None:
    check_alike(lambda: mlp().bfloat16(), torch.randn(70, 200).bfloat16(), name)

    def autocast(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)  # type: ignore[no-any-return]

    check_alike(mlp, torch.randn(70, 200), name, autocast)


@pytest.mark.parametrize("name", ["int4", "hfp8", "mxfp4"])
def test_nan_stays_where_it_is(name: str) -> None:
    x = torch.randn(70, 200)
    x[3, 5] = torch.nan
    grid, codes = (results(lambda: nn.Linear(200, 96), x, policy_of(name, keep)) for keep in ("grid", "codes"))
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(grid, codes))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(grid, codes))
    assert grid[2].isnan().any()
    assert name == "mxfp4" or not grid[2].isnan().all()


@pytest.mark.parametrize("name", ["gpt2-eager", "llama-sdpa"])
def test_language_models(name: str) -> None:
    def trained(keep: str) -> list[Tensor]:
        example = build(name)
        model = lpcompile(example.model, policy_of("hfp8", keep), example_kwargs=example.batch)
        torch.manual_seed(3)
        model(**example.batch).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(trained("grid"), trained("codes"), strict=True))


def saved_by(model: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """What autograd keeps, by storage, but for parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(each: Tensor) -> Tensor:
        place = each.untyped_storage().data_ptr()
        if place not in own:
            saved[place] = each
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        model(x)
    return saved


@pytest.mark.parametrize(
    ("name", "bits"), [("fp8-rowwise", 8), ("e5m2", 8), ("int4", 4), ("mxfp8", 8.25), ("mxfp4", 4.25), ("nvfp4", 4.5)]
)
def test_what_is_kept_takes_the_bits_of_the_format(name: str, bits: float) -> None:
    model, x = lpcompile(nn.Linear(256, 64), policy_of(name, "codes")), torch.randn(512, 256)
    kept = [each.numel() * each.element_size() for each in saved_by(model, x).values()]
    assert 8 * sum(kept) <= 1.02 * bits * x.numel()


def test_q_k_and_v_share_the_codes_of_one_x() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(256, 256) for _ in "qkv")

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x) + self.v(x)

    saved = saved_by(lpcompile(Three(), policy_of("e5m2", "codes")), torch.randn(300, 256))
    assert [each.numel() for each in saved.values() if each.dim()] == [300 * 256]


def test_the_memo_holds_no_grid_beside_the_codes() -> None:
    """ReLU keeps its result, which is the next layer's x: a cast that lived as long would lie beside its codes."""
    from runtime.quantize.cast_memo import MEMO
    from runtime.quantize.qtensor import QTensor

    layers: list[nn.Module] = [each for _ in range(4) for each in (nn.Linear(256, 256), nn.ReLU())]
    model = lpcompile(nn.Sequential(*layers), policy_of("e5m2", "codes"))
    y = model(torch.randn(300, 256))
    grids = [cast for _, _, casts in MEMO._entries.values() for cast in casts.values() if isinstance(cast, QTensor)]
    assert sum(cast.grid.shape == (300, 256) for cast in grids) <= 1
    y.sum().backward()


def test_small_layers_keep_codes_too() -> None:
    model, x = lpcompile(nn.Linear(16, 8), policy_of("e5m2", "codes")), torch.randn(4, 16)
    assert [each.dtype for each in saved_by(model, x).values()] == [torch.uint8]


def test_x_may_be_written_after_its_cast() -> None:
    model, x = lpcompile(nn.Linear(256, 64), policy_of("e5m2", "codes")), torch.randn(512, 256)
    wanted = model(x)
    wanted.sum().backward()
    gradient = model.weight.grad.clone()  # type: ignore[operator, union-attr]
    model.zero_grad()
    y = model(x)
    x.zero_()
    y.sum().backward()
    assert torch.equal(model.weight.grad, gradient)  # type: ignore[arg-type]


def test_a_second_derivative_is_refused() -> None:
    from runtime.errors import NotSupported

    model, x = lpcompile(nn.Linear(256, 64), policy_of("e5m2", "codes")), torch.randn(512, 256, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotSupported, match="second derivative"):
        dx.sum().backward()


def test_the_key(tmp_path: Any) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("version: 1\nextends: [hfp8]\nkeep: codes\n")
    policy = load_policy(path)
    assert policy.keep == "codes"
    (tmp_path / "q.yaml").write_text(policy.to_yaml())
    assert load_policy(tmp_path / "q.yaml").hash == policy.model_copy(update={"name": policy.name}).hash
    assert "keeps the codes" in policy.describe()
    path.write_text("version: 1\nextends: [hfp8]\nkeep: code\n")
    with pytest.raises(PolicyError, match="codes"):
        load_policy(path)


def by_hooks(model: nn.Module, x: Tensor) -> int:
    return sum(each.numel() * each.element_size() for each in saved_by(model, x).values())


@pytest.mark.parametrize("keep", ["grid", "codes"])
@pytest.mark.parametrize("name", ["fp8-rowwise", "e5m2", "int4", "mxfp8", "mxfp4", "nvfp4", "te-current"])
def test_the_report_says_the_bytes_that_hooks_see(name: str, keep: str) -> None:
    model = lpcompile(nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 64)), policy_of(name, keep))
    before = report(model)
    assert before.kept is None
    x = torch.randn(4096, 96)
    seen, after = by_hooks(model, x), report(model)
    assert after.kept == seen
    assert before.kept_per_row * 4096 == seen
    assert f"{seen:,} bytes" in after.to_text()
    assert [row.kept for row in after.gemms if row.role == "fwd"] == [None, None]


def test_products_of_activations_and_shared_operands_count_once() -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 33, 64)
    model = lpcompile(Scores(), policy_of("e5m2", "codes"), example_inputs=(x,))
    model(x.requires_grad_())  # casts of the weights are made, and kept by the model
    assert report(model).kept == by_hooks(model, x)
