"""Hostile texts: what no program says is a ParseError with its place; nothing runs, nothing is accepted by mistake."""

import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch

from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.pipelines import PIPELINES
from runtime.errors import LpError, ParseError
from tests.passes.golden import run
from tests.passes.programs_for_tests import attention, convolutions, einsum, linear, two_layers
from tests.side_effects import recorded_side_effects

GRAPH = '"torch.graph"() <{sym_name = "m#0", path = "m", kind = "module"}> ({\n%s\n}) : () -> ()'


def module(*ops: str) -> str:
    return '"builtin.module"() ({\n' + "\n".join(ops) + "\n}) : () -> ()\n"


def call(target: str, result: str = "tensor<2x2xf32>", kind: str = "call_function", args: str = "") -> str:
    more = f', args = "{args}"' if args else ""
    return module(
        GRAPH
        % f"""^bb0(%x : tensor<2x2xf32>):
        %y = "torch.{kind}"(%x) {{target = "{target}"{more}}} : (tensor<2x2xf32>) -> {result}
        "torch.return"(%y) : ({result}) -> ()"""
    )


def accept(text: str) -> None:
    assert print_program(parse_program(text))


def convolution() -> str:
    return run(convolutions(), "decompose-products,annotate,insert-casts")


def geometry(text: str) -> str:
    changed, count = re.subn(r'geometry = "[^"]*"', f'geometry = "{text}"', convolution(), count=1)
    assert count == 1
    return changed


def test_what_the_cases_are_made_of_is_accepted() -> None:
    accept(call("torch.neg"))
    accept(call("neg", kind="call_method"))
    accept(call("torch.neg", "!torch.value"))
    accept(call("torch.sum", "tensor<2xf32>", args="_, dim=(1,)"))
    accept(geometry("stride=1,1 padding=1,1 dilation=1,1 groups=1"))
    accept(module('"lp.site"() {name = "a"} : () -> ()', '"lp.site"() {name = "b"} : () -> ()'))


