"""The exchanges in real processes on gloo: error, equal bits on all ranks, specials, padding, dtypes, bytes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.collectives import all_reduce, reduce_scatter
from runtime.collectives.codec import BlockCodec, PlainCodec, WireSpec
from runtime.collectives.counter import WireCounter
from runtime.collectives.exchange import Lane, all_reduce_lanes, open_link, reduce_to_owners
from runtime.collectives.ledger import predict_all_reduce, predict_reduce_to_owners
from runtime.errors import WireError
from tests.multiprocess import run_ranks

BOUND = {"e4m3": 0.045, "e5m2": 0.09, "int8": 0.045}
SIZES = (1, 1000, 1024, 5003, 40001)
WORLDS = [2, 3, pytest.param(4, marks=pytest.mark.slow)]
RESULTS: dict[int, list[dict[str, Any]]] = {}


@pytest.fixture(params=WORLDS)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What `exchange` found on each rank; one launch for each world size."""
    world: int = request.param
    if world not in RESULTS:
        RESULTS[world] = run_ranks(exchange, world)
    return RESULTS[world]


def exchange(rank: int, world: int) -> dict[str, Any]:
    # Deterministic mode fills uninitialized memory with NaN, so that any padding that is not written shows.
    torch.use_deterministic_algorithms(True)
    return {
        "errors": {(format, numel): _errors(format, numel, rank, world) for format in BOUND for numel in SIZES},
        "shape": _keeps_shape_and_identity(rank),
        "special": {format: _special(format, rank) for format in ("e4m3", "e5m2")},
        "average": all_reduce(torch.full((64, 64), rank + 1.0), average=True)[0, 0].item(),
        "dtypes": [_error_of_dtype(dtype, rank, world) for dtype in (torch.bfloat16, torch.float16)],
        "strided": _strided(rank, world),
        "ones": _of_ones(world),
        "traffic": _traffic(rank, world),
        "refused": _refused(),
        "tampered": _tampered(rank, world),
        "subgroup": _subgroup(rank),
        "disagreements": _disagreements(rank, world),
    }


