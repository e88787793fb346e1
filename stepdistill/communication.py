"""What processes send each other in an iteration, and how long a ring of them takes for it: arithmetic alone.

In a ring of n processes each sends its neighbour one n-th of a tensor at a time: n - 1 times until everybody has all parts
(all-gather) or each has the sum of one (reduce-scatter), and twice that for the sum of all (all-reduce).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

FLOAT = 4  # bytes of a gradient, whatever the base's numbers are
ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


class Call(NamedTuple):
    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    size: float  # bytes of the whole tensor
    times: float = 1.0  # an iteration, on average


class Link(NamedTuple):
    latency: float  # seconds until the first byte is there
    bandwidth: float  # bytes a second that a process sends while it receives as many


def replicated(moves: Mapping[str, tuple[int, float]]) -> list[Call]:
    """Where every process holds whole networks: the gradients of each player that moves, averaged at once.

    moves: player -> numbers that it learns, and how often it moves in an iteration. Besides, a few numbers are averaged for the
    log, and flags asked for, one for each tensor that learns: a few kilobytes.
    """
    return [Call("all-reduce", FLOAT * numbers, often) for numbers, often in moves.values() if often]


def sharded(size: float, parts: int, forward: float, backward: float, learns: float = 0) -> list[Call]:
    """Where processes hold shares of a network (FSDP2): each pass gathers the weights, part by part, there and again back
    (where FSDP2 may fetch one part ahead that is no longer needed).

    size: bytes of what is shared out. forward, backward: passes through the network in an iteration, over all roles that are
    seen through it and all parts of the batch. learns: bytes of it that learn, whose gradients are summed in shares with every
    backward pass; of adapters there are none, see `replicated`.
    """
    calls = [Call("all-gather", size / parts, parts * (forward + backward))]
    return calls + ([Call("reduce-scatter", learns / parts, parts * backward)] if learns else [])


def sent(calls: Iterable[Call], processes: int) -> float:
    """Bytes that each process sends in an iteration."""
    share = (processes - 1) / processes
    return sum(call.times * ROUNDS[call.kind] * share * call.size for call in calls)


def seconds(calls: Iterable[Call], processes: int, link: Link) -> float:
    """That an iteration takes for it, on a ring whose slowest link this is."""
    hops = processes - 1
    return sum(
        call.times * ROUNDS[call.kind] * hops * (link.latency + call.size / processes / link.bandwidth) for call in calls
    )
