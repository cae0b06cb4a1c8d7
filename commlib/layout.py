"""Where the ranks of a group live, as plans want it: numbered host by host.

Launchers may place ranks round robin; then kinds whose result depends on no rank's place in the plan (all-reduce,
broadcast, barrier) are planned over virtual ranks and relabelled, and the others see hosts of one rank each.
"""

from operator import index

from commlib import algorithms
from commlib.plan import Plan, Shape
from commlib.selection import ALONE

# Chunk r of these plans is rank r's part, so virtual ranks would put it in the wrong place.
_BY_RANK = frozenset(("allgather", "reducescatter", "alltoall"))


class Layout:
    """Shapes and plans of one group.

    Args:
        hosts: the host index of every rank.

    Example:
        >>> Layout((0, 1, 0, 1)).shape("allreduce", root=1)
        Shape(ranks_per_host=(2, 2), root=2)
    """

    def __init__(self, hosts):
        self.size = len(hosts)
        self._order = sorted(range(self.size), key=lambda rank: (hosts[rank], rank))
        self._is_relabelled = self._order != list(range(self.size))
        self._ranks_per_host = tuple(hosts.count(host) for host in sorted(set(hosts)))

    def shape(self, kind, root):
        """The shape that a kind is planned over."""
        if not self._is_relabelled:
            return Shape(self._ranks_per_host, root)
        if kind in _BY_RANK:
            return Shape((1,) * self.size, root)
        return Shape(self._ranks_per_host, self._order.index(root))

    def plan(self, kind, algorithm, rank, root):
        """One rank's plan."""
        if algorithm == ALONE:
            return _plan_alone(kind)
        shape = self.shape(kind, root)
        if not self._is_relabelled or kind in _BY_RANK:
            return algorithms.plan_for(kind, algorithm, rank, shape)
        return algorithms.plan_for(kind, algorithm, self._order.index(rank), shape).relabelled(self._order)


def _plan_alone(kind):
    """A group of one moves nothing; all-to-all still has its two chunk ranges."""
    inputs = 1 if kind == "alltoall" else 0
    return Plan(0, 1 + inputs, inputs, ())


def checked_ranks(ranks, rank, size):
    """The ranks of a group as a list of ints.

    Args:
        ranks: what the user gave.
        rank, size: this rank, and the number of those that the group is made of.

    Raises:
        ValueError: not at least one of the ranks in [0, size), one twice, or this one is not among them.
        TypeError: not a sequence of ints.
    """
    try:
        checked = [index(member) for member in ranks]
    except TypeError:
        raise TypeError(f"the ranks of a group are a sequence of ints, not {ranks!r}") from None
    if not checked or len(set(checked)) != len(checked) or min(checked) < 0 or max(checked) >= size:
        raise ValueError(f"a group needs ranks in [0, {size}), each once, not {checked}")
    if rank not in checked:
        raise ValueError(f"rank {rank} is not in the group of ranks {checked}: only its members make it and use it")
    return checked