def inputs(numel: int, world: int, seed: int = 0) -> list[torch.Tensor]:
    """What each rank holds; any rank can compute all of it."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator).exp() for _ in range(world)
    ]


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def _errors(format: str, numel: int, rank: int, world: int) -> tuple[float, float, bytes]:
    xs = inputs(numel, world)
    summed = all_reduce(xs[rank].clone(), format)
    wide = inputs(numel * world, world, seed=1)
    part = reduce_scatter(torch.empty(numel), wide[rank], format)
    exact = sum(x.double() for x in wide)
    assert isinstance(exact, torch.Tensor)
    listed = reduce_scatter(torch.empty(numel), list(wide[rank].chunk(world)), format)
    assert torch.equal(part, listed)
    total = torch.stack(xs).double().sum(0)
    return relative(summed, total), relative(part, exact.chunk(world)[rank]), summed.numpy().tobytes()


def _keeps_shape_and_identity(rank: int) -> bool:
    x = torch.randn(7, 11, 31)
    return all_reduce(x) is x and x.shape == (7, 11, 31)


def _special(format: str, rank: int) -> list[bool]:
    """Which blocks are finite after one rank puts NaN into block 1 and the other Inf into block 4."""
    x = torch.ones(6 * 256)
    x[300 if rank == 0 else 1100] = float("nan") if rank == 0 else float("inf")
    all_reduce(x, format)
    return [bool(block.isfinite().all()) for block in x.view(6, 256)]


def _error_of_dtype(dtype: torch.dtype, rank: int, world: int) -> tuple[float, bool]:
    xs = [x.to(dtype) for x in inputs(3000, world, seed=2)]
    y = all_reduce(xs[rank].clone())
    small = all_reduce(xs[rank][:100].clone())
    exact = torch.stack(xs).double().sum(0)
    return relative(y, exact), torch.equal(small, torch.stack(xs)[:, :100].float().sum(0).to(dtype))


def _strided(rank: int, world: int) -> float:
    xs = inputs(6400, world, seed=3)
    total = torch.stack(xs).double().sum(0)
    y = xs[rank].clone().view(80, 80).t()
    all_reduce(y)
    column, every_second = xs[rank].clone().view(3200, 2)[:, 0], xs[rank].clone()[::2]
    halves = [all_reduce(column), all_reduce(every_second)]
    scattered = reduce_scatter(torch.empty(3200 // world * 2)[::2], xs[rank][::2][: 3200 // world * world])
    mine = total[::2][: 3200 // world * world].chunk(world)[rank]
    worst = max(relative(half, total[::2]) for half in halves)
    return max(relative(y, total.view(80, 80).t()), worst, relative(scattered, mine))


def _of_ones(world: int) -> list[bool]:
    """Views of one dimension and expanded inputs, which once were an error of `view`."""
    scattered = reduce_scatter(torch.empty(1000), torch.ones(1).expand(1000 * world))
    sums = [all_reduce(torch.ones(2000, 4)[:, 0]), all_reduce(torch.ones(4000)[::2]), scattered]
    return [bool((each == world).all()) for each in sums]


def _traffic(rank: int, world: int) -> list[bool]:
    """Whether the ledger's bytes are the counter's, for an all-reduce and for owners of unequal parts."""
    spec, counter, full = WireSpec(), WireCounter(), PlainCodec(torch.float32)
    link = open_link(counter=counter)
    all_reduce_lanes([Lane(BlockCodec(), torch.randn(5003)), Lane(full, torch.randn(77))], link)
    predicted = predict_all_reduce([(5003, 1), (77,)], torch.float32, spec, world)
    for kind, nbytes in (("gradient_compressed", predicted.compressed), ("gradient_full", predicted.full)):
        counter.expect(kind, nbytes)  # type: ignore[arg-type]
    first = counter.close_step()
    half = PlainCodec(torch.bfloat16)
    owned = [[Lane(BlockCodec(), torch.randn(100 * d)), Lane(half, torch.randn(d))] for d in range(world)]
    reduce_to_owners(owned, link)
    to_owners = predict_reduce_to_owners([{BlockCodec(): 100 * d, half: d} for d in range(world)], rank)
    second = counter.close_step()
    return [first.agrees, first.gradient == predicted.total, second.gradient == to_owners.total, second.calls == 1]


def _refused() -> list[str]:
    sentences = []
    for tensor, op in (
        (torch.ones(4, dtype=torch.int32), dist.ReduceOp.SUM),
        (torch.ones(4, dtype=torch.float64), dist.ReduceOp.SUM),
        (torch.ones(4), dist.ReduceOp.MAX),
        (torch.ones(1, 4).expand(3, 4), dist.ReduceOp.SUM),
        (torch.ones(4, dtype=torch.complex64), dist.ReduceOp.SUM),
    ):
        try:
            all_reduce(tensor, op=op)
        except WireError as error:
            sentences.append(str(error))
    try:
        reduce_scatter(torch.empty(5), torch.ones(5))
    except WireError as error:
        sentences.append(str(error))
    return sentences


def _tampered(rank: int, world: int) -> bool:
    xs = inputs(4096, world, seed=4)
    lanes = [Lane(BlockCodec(), xs[rank])]
    (honest,) = all_reduce_lanes(lanes, open_link())
    (swapped,) = all_reduce_lanes(lanes, open_link(tamper=lambda sent: [message.flip(0) for message in sent]))
    return torch.equal(honest.flat, swapped.flat)


def _subgroup(rank: int) -> float:
    group = dist.new_group([0, 1])
    if rank > 1:
        return 3.0
    return float(all_reduce(torch.full((2048,), rank + 1.0), group=group)[0])


def test_sum_is_within_the_bound_of_the_format(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for (format, numel), (all_error, scatter_error, _) in found["errors"].items():
            # Below 1024 elements full precision travels; a scattered input has W times the elements.
            assert all_error < (BOUND[format] if numel >= 1024 else 1e-6), (format, numel)
            assert scatter_error < (BOUND[format] if numel * len(ranks) >= 1024 else 1e-5), (format, numel)


def test_all_ranks_end_with_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for key, (_, _, bits) in ranks[0]["errors"].items():
        assert all(found["errors"][key][2] == bits for found in ranks)


def test_result_is_the_tensor_itself(ranks: list[dict[str, Any]]) -> None:
    assert all(found["shape"] for found in ranks)
    assert all(found["strided"] < BOUND["e4m3"] for found in ranks)
    assert all(found["ones"] == [True] * 3 for found in ranks)


def test_specials_reach_every_rank_and_spoil_only_their_block(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for finite in found["special"].values():
            if len(ranks) == 2:
                assert finite == [True, False, True, True, False, True]
            else:  # chunks of 6 * 256 / W elements have blocks of their own
                assert not finite[1]
                assert not finite[4]
                assert sum(finite) >= 2


def test_average_divides_by_the_world(ranks: list[dict[str, Any]]) -> None:
    assert all(found["average"] == pytest.approx((len(ranks) + 1) / 2, rel=0.07) for found in ranks)


def test_half_dtypes_sum_in_fp32(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for error, small_is_exact in found["dtypes"]:
            assert error < BOUND["e4m3"]
            assert small_is_exact


def test_bytes_are_what_the_ledger_predicts(ranks: list[dict[str, Any]]) -> None:
    assert all(all(found["traffic"]) for found in ranks)


def test_refuses_what_it_cannot_sum(ranks: list[dict[str, Any]]) -> None:
    int_dtype, double, other_op, expanded, complex_dtype, shape = ranks[0]["refused"]
    assert "share memory" in expanded
    assert "complex64" in complex_dtype
    assert "int32" in int_dtype
    assert "float64" in double
    assert "only sums" in other_op
    assert "inputs do not fit" in shape


def test_a_tampered_wire_changes_the_result(ranks: list[dict[str, Any]]) -> None:
    assert not any(found["tampered"] for found in ranks)


def test_a_subgroup_sums_among_its_members(ranks: list[dict[str, Any]]) -> None:
    assert all(found["subgroup"] == 3.0 for found in ranks)


def test_one_rank_is_left_alone() -> None:
    x = torch.randn(5000)
    assert torch.equal(all_reduce(x.clone()), x)
    assert torch.equal(reduce_scatter(torch.empty(5000), x), x)


def _raises(rank: int, world: int) -> None:
    if rank == 1:
        raise RuntimeError("rank 1 says no")


def test_the_launcher_tells_which_rank_raised() -> None:
    with pytest.raises(AssertionError, match="rank 1 says no"):
        run_ranks(_raises, 2, timeout_s=30)


def _disagreements(rank: int, world: int) -> list[str]:
    """What `check` says of calls that differ between ranks, each with a call of all that agrees after it."""
    sentences = []
    for call in (
        lambda: all_reduce(torch.ones(4096 + 16 * rank), check=True),
        lambda: all_reduce(torch.ones(4096), "e4m3" if rank else "e5m2", check=True),
        lambda: all_reduce(torch.ones(4096), block=128 << rank, check=True),
        lambda: reduce_scatter(torch.empty(2048 + rank), torch.ones((2048 + rank) * world), check=True),
        lambda: (
            all_reduce(torch.ones(4096), check=True)
            if rank
            else reduce_scatter(torch.empty(2048), torch.ones(2048 * world), check=True)
        ),
    ):
        try:
            call()
            sentences.append("")
        except WireError as error:
            sentences.append(str(error))
        assert all_reduce(torch.ones(4096), check=True)[0] == world
    return sentences


def test_ranks_that_disagree_are_told_before_anything_is_sent(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        size, format, block, part, call = found["disagreements"]
        assert "Expected 4096 values by BlockCodec(format='e4m3', block=256), as on rank 0" in size
        assert f"rank 1 of {len(ranks)}" in size
        assert "Got 4112 values" in size
        assert "e5m2" in format
        assert "block=128" in block
        assert "2049" in part
        assert "all_reduce" in call
        assert "reduce_scatter" in call
