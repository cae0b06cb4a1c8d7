"""All collective algorithms, in one table per kind of operation.

An algorithm is one file with `applicable(shape)`, `nchunks(shape)`, `steps(rank, shape)` and `terms(shape)`, and one
line here; the tests and the selection find it in these tables. This file knows no algorithm's inside.
"""
from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType, ModuleType
from typing import Dict, Mapping, Tuple

from ..plan import Plan, Shape
from . import (
    allgather_direct,
    allgather_ring,
    alltoall_pairwise,
    barrier_dissemination,
    binomial,
    direct,
    halving_doubling,
    hierarchical,
    hierarchical_doubling,
    recursive_doubling,
    reducescatter_direct,
    reducescatter_ring,
    ring,
    scatter_allgather,
)

KINDS: Mapping[str, Mapping[str, ModuleType]] = MappingProxyType({
    "allreduce": MappingProxyType({
        "ring": ring,
        "recursive_doubling": recursive_doubling,
        "halving_doubling": halving_doubling,
        "direct": direct,
        "hierarchical": hierarchical,
        "hierarchical_doubling": hierarchical_doubling,
    }),
    "broadcast": MappingProxyType({"binomial": binomial, "scatter_allgather": scatter_allgather}),
    "allgather": MappingProxyType({"ring": allgather_ring, "direct": allgather_direct}),
    "reducescatter": MappingProxyType({"ring": reducescatter_ring, "direct": reducescatter_direct}),
    "alltoall": MappingProxyType({"pairwise": alltoall_pairwise}),
    "barrier": MappingProxyType({"dissemination": barrier_dissemination}),
})


def algorithm(kind: str, name: str) -> ModuleType:
    """The module of one algorithm.

    Raises:
        ValueError: no such kind, or no such algorithm of that kind; the message lists what there is.

    Example:
        >>> algorithm("allreduce", "ring").nchunks(Shape((4,)))
        4
    """
    if kind not in KINDS:
        raise ValueError(f"no kind of collective named {kind!r}; there are: {', '.join(KINDS)}")
    if name not in KINDS[kind]:
        raise ValueError(f"no {kind} algorithm named {name!r}; there are: {', '.join(KINDS[kind])}")
    return KINDS[kind][name]


def applicable(kind: str, shape: Shape) -> Dict[str, ModuleType]:
    """The algorithms of a kind that work on this shape, in the table's order."""
    return {name: module for name, module in KINDS[kind].items() if module.applicable(shape)}


@lru_cache(maxsize=1024)  # a few shapes x algorithms x one rank in real use; all ranks of one shape in tests
def plan_for(kind: str, name: str, rank: int, shape: Shape) -> Plan:
    """The plan of one rank; computed once per (kind, name, rank, shape).

    Args:
        kind: "allreduce", ...: a key of KINDS.
        name: a key of KINDS[kind].
        rank: in [0, shape.size).
        shape: how the group's ranks lie on hosts, and the root.

    Raises:
        ValueError: an unknown kind or name, a rank outside the group, or a shape that the algorithm does not support.

    Example:
        >>> plan = plan_for("allreduce", "ring", 0, Shape((2,)))
        >>> print(plan.steps[0])
        SEND [1, 2) to rank 1
    """
    module = algorithm(kind, name)
    if not 0 <= rank < shape.size:
        raise ValueError(f"rank must be in [0, {shape.size}), got {rank}")
    if not module.applicable(shape):
        raise ValueError(f"{kind} algorithm {name!r} does not support ranks per host {shape.ranks_per_host}")
    nchunks = module.nchunks(shape)
    inputs = nchunks // 2 if kind == "alltoall" else 0  # all-to-all alone has an input range and an output range
    return Plan(rank, nchunks, inputs, tuple(module.steps(rank, shape)))


def plans_for(kind: str, name: str, shape: Shape) -> Tuple[Plan, ...]:
    """The plans of all ranks: for verification, cost and simulation."""
    return tuple(plan_for(kind, name, rank, shape) for rank in range(shape.size))