REFUSED: dict[str, str] = {
    "a call of builtins": call("builtins.print(os.name)"),
    "an end of the process": call("builtins.exit(os.name)"),
    "an import": call("this.s"),
    "a number as a function": call("math.pi"),
    "a module as a function": call("torch"),
    "a list as a function": call("sys.argv"),
    "a function that reads files": call("torch.load"),
    "a function that calls": call("operator.call"),
    "no padding": geometry("stride=1,1 dilation=1,1 groups=1"),
    "no groups": geometry("stride=1,1 padding=1,1 dilation=1,1"),
    "a stride that is no number": geometry("stride=1,x padding=1,1 dilation=1,1 groups=1"),
    "a stride of 0": geometry("stride=0,1 padding=1,1 dilation=1,1 groups=1"),
    "a stride of 2^63": geometry(f"stride={2**63},1 padding=1,1 dilation=1,1 groups=1"),
    "two paddings of one stride": geometry("stride=1 padding=1,1 dilation=1,1 groups=1"),
    "a kernel larger than its image": geometry("stride=1,1 padding=1,1 dilation=11,1 groups=1"),
    "a word in a geometry": geometry("stride=1,1 padding=1,1 dilation=1,1 groups=1 colour=1"),
    "a size of 2^63": call("torch.neg", f"tensor<{2**63}xf32>"),
    "sizes of 2^63 bytes": call("torch.neg", f"tensor<{2**31}x{2**31}xf32>"),
    "a size of 5000 digits": call("torch.neg", f"tensor<{'9' * 5000}xf32>"),
    "an integer of 5000 digits": module(f'"lp.finding"() {{code = "a", where = {"9" * 5000}, what = "x"}} : () -> ()'),
    "an integer of 2^63": module(f'"lp.finding"() {{code = "a", where = {2**63}, what = "x"}} : () -> ()'),
    "a number beyond 64 bits": module('"lp.finding"() {code = "a", where = 1.0e999, what = "x"} : () -> ()'),
    "5000 digits among the arguments": call("torch.sum", args=f"_, dim={'9' * 5000}"),
    "lists in lists": module(f'"lp.finding"() {{code = "a", where = {"[" * 5000}, what = "x"}} : () -> ()'),
    "regions in regions": '"builtin.module"() ({' * 5000,
    "brackets in the arguments": call("torch.sum", args=f"_, {'(' * 5000}1{')' * 5000}"),
    "signs in the arguments": call("torch.sum", args=f"_, {'-' * 5000}1"),
    "sums in the arguments": call("torch.sum", args=f"_, {'1+' * 5000}1"),
    "an endless size": call("torch.sum", args=f"_, torch.Size(range(0, {10**18}))"),
    "two sites of a name": module('"lp.site"() {name = "a"} : () -> ()', '"lp.site"() {name = "a"} : () -> ()'),
    "two records": module(*['"lp.program"() {device = "cpu", passes = ""} : () -> ()'] * 2),
    "two graphs of a name": module(*[GRAPH % '"torch.return"() : () -> ()'] * 2),
    "a keyword twice": call("torch.sum", args="_, dim=0, dim=1"),
    "a key twice": call("torch.sum", "!torch.value", args="_, {'a': 1, 'a': 2}"),
    "a method with a quote": call('t\\") or (\\"', kind="call_method"),
    "a module with a quote": call('a\\"b', "!torch.value", kind="call_module"),
    "an empty path": call("a..b", "!torch.value", kind="call_module"),
    "an argument that is code": module(
        GRAPH.replace('"module"', '"module", arg_attrs = [{name = "x=print(1)"}]')
        % '^bb0(%x : !torch.value):\n"torch.return"(%x) : (!torch.value) -> ()'
    ),
    "an argument whose name is a number": module(
        GRAPH.replace('"module"', '"module", arg_attrs = [{name = 1}]')
        % '^bb0(%x : !torch.value):\n"torch.return"(%x) : (!torch.value) -> ()'
    ),
    "a value with a number of 5000 digits": call("torch.neg").replace("%y", f"%y_{'9' * 5000}"),
    "neg of 2x2 is 7x9": call("torch.neg", "tensor<7x9xf16>"),
    "neg of floats is integers": call("torch.neg", "tensor<2x2xi64>"),
    "a method that gives another shape": call("t", "tensor<7x9xf32>", kind="call_method"),
    "matmul of one operand": call("torch.matmul"),
    "a method that tensors lack": call("frobnicate", kind="call_method"),
    "a list as a tensor": call("torch.unbind"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_program_says_is_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = set(sys.modules)
    with pytest.raises(ParseError, match=r"^file\.lpir:\d+:\d+: "):
        parse_program(REFUSED[name], "file.lpir")
    assert not (set(sys.modules) - before) & {"this", "antigravity"}
    assert capfd.readouterr() == ("", "")


def made(target: str, args: str, result: str = "!torch.value", kind: str = "call_function") -> str:
    """A program of one call without an operand; of a method's, with the input."""
    operand, its_type = ("%x", "tensor<2x2xf32>") if re.search(r"\b_\b", args) else ("", "")
    return module(
        GRAPH
        % f"""^bb0(%x : tensor<2x2xf32>):
        %y = "torch.{kind}"({operand}) {{target = "{target}", args = "{args}"}} : ({its_type}) -> {result}
        "torch.return"(%y) : ({result}) -> ()"""
    )


_FILE = "'written', True, 10"
NO_COMPUTATIONS: dict[str, str] = {
    "torch.from_file": made("torch.from_file", _FILE, "tensor<10xf32>"),
    "aten.from_file": made("torch.ops.aten.from_file", _FILE, "tensor<10xf32>"),
    "aten.from_file.default": made("torch.ops.aten.from_file.default", _FILE, "tensor<10xf32>"),
    "aten.from_file.out": made("torch.ops.aten.from_file.out", f"{_FILE}, out=_"),
    "a tensor of an address": made("torch._from_blob", "1, 2"),
    "a tensor of a buffer": made("torch.frombuffer", "b'1234', dtype=torch.float32"),
    "aten.manual_seed": made("torch.ops.aten.manual_seed", "1,"),
    "aten.manual_seed.default": made("torch.ops.aten.manual_seed.default", "1,"),
    "aten.seed": made("torch.ops.aten.seed", ""),
    "aten._print": made("torch.ops.aten._print", "'hello'"),
    "aten._print.default": made("torch.ops.aten._print.default", "'hello'"),
    "torch._print": made("torch._print", "'hello'"),
    "aten.set_grad_enabled": made("torch.ops.aten.set_grad_enabled", "False"),
    "aten._backward": made("torch.ops.aten._backward", "_, []"),
    "aten.warn": made("torch.ops.aten.warn", "'hello'"),
    "aten.save": made("torch.ops.aten.save", "_, 'written'"),
    "aten._cufft_clear_plan_cache": made("torch.ops.aten._cufft_clear_plan_cache", "0"),
    "torch._cufft_set_plan_cache_max_size": made("torch._cufft_set_plan_cache_max_size", "0, 1"),
    "prim.Print": made("torch.ops.prim.Print", "'hello'"),
    "prim.RaiseException": made("torch.ops.prim.RaiseException", "'hello'"),
    "c10d.barrier": made("torch.ops.c10d.barrier", "_,"),
    "c10d.broadcast_": made("torch.ops.c10d.broadcast_", "[_], 0"),
    "_c10d_functional.all_reduce": made("torch.ops._c10d_functional.all_reduce", "_, 'sum', '0'"),
    "profiler": made("torch.ops.profiler._record_function_enter", "'hello'"),
    "a function that shares memory": made("torch.Tensor.share_memory_", "_,"),
    "a method that shares memory": made("share_memory_", "_,", kind="call_method"),
    "a method that runs backward": made("backward", "_,", kind="call_method"),
    "a method that registers": made("register_hook", "_, 1", kind="call_method"),
    "a method that makes classes": made("__init_subclass__", "_,", kind="call_method"),
    "a method that pickles": made("__reduce_ex__", "_, 4", kind="call_method"),
    "a storage": made("untyped_storage", "_,", kind="call_method"),
}


@pytest.mark.parametrize("name", NO_COMPUTATIONS)
def test_what_does_more_than_compute_is_refused_and_not_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    draws = torch.get_rng_state()
    with recorded_side_effects() as effects, pytest.raises(ParseError, match=r"^file\.lpir:\d+:\d+: "):
        parse_program(NO_COMPUTATIONS[name], "file.lpir")
    assert effects == []
    assert os.listdir() == []
    assert capfd.readouterr() == ("", "")
    assert torch.initial_seed() == 7
    assert torch.equal(torch.get_rng_state(), draws)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("target", "args", "result"),
    [
        ("torch.zeros", "2, 3", "tensor<2x3xf32>"),
        ("torch.zeros", "2, 3, device='cpu'", "tensor<2x3xf32>"),
        ("torch.empty", "1000000000, 1000, device='cpu'", f"tensor<{10**9}x1000xf32>"),
        ("torch.rand", "3, device='cpu'", "tensor<3xf32>"),
        ("torch.rand_like", "_, device=torch.device('cpu')", "tensor<2x2xf32>"),
        ("torch.tensor", "[1.0]", "tensor<1xf32>"),
        ("torch.arange", "4,", "tensor<4xi64>"),
        ("torch.ops.aten.full.default", "[2], 1.0", "tensor<2xf32>"),
        ("torch.ops.aten.sym_size.int", "_, 0", "!torch.value"),
        ("torch.ops.aten._assert_tensor_metadata.default", "_,", "!torch.value"),
        ("torch.Tensor.cuda", "_,", "tensor<2x2xf32>"),
        ("torch.Tensor.tolist", "_,", "!torch.value"),
        ("torch._C._set_grad_enabled", "True", "!torch.value"),
    ],
)
def test_what_makes_tensors_or_numbers_is_read_and_draws_nothing(target: str, args: str, result: str) -> None:
    draws = torch.get_rng_state()
    accept(made(target, args, result))
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_tensor_of_another_size_than_its_factory_makes_is_refused() -> None:
    with pytest.raises(ParseError, match=r"torch\.zeros is not called so"):
        parse_program(made("torch.zeros", "2, 3", "tensor<2x4xf32>"))


def test_reading_changes_no_grad_mode() -> None:
    text = GRAPH % (
        '%y = "torch.call_function"() {target = "torch._C._set_grad_enabled", args = "False"} : () -> !torch.value\n'
        '"torch.return"() : () -> ()'
    )
    accept(module(text))
    assert torch.is_grad_enabled()


def _sources() -> list[str]:
    return [
        run(linear(), PIPELINES["train"]),
        run(two_layers(), PIPELINES["train"]),
        run(attention(), "decompose-attention"),
        run(einsum(), "decompose-products"),
        convolution(),
    ]


_ODD = [
    *("", "-1", "1.5", "none", "%x", "9" * 20, "9" * 5000, "[" * 200, "{", "}", "\\", '"', "\\ED", "\ud800", "\0", "é"),
    *(
        "builtins.exit",
        "os.system",
        "this.s",
        "__class__",
        "torch.load",
        "tensor<7x9xf16>",
        "!torch.value",
        "array<i32",
    ),
    *("2147483648", "9223372036854775808", "-0", "1e400", "inf", "nan", "_", "lambda", "f(x)", "(" * 300),
]


def _mutate(text: str, draw: random.Random, vocabulary: list[str]) -> str:
    """One to three of: a token for another, one put in, a stretch left out, doubled, or moved."""
    tokens = re.findall(r"\w+|\W", text)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(tokens))
        other = draw.choice(_ODD) if draw.random() < 0.3 else draw.choice(vocabulary)
        length = draw.choice([1, 1, 2, 5, 40])
        match draw.randrange(5):
            case 0:
                tokens[place : place + 1] = [other]
            case 1:
                tokens.insert(place, other)
            case 2:
                del tokens[place : place + length]
            case 3:
                tokens[place:place] = tokens[place : place + length]
            case 4:
                target = draw.randrange(len(tokens))
                tokens[target:target] = tokens[place : place + length]
        if not tokens:
            tokens = [other]
    return "".join(tokens)


