"""RunConfig: layers of values, and errors that say file, line and field."""

from pathlib import Path

import pytest

from launch.training.config import ConfigError, RunConfig, load_config


def test_flags_override_the_file_and_the_file_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 50\nlr: 1e-3\n")
    config = load_config({"steps": "70"}, file, base={"lr": 5e-3, "clip": 0.5}, base_name="checkpoint")
    assert (config.steps, config.lr, config.clip) == (70, 1e-3, 0.5)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = RunConfig(model="llama", width=64, lr=3e-4, policy="hfp8")
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    assert load_config({}, file) == config


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "model: resnt\n",
            'model: this value does not fit. Expected one of gpt, llama, resnet, mobilenet; did you mean "resnet"?',
        ),
        ("model: resnet\nvocab: 9\n", "resnet reads images: tokenizer and vocab are of text"),
        ("augment: crop-flip\n", "gpt reads text: image_size and augment are of images"),
        ("engine: none\nnproc: 2\n", "engine none is one process, not 2"),
        ("model: mobilenet\ndtype: bf16\n", "DeepSpeed makes batch norms of mobilenet bf16 too"),
        ("steps: 10\nlayrs: 2\n", 'run.yaml:2: layrs: "layrs" is not a field of a run. Did you mean "layers"?'),
        ("lr: 0.1\n\nlayers: 0\n", "run.yaml:3: layers: this value does not fit. Expected greater than or equal to 1."),
        (
            "engine: fsdp\n",
            "run.yaml:1: engine: this value does not fit. Expected one of deepspeed, ddp, none. Got 'fsdp'.",
        ),
        ("width: wide\n", "run.yaml:1: width: this value does not fit. Expected a valid integer"),
        ("width: 100\nheads: 3\n", "run.yaml: width (100) must be a multiple of heads (3)."),
        ("width: 36\nheads: 4\nmodel: llama\n", "must be even"),
        ("a: [1\n", "run.yaml:2: not YAML: while parsing a flow sequence"),
        ("- 1\n", "run.yaml:1: not a config. Expected a mapping of field: value. Got a list."),
    ],
)
def test_names_file_line_and_field(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config({}, file)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_has_defaults_of_its_own_under_what_is_said() -> None:
    assert (RunConfig(model="resnet").width, RunConfig(model="resnet").batch) == (16, 32)
    assert (RunConfig(model="resnet", width=24).width, RunConfig().width, RunConfig().batch) == (24, 256, 4)
    base = RunConfig(model="resnet", width=24, batch=8).model_dump()
    assert load_config({}, None, base, "old").width == 24


@pytest.mark.parametrize("written", ["1e3", "1000", "1E3"])
def test_an_integer_may_be_written_short(tmp_path: Path, written: str) -> None:
    assert load_config({"steps": written}).steps == 1000
    file = tmp_path / "run.yaml"
    file.write_text(f"steps: {written}\n")
    assert load_config({}, file).steps == 1000


def test_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--grad-accumulation: this value does not fit. Expected .* Got '0'"):
        load_config({"grad_accumulation": "0"})


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no-such.yaml: this file cannot be read"):
        load_config({}, Path("no-such.yaml"))


def test_a_resumed_run_may_train_longer_but_not_another_model() -> None:
    base = RunConfig(width=64, heads=2).model_dump()
    assert load_config({"steps": "999"}, None, base, "old").steps == 999
    with pytest.raises(ConfigError, match=r"--width: this is another model than the checkpoint's. Expected width = 64"):
        load_config({"width": "128"}, None, base, "old")


def test_every_field_has_a_description() -> None:
    assert [name for name, field in RunConfig.model_fields.items() if not field.description] == []
