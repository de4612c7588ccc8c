"""Regions: which values of a graph are held in low precision, so that the fewest bytes move: a minimum cut.

A value is computed in high precision, or as grid values, or as both. Grid values come from a cast of the high-precision
value, or the operation runs on the grid values of its inputs. The four places are steps of a chain, and every
rule says that one value's step bounds another's, which is what a cut can say:

    HIGH         high precision only
    BOTH_CAST    high precision, and a cast of it               has grid values
    BOTH_RUN     high precision, and run on grid values         has grid values, run
    LOW          run on grid values only                        has grid values, run, without high precision

Source: the chain of labels is that of H. Ishikawa, Exact Optimization for Markov Random Fields with Convex Priors, IEEE
PAMI 25(10), 2003.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import inf

import networkx as nx


class Place(IntEnum):
    """Where a value is held; a later one has everything that an earlier one has, less high precision in the last."""

    HIGH = 0
    BOTH_CAST = 1
    BOTH_RUN = 2
    LOW = 3

    @property
    def has_low(self) -> bool:
        return self >= Place.BOTH_CAST

    @property
    def is_run_on_grid(self) -> bool:
        return self >= Place.BOTH_RUN

    @property
    def has_high(self) -> bool:
        return self < Place.LOW


@dataclass(frozen=True)
class Value:
    """One value: the bytes that each way to have it moves, and in which form it is asked for."""

    inputs: tuple[int, ...]
    """Numbers of the values that it is computed from, in either precision; all before it."""
    high: int
    """Bytes that its operation moves in high precision."""
    low: int | None
    """Bytes that its operation moves on grid values; None: it cannot run on them."""
    cast: int
    """Bytes that a cast of it moves."""
    needs_high: bool = False
    needs_low: bool = False


def place(values: Sequence[Value]) -> list[Place]:
    """The places that move the fewest bytes, and of those the ones nearest to HIGH."""
    graph = nx.DiGraph()
    source, sink = "source", "sink"
    graph.add_nodes_from((source, sink))
    for number, value in enumerate(values):
        low, run, without_high = ((number, step) for step in (Place.BOTH_CAST, Place.BOTH_RUN, Place.LOW))
        # an edge is paid for where its tail is true (on the side of the source) and its head is not
        edges = [
            (source, without_high, value.high),
            (low, run, value.cast),
            (run, sink, inf if value.low is None else value.low),
            (run, low, inf),
            (without_high, run, inf),
        ]
        edges += [(without_high, sink, inf)] if value.needs_high else []
        edges += [(source, low, inf)] if value.needs_low else []
        edges += [(run, (each, Place.BOTH_CAST), inf) for each in value.inputs]
        edges += [((each, Place.LOW), without_high, inf) for each in value.inputs]
        for tail, head, bytes_ in edges:
            _add(graph, tail, head, bytes_)
    # of several minimum cuts networkx gives the one with most on the source's side; seen from the sink, that is HIGH
    _, (_, true) = nx.minimum_cut(graph.reverse(copy=False), sink, source)
    return [Place(sum((number, step) in true for step in list(Place)[1:])) for number in range(len(values))]


def bytes_moved(values: Sequence[Value], places: Sequence[Place]) -> float:
    """What these places cost, in bytes; infinity where they break a rule."""
    total = 0.0
    for value, where in zip(values, places):
        inputs = [places[each] for each in value.inputs]
        if (value.needs_high and not where.has_high) or (value.needs_low and not where.has_low):
            return inf
        if where.has_high and not all(each.has_high for each in inputs):
            return inf
        if where.is_run_on_grid and (value.low is None or not all(each.has_low for each in inputs)):
            return inf
        total += value.high * where.has_high + value.cast * (where is Place.BOTH_CAST)
        total += (value.low or 0) * where.is_run_on_grid
    return total


def _add(graph: "nx.DiGraph", tail: object, head: object, capacity: float) -> None:
    """Edges between the same two nodes add up. networkx reads an edge without a capacity as infinite."""
    if graph.has_edge(tail, head):
        capacity += graph.edges[tail, head].get("capacity", inf)
    if capacity == inf:
        graph.remove_edges_from([(tail, head)])
        graph.add_edge(tail, head)
    else:
        graph.add_edge(tail, head, capacity=capacity)
