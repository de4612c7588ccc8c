"""The experiments by name. A new one is a module here and its row; it is imported when it is asked for."""

from importlib import import_module
from typing import cast

from launch.reproduction.experiment import Experiment
from launch.training.config import ConfigError
from lpcompile.errors import did_you_mean, nearest_names

EXPERIMENTS = {
    "swamping": "dot products against length and chunk size",
    "accumulator-width": "variance that survives a narrow sum, against VRR's prediction",
    "fqt": "gradient quantizers PTQ, PSQ, BHQ in 4 to 8 bits: variance and bias",
    "update-rounding": "weights in 1-6-9, updated with nearest and stochastic rounding",
    "loss-scale": "gradients that are zero in fp16, against the loss scale",
    "four-bits": "casts to NVFP4: error and bias of nearest, stochastic, four over six, MS-EDEN",
    "accuracy": "what training with each recipe comes to, beside fp32 from the same weights in the same order",
}
"""Name -> what it measures."""


def experiment(name: str) -> Experiment:
    """The module of a row. ConfigError for others."""
    if name not in EXPERIMENTS:
        hint = nearest_names(name, tuple(EXPERIMENTS))
        raise ConfigError(did_you_mean(f'"{name}" is not an experiment', hint), where="reproduce")
    return cast(Experiment, import_module(f"launch.reproduction.{name.replace('-', '_')}"))
