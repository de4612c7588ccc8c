"""`lpcompile policy`: what a user reads, and that a mistake is one sentence with its place and exit code 2."""

import json
from pathlib import Path

import pytest
import yaml

from launch.cli import run
from lpcompile import load_policy
from lpcompile.policy.file import shipped_policies

GOOD = """\
version: 1
name: mine
rules:
  - match: {op: linear}
    fwd: {x: e4m3, w: e4m3}
"""
UNMATCHED = f"{GOOD}  - match: {{name: no_such_layer}}\n    fwd: {{x: bf16, w: bf16}}\n"
SHIPPED = ("bf16", "fp16", "fp32", "fp32-emulated", "fp8-rowwise", "hfp8", "int8")


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "unmatched.yaml").write_text(UNMATCHED)


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a policy command that must succeed; what it says."""
    assert run(["policy", *arguments]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    return told.out


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a policy command that must be refused; its one sentence."""
    assert run(["policy", *arguments]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert told.err.endswith(".\n")
    return told.err


def test_list_names_every_shipped_policy(capsys: pytest.CaptureFixture[str]) -> None:
    lines = say(capsys, "list").splitlines()
    assert set(SHIPPED) <= set(shipped_policies())
    for name, path in shipped_policies().items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert load_policy(path).hash[:8] in line


def test_show_says_every_rule_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    told = say(capsys, "show", "hfp8")
    for words in ("NeurIPS 2019", "hfp8-143", "dy e5m2", "loss scale: dynamic, from 65536", "wire: e4m3"):
        assert words in told


@pytest.mark.parametrize("name", SHIPPED)
def test_what_show_prints_as_yaml_is_the_same_policy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "printed.yaml").write_text(say(capsys, "show", name, "--yaml"))
    assert load_policy(tmp_path / "printed.yaml").hash == load_policy(name).hash
    assert "is well formed" in say(capsys, "check", "printed.yaml")


def test_check_says_what_it_did_not_check(capsys: pytest.CaptureFixture[str]) -> None:
    told = say(capsys, "check", "good.yaml")
    assert '"mine" is well formed (rules: 1, hash ' in told
    assert "not checked, for lack of --model" in told


@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_check_with_a_model_says_what_each_gemm_computes_in(capsys: pytest.CaptureFixture[str], model: str) -> None:
    told = say(capsys, "check", "good.yaml", "--strict", "--model", model)
    (line,) = [line for line in told.splitlines() if line.split()[:1] == ["lm_head"]]
    assert "fwd   e4m3 nearest_even * e4m3 nearest_even" in line
    assert "good.yaml:4: rules[0]" in line
    assert "matched none" not in told


