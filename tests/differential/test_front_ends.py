"""A thousand random models under random policies: front ends against each other and against the reference, in values,
strides and all gradients. A failure names its seed: `pytest -k "seed0-49"`, or `check(17)` in a shell.
"""

import copy
import random
import warnings
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from lpcompile import Policy, compile_joint, lpcompile
from runtime.numerics.specs import LayerSpec
from tests.differential.random_models import Case, random_model
from tests.differential.reference import Reference

NUM_MODELS = 1000
CHUNK = 50
OPS = [
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul",
]  # fmt: skip
Result = tuple[Tensor, dict[str, Tensor]]


def _policy(seed: int) -> tuple[Policy, LayerSpec]:
    """One rule for every product, and the same as specs."""
    draw = random.Random(-seed)
    forward, backward = draw.choice(["e4m3", "hfp8-143", "bf16", "int8", "e5m2"]), draw.choice(["e5m2", "e4m3", "bf16"])
    scale = {"scale": {"granularity": "tensor", "rule": draw.choice(["amax", "pow2"])}}
    has_scale = forward == "int8" or (draw.random() < 0.5 and "bf16" not in (forward, backward))
    scale = scale if has_scale else {}
    if has_scale and backward == "bf16":
        backward = "e5m2"
    a, dy = {"format": forward, **scale}, {"format": backward, **scale}
    rule = {"fwd": {"x": a, "w": a}, "bwd": {"dy": dy, "w": a}, "grad": {"dy": dy, "x": a}}
    policy = Policy.model_validate({"name": f"random-{seed}", "rules": [{"match": {"op": OPS}, **rule}]})
    tail = f" tensor/{scale['scale']['rule']}" if scale else ""
    cast, grad = f"{forward} nearest_even{tail}", f"{backward} nearest_even{tail}"
    spec = "; ".join(
        f"{role}: {lhs} * {cast} -> fp32 -> fp32" for role, lhs in (("fwd", cast), ("bwd", grad), ("grad", grad))
    )
    return policy, LayerSpec.parse(spec)


def _run(model: nn.Module, call: object, x: Tensor) -> Result:
    """Output, and every gradient by name, that of the input too."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    y = call(x)  # type: ignore[operator]
    weights = torch.arange(1, y.numel() + 1, dtype=y.dtype).div_(y.numel()).sub_(0.4).view(y.shape)
    (y * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return y.detach(), grads | {"(input)": x.grad}


def _strides(result: Result) -> dict[str, list[int]]:
    """Of every tensor, of the dims that have more than one place."""
    y, grads = result
    tensors = {"(output)": y, **grads}
    return {name: [step for step, size in zip(each.stride(), each.shape) if size > 1] for name, each in tensors.items()}


def _difference(got: Result, wanted: Result) -> float:
    """The largest difference of a tensor, over its norm."""
    assert got[1].keys() == wanted[1].keys()
    pairs = [(got[0], wanted[0]), *((got[1][name], wanted[1][name]) for name in got[1])]
    worst = 0.0
    for a, b in pairs:
        assert a.shape == b.shape
        norm = float(b.double().norm())
        worst = max(worst, float((a.double() - b.double()).norm()) / norm if norm else float(a.abs().max()))
    return worst


def check(seed: int) -> tuple[Case, float]:
    """Everything that is compared for one seed; gives the difference from the reference."""
    case, (policy, spec) = random_model(seed), _policy(seed)
    plain = _run(case.model, case.model, case.x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        identity = lpcompile(copy.deepcopy(case.model), "fp32-emulated", (case.x,))
        low = lpcompile(copy.deepcopy(case.model), policy, (case.x,))
    same = _run(identity, identity, case.x)
    if case.kind == "recurrent":  # whose cells torch fuses, in another order
        assert _difference(same, plain) < 1e-5
    else:
        assert _difference(same, plain) == 0.0, "fp32-emulated changes no bit"
        assert _strides(same) == _strides(plain)
    eager = _run(low, low, case.x)
    assert _strides(eager) == _strides(plain), "results and gradients lie as torch's do"
    if not case.is_bilinear:
        return case, 0.0
    reference = copy.deepcopy(case.model)
    mode = Reference(spec)
    with mode:
        wanted = _run(reference, reference, case.x)
    assert mode.num_products
    return case, _difference(eager, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, NUM_MODELS, CHUNK), ids=lambda first: f"seed{first}-{first + CHUNK - 1}")
def test_random_models(first: int) -> None:
    far, kinds = [], Counter[str]()
    for seed in range(first, first + CHUNK):
        try:
            case, difference = check(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {random_model(seed).model}") from error
        kinds[case.kind] += 1
        # sums in another order move a value over an edge of the next cast: an ulp of 8 bits here and there
        assert difference < 0.05, f"seed {seed} ({case.kind}) is {difference:.3g} from the reference: {case.model}"
        far += [seed] if difference > 1e-4 else []
    assert len(far) <= CHUNK // 8, f"too many are off by more than the order of sums: {far}"
    assert len(kinds) > 4


def test_a_few_random_models() -> None:
    for seed in range(1000, 1016):
        _, difference = check(seed)
        assert difference < 0.05, seed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2000, 2040))
def test_joint_is_eager_bit_for_bit(seed: int) -> None:
    case, (policy, _) = random_model(seed), _policy(seed)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low = lpcompile(copy.deepcopy(case.model), policy, (case.x,))
        eager = _run(low, low, case.x)
        joint = copy.deepcopy(case.model)
        got = _run(joint, compile_joint(joint, policy, backend="aot_eager"), case.x)
    for name, grad in got[1].items():
        if name.endswith("bias"):  # a sum over dy, which may lie otherwise in the graph: k's cancels to nothing
            torch.testing.assert_close(grad, eager[1].pop(name), rtol=1e-5, atol=1e-7)
    weights = {name: grad for name, grad in got[1].items() if not name.endswith("bias")}
    assert _difference((got[0], weights), eager) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3000, 3060))
def test_inference_is_the_forward_of_training(seed: int) -> None:
    case, (policy, _) = random_model(seed), _policy(seed)
    case.model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wanted = lpcompile(copy.deepcopy(case.model), policy, (case.x,))(case.x)
        fast = lpcompile(copy.deepcopy(case.model), policy, (case.x,), mode="infer")
        for x in (case.x, case.x):
            got = fast(x)
            assert got.stride() == wanted.stride()
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
