"""Horovod's names that stand for what commlib.torch does not do yet; each says so where it is used.

They exist so that a script which merely mentions them (`hvd.Compression.fp16 if args.fp16 else hvd.Compression.none`)
runs unchanged. What is asked for and cannot be done is a ValueError at the call, never something else done instead.
"""

from enum import Enum

import commlib


class Compression(Enum):
    """How gradients travel: `none` as they are. The others are known by name only."""

    none = "none"
    fp16 = "fp16"
    bf16 = "bf16"


class _Adasum:
    """Stands for a reduction that commlib does not have yet."""

    def __repr__(self):
        return "commlib.torch.Adasum"


Adasum = _Adasum()


class ProcessSet:
    """The ranks that take part in an operation. Today there is one such set, `global_process_set`: all of them."""

    process_set_id = 0

    @property
    def ranks(self):
        """All ranks, as a list."""
        return list(range(self.size()))

    def size(self):
        """How many ranks there are."""
        return commlib.size()

    def rank(self):
        """This process's place among them."""
        return commlib.rank()

    def included(self):
        """Whether this process belongs to the set: always, as the set is everybody."""
        return True


global_process_set = ProcessSet()


def check_compression(compression):
    """Refuses every wire format but the tensor's own.

    Raises:
        ValueError: another compression.
    """
    if compression is not None and compression is not Compression.none:
        raise ValueError(f"compression={compression} is not supported yet: leave it out, or pass Compression.none")


def check_process_set(process_set):
    """Refuses every group of ranks but that of all ranks.

    Raises:
        ValueError: another process set.
    """
    if process_set is not None and process_set is not global_process_set:
        raise ValueError("process sets are not supported yet: leave process_set out, or pass global_process_set")


def check_op(op):
    """Refuses reductions that the core lacks, and turns None into Horovod's default, the average.

    Raises:
        ValueError: Adasum.
    """
    if op is Adasum:
        raise ValueError("op=Adasum is not supported yet: use Average or Sum")
    return commlib.Average if op is None else op
