"""A lock that a forked child finds free, whatever a thread of its parent was doing: such threads do not exist there.

This file knows locks and forks.
"""

import os
import threading
import weakref

_turns = weakref.WeakSet()


class Turn:
    """A lock that its holder may take again, used as a context manager."""

    __slots__ = ("_lock", "__weakref__")

    def __init__(self):
        self.renew()
        _turns.add(self)

    def renew(self):
        """Nobody holds it."""
        self._lock = threading.RLock()

    def __enter__(self):
        self._lock.acquire()

    def __exit__(self, kind, error, traceback):
        self._lock.release()


def _renew_all():
    for turn in list(_turns):
        turn.renew()


os.register_at_fork(after_in_child=_renew_all)
