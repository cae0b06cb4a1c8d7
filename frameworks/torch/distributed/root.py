"""Where process groups begin and end: each default group has an engine of its own, on which its subgroups live, too.

Nothing here touches the default communicator of `commlib.init()`: both can be used in one process.
"""

import atexit
import os
import weakref

import torch.distributed as dist

from commlib.session import open_communicator
from commlib.torch.distributed.group import CommlibGroup
from commlib.torch.distributed.meeting import Meeting
from commlib.torch.distributed.work import Attendant


class Root:
    """One engine, and what all groups on it share.

    Args:
        communicator: of all its ranks.
    """

    def __init__(self, communicator):
        self.communicator = communicator
        self.attendant = Attendant()
        self.first = None  # the group of all ranks; its end is the engine's
        _roots.add(self)

    def leave(self, group):
        """A group has ended. Subgroups hold nothing that would have to end."""
        if self.first is not None and self.first() is group:
            self.close()

    def after_fork(self):
        """In a forked child, whose copy of the attendant's lock nobody may ever open again."""
        self.communicator.after_fork()
        self.attendant = Attendant()

    def close(self):
        """Fails what is in flight, tells the peers and stops the threads. Idempotent."""
        self.communicator.close()
        self.attendant.close()


# All that live, for the end of the process and for forked children.
_roots = weakref.WeakSet()


def create(options, settings=None):
    """Makes a process group, as `Backend.register_backend` wants it.

    Args:
        options: torch's DistributedBackendOptions: store, rank, size, timeout, and the ranks of a subgroup.
        settings: `init_process_group(pg_options=...)`: a commlib.Settings, equal on all ranks, or None.

    Raises:
        StartError: a rank did not come within the timeout.
        MismatchError: ranks differ in their settings.
    """
    parent = _default_group()
    ranks = list(options.global_ranks_in_group)
    if ranks and parent is not None:
        return CommlibGroup(parent.communicator.group(ranks), parent._root, options.timeout)
    timeout_s = options.timeout.total_seconds()
    meeting = Meeting(options.store, options.group_rank, options.group_size, timeout_s)
    root = Root(open_communicator(1, settings, timeout_s, backend="native", meeting=meeting))
    group = CommlibGroup(root.communicator, root, options.timeout)
    root.first = weakref.ref(group)
    return group


def _default_group():
    group = dist.group.WORLD if dist.is_initialized() else None
    return group if isinstance(group, CommlibGroup) else None


def _close_all():
    for root in list(_roots):
        root.close()


def _after_fork():
    for root in list(_roots):
        root.after_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