def test_a_narrow_terminal_does_not_cut_the_names_of_gemms(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "transformer.h.0.attn.c_attn " in say(capsys, "check", "good.yaml", "--model", "gpt")


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a check that finds the policy unfit; what it says."""
    assert run(["policy", "check", *arguments]) == 1
    return capsys.readouterr().out


def test_a_rule_that_matches_nothing_is_told_and_refused_if_strict(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "unmatched.yaml:6: rules[1]: (name no_such_layer) matched none of the "
    assert f"warning: {sentence}" in say(capsys, "check", "unmatched.yaml", "--model", "gpt")
    assert sentence in fail(capsys, "unmatched.yaml", "--model", "gpt", "--strict")


def test_a_rule_that_decides_nothing_is_told_and_refused_if_strict(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "dead.yaml").write_text(f"{GOOD}  - match: {{name: lm_head}}\n    fwd: {{x: bf16, w: bf16}}\n")
    assert "(name lm_head) decides nothing" in say(capsys, "check", "dead.yaml", "--model", "gpt")
    told = fail(capsys, "dead.yaml", "--model", "gpt", "--strict")
    assert "(name lm_head) decides nothing" in told
    (line,) = [line for line in told.splitlines() if line.strip().startswith("dead.yaml:6: rules[1]")]
    assert line.split()[-4:] == ["name", "lm_head", "1", "0"]


def test_what_does_not_run_as_it_says_is_a_failure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    int4 = "{format: int4, scale: {granularity: row}}"
    text = f"rules:\n  - match: {{op: linear}}\n    bwd: {{dy: fp32, w: {int4}}}\n"
    (tmp_path / "refused.yaml").write_text(text)
    told = fail(capsys, "refused.yaml", "--model", "llama")
    assert "does not run as the policy says: lm_head bwd: bwd w: a scale per row varies along the sum" in told


def test_every_phase_of_a_schedule_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    schedule = "schedule: [{from_step: 0, policy: bf16}, {from_step: 5}]\n"
    (tmp_path / "two.yaml").write_text(UNMATCHED + schedule)
    told = fail(capsys, "two.yaml", "--model", "gpt", "--strict")
    assert "from step 0: bf16" in told
    assert "from step 5: mine" in told
    assert "no_such_layer" in told


def test_a_model_of_the_current_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "my_own_nets.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(4, 4))\n"
    )
    told = say(capsys, "check", "good.yaml", "--model", "my_own_nets:make")
    assert "0     fwd   e4m3 nearest_even * e4m3 nearest_even" in told


def test_a_folder_of_transformers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    assert run(["policy", "check", "good.yaml", "--model", "saved"]) == 0
    assert "model.layers.0.mlp.up_proj" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert run(["policy", "check", "good.yaml", "--model", "empty"]) == 2
    assert '"empty" holds no model' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("wire: {format: fp16}", 'bad.yaml:6: wire.format: wire format "fp16" does not fit the buffer'),
        ("wire: {format: nf4}", "a format of 8 bits, such as e4m3 or e5m2"),
        ("wire: {format: uint8}", "has no negative values"),
        ("loss_scale: {kind: dynamic, init: 3}", "bad.yaml:6: loss_scale.init: init is 3. Expected a power of two"),
        ("loss_scale: {kind: dynamic, growth: 3}", "growth is 3"),
        ("loss_scale: {kind: dynamic, init: 8, min: 16}", "min is 16. Expected at most init, which is 8"),
    ],
)
def test_check_refuses_what_train_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, section: str, sentence: str
) -> None:
    (tmp_path / "bad.yaml").write_text(f"{GOOD}{section}\n")
    assert sentence in refuse(capsys, "check", "bad.yaml")


def test_strict_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model NAME" in refuse(capsys, "check", "good.yaml", "--strict")


def test_check_names_the_models_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    told = refuse(capsys, "check", "good.yaml", "--model", "gtp")
    assert '"gtp" is not a model. Did you mean "gpt"?' in told


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (GOOD.replace("x: e4m3", "x: e4m4"), 'bad.yaml:5: rules[0].fwd.x: "e4m4" is not a number format. Did you mean'),
        (GOOD.replace("fwd:", "fwt:"), "bad.yaml:5: rules[0]"),
        (GOOD.replace("version: 1\n", "version: 2\n"), "bad.yaml:1: version"),
        (f"{GOOD}wire: {{format: e4m3, blok: 256}}\n", 'Did you mean "block"'),
        (f"{GOOD}extends: [hpf8]\n", 'bad.yaml:6: extends[0]: "hpf8" is neither'),
        (f"{GOOD}rules: []\n", 'bad.yaml:6: the key "rules" stands here a second time; first on line 3'),
        ("rules: [\n", "bad.yaml:"),
        ("", "bad.yaml: not a policy"),
    ],
)
def test_check_refuses_a_bad_file_with_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, sentence: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    told = refuse(capsys, "check", "bad.yaml")
    assert told.startswith("bad.yaml:")
    assert sentence in told


@pytest.mark.parametrize("verb", ["show", "check"])
def test_an_unknown_policy_names_the_nearest(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    told = refuse(capsys, verb, "hpf8")
    assert told.startswith('"hpf8" is neither a shipped policy nor a file. Did you mean "hfp8"?')


def test_the_schema_is_json_and_knows_the_keys_of_every_shipped_file(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(say(capsys, "schema"))
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    for path in shipped_policies().values():
        keys = {key for key in yaml.safe_load(path.read_text()) if not key.startswith("x-")}
        assert keys <= set(schema["properties"])


@pytest.mark.parametrize("arguments", [["chek", "hfp8"], ["show"], ["check", "hfp8", "--no-such-flag"]])
def test_a_wrong_call_says_where_to_look(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    told = refuse(capsys, *arguments)
    assert told.endswith(" --help.\n")
    assert "?." not in told


def test_no_verb_is_answered_with_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policy"]) == 2
    told = capsys.readouterr()
    assert all(f" {verb} " in told.out for verb in ("list", "show", "check", "schema"))
    assert told.err == ""


@pytest.mark.parametrize("verb", ["list", "show", "check", "schema"])
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert f"lpcompile policy {verb}" in say(capsys, verb, "--help")
