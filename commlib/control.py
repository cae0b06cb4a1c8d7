"""What ranks agree on, over the control plane's one primitive: everybody's bytes told to everybody.

The only protocol here is JSON and comparison. Nothing in this file knows the engine: it is handed `exchange`.
"""

import json

from commlib.errors import MismatchError


class Control:
    """Agreement among the ranks of a communicator.

    Args:
        exchange: exchange(payload, name=..., timeout_s=...) -> every rank's bytes, in rank order.
        rank, size: this rank and the number of ranks.
    """

    __slots__ = ("_exchange", "rank", "size")

    def __init__(self, exchange, rank, size):
        self._exchange = exchange
        self.rank = rank
        self.size = size

    def agree(self, name, value, *, advice="give every rank the same", timeout_s=None):
        """Checks that all ranks hold the same value, field by field.

        Args:
            name: what is agreed on; it names the exchange and begins the error.
            value: a dict that JSON can carry.
            advice: the end of the error: what to do.

        Raises:
            MismatchError: on every rank, naming two ranks and what each holds.
        """
        payload = json.dumps(value, sort_keys=True).encode()
        payloads = self._exchange(payload, name=f"agree {name}", timeout_s=timeout_s)
        for rank, other in enumerate(payloads):
            if other != payloads[0]:
                raise MismatchError(f"{name} differs between ranks: {difference(payloads[0], other, rank)}: {advice}")

    def broadcast_bytes(self, payload, root_rank=0, *, name, timeout_s=None):
        """Returns the root's bytes on every rank; the others' payload is not looked at."""
        mine = payload if self.rank == root_rank else b""
        return self._exchange(mine, name=f"broadcast {name}", timeout_s=timeout_s)[root_rank]

    def gather(self, payload, root_rank=0, *, name, timeout_s=None):
        """Returns every rank's bytes, in rank order, on the root, and None elsewhere."""
        payloads = self._exchange(payload, name=f"gather {name}", timeout_s=timeout_s)
        return payloads if self.rank == root_rank else None


def difference(first, other, rank):
    """The fields in which rank's record (JSON bytes) differs from rank 0's, in words."""
    first, other = json.loads(first), json.loads(other)
    names = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
    sides = [
        f"rank {who} has " + ", ".join(f"{name} = {json.dumps(record.get(name))}" for name in names)
        for who, record in ((0, first), (rank, other))
    ]
    return ", but ".join(sides)
