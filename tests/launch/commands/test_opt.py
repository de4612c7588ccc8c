"""`lpcompile opt`: files and models through passes, and everything it can be asked to tell."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.cli import run
from launch.commands.example_models import example_model
from launch.commands.opt import choose_passes, describe_passes
from lpcompile.errors import LpError
from passes.ir.parser import parse_program
from passes.ir.program import Program
from passes.manager import parse_passes
from passes.pipelines import PASSES, PIPELINES
from tests.passes.golden import check
from tests.passes.golden import run as run_text
from tests.passes.ir.xdsl_dialect import verify_text
from tests.passes.programs_for_tests import E4M3, attention, layer, linear, two_layers


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fc.lpir"
    path.write_text(linear())
    return path


def test_a_file_goes_through_the_default_pipeline_to_stdout(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["opt", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out == run_text(linear(), PIPELINES["train"])
    assert not err


def test_passes_one_by_one_are_the_pipeline(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file says what has run on it; without --passes the rest of the pipeline runs."""
    half = tmp_path / "half.lpir"
    passes = PIPELINES["train"].partition("insert-casts")[0] + "insert-casts"
    assert run(["opt", str(file), "--passes", passes, "-o", str(half)]) == 0
    assert run(["opt", str(half)]) == 0
    assert capsys.readouterr().out == run_text(linear(), PIPELINES["train"])


def test_a_pipeline_is_called_by_its_name_and_none_by_nothing() -> None:
    program = Program({}, {})
    assert [each.name for each in choose_passes("train", program)] == [
        item.partition("{")[0] for item in re.sub(r"\{[^}]*\}", "", PIPELINES["train"]).split(",")
    ]
    assert choose_passes("", program) == []
    program.passes = ["annotate", "insert-casts"]
    assert choose_passes(None, program) == choose_passes(PIPELINES["train"].partition("insert-casts,")[2], program)


def test_print_ir_after_all_and_stats_go_to_stderr(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["opt", str(file), "--passes", "annotate,insert-casts", "--print-ir-after-all", "--stats"]) == 0
    out, err = capsys.readouterr()
    parse_program(out)
    check(
        err,
        """
// CHECK: // ----- after annotate -----
// CHECK: lp.spec = "fwd:
// CHECK: // ----- after insert-casts -----
// CHECK: "lp.gemm"
// CHECK: pass{{ +}}ms{{ +}}changed{{ +}}nodes before{{ +}}nodes after
// CHECK: annotate{{ +[0-9.]+ +}}yes{{ +}}5{{ +}}5
// CHECK: insert-casts{{ +[0-9.]+ +}}yes{{ +}}5{{ +}}12
// CHECK: total
""",
    )
    after_annotate = err.split("// ----- after annotate -----\n")[1].split("// ----- after")[0]
    assert parse_program(after_annotate).passes == ["annotate"]


def test_dot_has_a_cluster_per_graph_and_colours_what_is_quantized(tmp_path: Path) -> None:
    source, dot = tmp_path / "two.lpir", tmp_path / "two.dot"
    source.write_text(two_layers())
    assert run(["opt", str(source), "-o", str(tmp_path / "out.lpir"), "--dot", str(dot)]) == 0
    text = dot.read_text()
    program = parse_program((tmp_path / "out.lpir").read_text())
    names = [name for name, _ in program.graphs()]
    assert re.findall(r'^    label="(.*)";$', text, re.M) == names
    assert len(re.findall(r"\[label=", text)) == program.num_nodes()
    coloured = re.findall(r"(\w+) -> (\w+) \[color=(\w+), fontcolor=\3, penwidth=2, label=\"e4m3\"\];", text)
    sources = {source for source, _, _ in coloured}
    assert sources
    assert all("_quantize" in source for source in sources)
    assert {colour for *_, colour in coloured} == {"red3"}
    assert text.count("{") == text.count("}")


def test_list_passes_names_every_pass_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["opt", "--list-passes"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == describe_passes()
    assert all(re.search(rf"^{name}\b", out, re.M) for name in PASSES)
    assert "share-casts\n    one cast where several GEMMs cast the same tensor alike" in out
    assert f"pipeline train: {PIPELINES['train']}" in out


def test_verify_only_verifies(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["opt", str(file), "--verify"]) == 0
    assert capsys.readouterr().out == f"{file}: verified, 1 graphs, 5 nodes, 1 sites named\n"
    file.write_text(linear().replace('lp.site = "fc"', 'lp.sites = "fc"'))
    assert run(["opt", str(file), "--verify"]) == 2
    assert f"{file}:8:" in (err := capsys.readouterr().err)
    assert 'torch.call_function has no attribute lp.sites. Try "lp.site"' in err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["opt", "--help"]) == 0
    assert "lpcompile opt LlamaForCausalLM --policy fp8-rowwise" in re.sub(r"\s+", " ", capsys.readouterr().out)