def _read_mutations(count: int, seed: int) -> int:
    """How many of `count` mutated texts were read; whatever is not read must say where."""
    draw, sources = random.Random(seed), _sources()
    vocabularies = [sorted(set(re.findall(r"\w+|\W", text))) for text in sources]
    num_read = 0
    for number in range(count):
        which = draw.randrange(len(sources))
        text = _mutate(sources[which], draw, vocabularies[which])
        try:
            with recorded_side_effects() as effects:
                program = parse_program(text, "file.lpir")
        except LpError:
            continue
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}: {type(error).__name__}: {error}") from error
        finally:
            assert effects == [], f"mutation {number} of seed {seed}: {effects}"
        num_read += 1
        printed = print_program(program)
        assert print_program(parse_program(printed)) == printed, f"mutation {number} of seed {seed}"
    return num_read


def test_mutated_texts_raise_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules), os.getcwd(), sorted(os.listdir())
    _read_mutations(400, seed=0)
    assert (set(sys.modules) & {"this", "antigravity"}, os.getcwd(), sorted(os.listdir())) == (set(), *before[1:])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_mutated_texts_raise_no_other_error(seed: int) -> None:
    num_read = _read_mutations(10_000, seed)
    print(f"seed {seed}: 10,000 mutated texts, {num_read} of them read")
