"""Reductions as Horovod's users ask for them, turned into the core's; for the adapters of frameworks.

Adasum exists as a name so that a script which merely mentions it (`hvd.Adasum if args.use_adasum else hvd.Average`) runs
unchanged. What is asked for and cannot be done is an error at the call, never something else done instead.
"""

import commlib


class _Adasum:
    """Stands for a reduction that commlib does not have yet."""

    def __repr__(self):
        return "commlib.Adasum"


Adasum = _Adasum()


def check_op(op):
    """Refuses reductions that the core lacks, and turns None into Horovod's default, the average.

    Raises:
        ValueError: Adasum.
    """
    if op is Adasum:
        raise ValueError("op=Adasum is not supported yet: use Average or Sum")
    return commlib.Average if op is None else op


def op_of(average, op):
    """The reduction that Horovod's two arguments mean together.

    Raises:
        ValueError: both were given.
    """
    if average is None:
        return check_op(op)
    if op is not None:
        raise ValueError("The op parameter supersedes average. Please provide only one of them.")
    return commlib.Average if average else commlib.Sum
