"""Which cores a rank gets when ranks are bound: each an equal share of those that commrun may use, in order.

Bound ranks are never put on one core by the kernel while another is idle, where two that wait for each other take turns
instead of running side by side.
"""
from __future__ import annotations

from typing import Iterable, Tuple


def share(cores: Iterable[int], local_rank: int, local_size: int) -> Tuple[int, ...]:
    """The cores of one of the host's ranks; none, which leaves it unbound, if there are fewer cores than ranks.

    Example:
        >>> share({0, 1, 2, 3, 4}, 0, 2), share({0, 1, 2, 3, 4}, 1, 2), share({0}, 0, 2)
        ((0, 1), (2, 3, 4), ())
    """
    ordered = sorted(cores)
    if len(ordered) < local_size:
        return ()
    return tuple(ordered[local_rank * len(ordered) // local_size : (local_rank + 1) * len(ordered) // local_size])
