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


def check_compression(compression):
    """Refuses every wire format but the tensor's own.

    Raises:
        ValueError: another compression.
    """
    if compression is not None and compression is not Compression.none:
        raise ValueError(f"compression={compression} is not supported yet: leave it out, or pass Compression.none")


def check_op(op):
    """Refuses reductions that the core lacks, and turns None into Horovod's default, the average.

    Raises:
        ValueError: Adasum.
    """
    if op is Adasum:
        raise ValueError("op=Adasum is not supported yet: use Average or Sum")
    return commlib.Average if op is None else op