MISTAKES = {
    "an order that cannot be": (["--passes", "insert-casts"], "insert-casts: it cannot run yet. Expected every GEMM"),
    "an unknown pass": (
        ["--passes", "anotate"],
        '"anotate" is not a pass. Expected the name of a pass. Got "anotate". Try "annotate"',
    ),
    "an unknown option": (["--passes", "fold-constants{lifetim=step}"], 'fold-constants: it has no option "lifetim"'),
    "a policy for a file": (["--policy", "hfp8"], "--policy: a file has its policy in it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(name: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, sentence = MISTAKES[name]
    assert run(["opt", str(file), *flags]) == 2
    out, err = capsys.readouterr()
    assert sentence in err
    assert not out


def test_stats_names_every_pass_in_full(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the terminal, or a pipe, is 80 columns wide."""
    assert run(["opt", str(file), "--stats"]) == 0
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    passes = [str(each) for each in parse_passes(PIPELINES["train"], PASSES)]
    assert [line[0] for line in lines] == ["pass", *passes, "total"]
    assert max(map(len, passes)) > 40


@pytest.mark.parametrize("flag", ["-o", "--dot"])
@pytest.mark.parametrize("target", ["nowhere/a.txt", "."])
def test_what_cannot_be_written_is_one_sentence(
    flag: str, target: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file.parent / target
    assert run(["opt", str(file), flag, str(path)]) == 2
    assert re.search(rf"{path}: cannot write the file. Got (No such file|Is a directory)", capsys.readouterr().err)


def test_a_binary_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02\xff\xfe" * 9)
    assert run(["opt", str(path)]) == 2
    assert f"{path}: not a text. Expected the text form of a program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("def make(): return {}['size']", "\"raising:make\" raises. Got KeyError: 'size'"),
        ("1 / 0", '"raising:make" is not there. Got ZeroDivisionError: division by zero'),
        ("def make(:", '"raising:make" is not there. Got SyntaxError: '),
        ("def make(size): return size", '"raising:make" raises. Got TypeError: make() missing 1 required'),
    ],
)
def test_a_callable_that_raises_is_one_sentence(
    body: str,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    (tmp_path / "raising.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "raising", raising=False)
    assert run(["opt", "raising:make", "--policy", "hfp8"]) == 2
    assert sentence in capsys.readouterr().err
    sys.modules.pop("raising", None)


def test_what_is_neither_file_nor_model_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        ([], "opt: nothing to work on. Expected FILE_OR_MODEL"),
        (["gtp", "--policy", "hfp8"], '"gtp" is not a model. Did you mean "gpt"?'),
        (["gpt"], "gpt: a model needs a policy"),
        (["LlamaForCausalLN", "--policy", "hfp8"], 'Did you mean "LlamaForCausalLM"?'),
        (["nowhere.lpir"], "nowhere.lpir: cannot read the file. Got No such file or directory"),
        (["nowhere:model", "--policy", "hfp8"], '"nowhere:model" is not there. Got No module named'),
        (["os:getcwd", "--policy", "hfp8"], '"os:getcwd" gives no model. Expected a torch.nn.Module'),
    ):
        assert run(["opt", *arguments]) == 2
        assert sentence in capsys.readouterr().err


def a_model() -> nn.Module:
    """Without example arguments: leaves only."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def a_model_and_a_call() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return a_model(), (torch.randn(2, 4),)


@pytest.mark.parametrize(("name", "kinds"), [("a_model", {"leaf"}), ("a_model_and_a_call", {"module"})])
def test_a_callable_gives_the_model(
    name: str, kinds: set[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "models_of_mine", sys.modules[__name__])
    assert run(["opt", f"models_of_mine:{name}", "--policy", "fp16"]) == 0
    text = capsys.readouterr().out
    program = parse_program(text)
    assert {unit.kind for unit in program.units.values()} == kinds
    assert len(program.choices) == 2
    verify_text(text)


@pytest.mark.parametrize("name", ["gpt", "GPT2LMHeadModel", "LlamaForCausalLM", "ViTForImageClassification"])
def test_a_model_by_name_is_compiled_as_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.lpir"
    assert run(["opt", name, "--policy", "fp8-rowwise", "--mode", "infer", "-o", str(path)]) == 0
    text = path.read_text()
    program = parse_program(text, str(path))
    assert {unit.kind for unit in program.units.values()} == {"module"}
    assert program.choices
    assert '!lp.quant<"e4m3", "row", 1, tensor<' in text
    verify_text(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "T5ForConditionalGeneration", "MixtralForCausalLM", "Qwen3ForCausalLM"]
)
def test_other_classes_of_transformers_build_small(name: str) -> None:
    example = example_model(name)
    assert sum(parameter.numel() for parameter in example.model.parameters()) < 2_000_000
    with torch.no_grad():
        example.model.eval()(*(example.args or ()), **(example.kwargs or {}))


def test_a_class_that_does_not_build_says_the_way_out() -> None:
    with pytest.raises(
        LpError, match=r"RagModel does not build at small sizes. Expected at most .* Try module:callable"
    ):
        example_model("RagModel")


def test_the_joint_graph_of_a_model_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "joint.py"
    assert run(["opt", "gpt", "--policy", "fp8-rowwise", "--joint", "-o", str(path)]) == 0
    text = path.read_text()
    assert text.startswith("# ----- graph 1 of 1 -----")
    for role in ("fwd", "bwd", "grad"):
        assert re.search(rf"torch\.ops\.lp\.{role}\.default\(.*  # transformer\.h\.0\.\S+ {role}$", text, re.MULTILINE)
    assert "torch.ops.lp.cast.default(" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.lpir"], "a file has no joint graph"),
        (["gpt", "--policy", "hfp8", "--passes", "annotate"], "no --passes"),
        (["gpt"], "a model needs a policy"),
    ],
)
def test_what_has_no_joint_graph_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["opt", *words, "--joint"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_attention_of_a_file_is_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "attention.lpir"
    path.write_text(attention(layer(E4M3)))
    assert run(["opt", str(path)]) == 0
    check(capsys.readouterr().out, '// CHECK-COUNT-2: "lp.gemm"')
