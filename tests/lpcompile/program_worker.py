"""The worker of test_programs.py, a process of its own: a plain model, a state_dict, a text; forward and backward.

python -m tests.lpcompile.program_worker NAME FOLDER      reads model.pt and program.lpir, writes result.pt
"""

import sys
from pathlib import Path

import torch

from lpcompile.programs import install_text
from tests.lpcompile.program_results import forward_backward
from tests.models_for_tests import build


def main(name: str, folder: Path) -> None:
    example = build(name, seed=99)  # other weights than those that are loaded
    example.model.load_state_dict(torch.load(folder / "model.pt"))
    path = folder / "program.lpir"
    install_text(example.model, path.read_text(), example_kwargs=example.batch, file=str(path))
    torch.save(forward_backward(example), folder / "result.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
