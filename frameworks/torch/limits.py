"""Horovod's names that stand for what commlib.torch does not do yet; each says so where it is used.

They exist so that a script which merely mentions them (`hvd.Adasum if args.use_adasum else hvd.Average`) runs unchanged.
What is asked for and cannot be done is an error at the call, never something else done instead.
"""

import commlib


class _Adasum:
    """Stands for a reduction that commlib does not have yet."""

    def __repr__(self):
        return "commlib.torch.Adasum"


Adasum = _Adasum()


def check_op(op):
    """Refuses reductions that the core lacks, and turns None into Horovod's default, the average.

    Raises:
        ValueError: Adasum.
    """
    if op is Adasum:
        raise ValueError("op=Adasum is not supported yet: use Average or Sum")
    return commlib.Average if op is None else op


def join(device=-1):
    """Not there yet.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "join() is not supported yet: give every rank equally many batches, for example with "
        "torch.utils.data.DistributedSampler (which pads) or DataLoader(drop_last=True)"
    )
