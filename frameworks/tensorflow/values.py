"""Rank, size and the like as ops: found out when the graph runs, not when it is made. Each is an int32 scalar."""

from commlib.tensorflow.operations import number


def rank_op(name=None):
    """This process's rank."""
    return number("rank")


def local_rank_op(name=None):
    """This process's rank among those of its host."""
    return number("local_rank")


def local_size_op(name=None):
    """How many ranks this host has."""
    return number("local_size")


def size_op(process_set_id=0, name=None):
    """How many ranks a process set has."""
    return number("size", process_set_id)


def process_set_included_op(process_set_id=0, name=None):
    """1 if this process is in the process set, else 0."""
    return number("process_set_included", process_set_id)
