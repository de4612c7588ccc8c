"""The ledger's formulas against numbers worked out by hand, and its independence of the counter."""

import ast
from pathlib import Path

import torch

from runtime.collectives import counter as counter_module
from runtime.collectives.codec import BlockCodec, PlainCodec, WireSpec
from runtime.collectives.counter import WireCounter
from runtime.collectives.ledger import (
    Traffic,
    predict_all_gather,
    predict_all_reduce,
    predict_reduce_scatter,
    predict_reduce_to_owners,
    predict_ring_all_reduce,
    predict_ring_reduce_scatter,
)

SPEC = WireSpec()
CODES, PLAIN = BlockCodec(), PlainCodec(torch.bfloat16)
SHAPES = [(64, 64), (64,), (10, 10)]  # 4096 elements as codes, 164 in full precision


def test_all_reduce_sends_one_copy_on_two_ranks() -> None:
    assert predict_all_reduce(SHAPES, torch.float32, SPEC, 2) == Traffic(4096 + 16 * 4, 164 * 4)


def test_all_reduce_sends_two_chunks_to_each_other_rank() -> None:
    chunk = 1366 + 6 * 4  # ceil(4096 / 3) codes in 6 blocks
    assert predict_all_reduce(SHAPES, torch.bfloat16, SPEC, 3) == Traffic(2 * 2 * chunk, 2 * 2 * 55 * 2)


def test_all_reduce_without_a_spec_is_a_ring() -> None:
    assert predict_all_reduce(SHAPES, torch.float32, None, 4) == Traffic(full=2 * 3 * 4260 * 4 // 4)


def test_nothing_is_sent_alone() -> None:
    assert predict_all_reduce(SHAPES, torch.float32, SPEC, 1).total == 0
    assert predict_all_reduce(SHAPES, torch.float32, None, 1).total == 0
    assert predict_all_gather(100, 1) == 0


def test_reduce_scatter_sends_what_others_own() -> None:
    # Parts of ceil(n / 3): 1366, 1366, 1364 of the first; 22, 22, 20 and 34, 34, 32 of the others.
    assert predict_reduce_scatter(SHAPES, torch.float32, SPEC, 3, 0) == Traffic(1366 + 1364 + 2 * 6 * 4, (56 + 52) * 4)
    assert predict_reduce_scatter(SHAPES, torch.float32, SPEC, 3, 2) == Traffic(2 * 1366 + 2 * 6 * 4, 2 * 56 * 4)
    assert predict_reduce_scatter(SHAPES, torch.float32, None, 3, 0) == Traffic(full=2 * 4 * (1366 + 22 + 34))


def test_a_tensor_smaller_than_the_world_leaves_ranks_without_a_part() -> None:
    assert predict_reduce_scatter([(2,)], torch.float32, SPEC, 4, 0) == Traffic(0, 4)


def test_owners_of_nothing_get_nothing() -> None:
    assert predict_reduce_to_owners([{CODES: 512, PLAIN: 3}, {}, {CODES: 1}], 1) == Traffic(520 + 5, 6)


def test_rings_and_gathers() -> None:
    assert predict_ring_all_reduce(300, 3) == 400
    assert predict_ring_reduce_scatter(300, 3) == 200
    assert predict_all_gather(100, 4) == 300


def test_counter_counts_tensors() -> None:
    counter = WireCounter()
    a, b = torch.zeros(10), torch.zeros(6, dtype=torch.bfloat16)
    counter.all_to_all([[("gradient_compressed", a), ("gradient_full", b)]] * 2 + [[("gradient_full", a)]], rank=2)
    counter.all_gather([("parameter_gather", b)], world=3)
    counter.all_reduce("other", a, world=4)
    counter.reduce_scatter("other", a, world=4)
    counter.one_to_all("other", b)
    step = counter.close_step()
    assert step.counted == {
        "gradient_compressed": 80,
        "gradient_full": 24,
        "parameter_gather": 24,
        "other": 60 + 30 + 12,
    }
    assert step.calls == 5
    assert step.gradient == 104
    assert not step.agrees
    assert counter.close_step().agrees
    assert len(counter.steps) == 2


def test_counter_does_not_know_the_ledger() -> None:
    assert counter_module.__file__
    tree = ast.parse(Path(counter_module.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not any(name and name.startswith("runtime") for name in imported)
