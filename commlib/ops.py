"""Reductions as Horovod's users ask for them, turned into the core's; for the adapters of frameworks.

What is asked for and cannot be done is an error at the call, never something else done instead.
"""

import commlib
from commlib import Adasum


def check_op(op, adasum=False):
    """Refuses Adasum where it cannot be had, and turns None into Horovod's default, the average.

    Args:
        adasum: whether it can.

    Raises:
        ValueError: it cannot.
    """
    if op is Adasum and not adasum:
        raise ValueError("op=Adasum is not supported here: use Average or Sum, or Adasum in allreduce")
    return commlib.Average if op is None else op


def op_of(average, op, adasum=False):
    """The reduction that Horovod's two arguments mean together.

    Raises:
        ValueError: both were given.
    """
    if average is None:
        return check_op(op, adasum)
    if op is not None:
        raise ValueError("The op parameter supersedes average. Please provide only one of them.")
    return commlib.Average if average else commlib.Sum
