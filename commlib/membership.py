"""A rank's membership of a communicator: what it has done there, how it joins for want of work, what is to happen before it leaves.

The base class of Communicator, which has the collectives.
"""

from commlib.joining import Joining


class Membership:
    """Of one rank.

    Args:
        parent: the communicator of all ranks, if this one is a group's.
    """

    def __init__(self, parent):
        self._parent = parent
        self._before_close = parent._before_close if parent else []
        self._before_join, self._after_join = (parent._before_join, parent._after_join) if parent else ([], [])
        self._joining = None

    def stats(self):
        """What this rank has done so far: counts and bytes, a dict.

        Example:
            >>> import commlib
            >>> commlib.init().stats()["failed"]
            0
            >>> commlib.shutdown()
        """
        return {**self._engine.stats(), "in_flight": len(self._submitter.flight), "settings_hash": self.settings.hash}

    # ---- without work ----------------------------------------------------------------------------------------

    def join(self):
        """This rank has no more work: returns when all ranks have joined, and takes part in their all-reduces until then.

        A rank that has joined contributes what changes nothing: zeros to sums and averages, whose divisor stays the number of
        all ranks; to Min, Max and Product their neutral element. Other operations fail on every rank meanwhile. What is in
        flight ends as ever. Afterwards names begin anew: it does not matter how often a rank has used one before.

        Returns:
            The last rank that joined.

        Raises:
            PeerLeftError, PeerLostError: a rank shut down without joining, or was lost.
            ValueError: this is a group's communicator; join() concerns all ranks, and their groups' operations too.

        Example:
            >>> import commlib
            >>> commlib.init().join()
            0
            >>> commlib.shutdown()
        """
        if self._parent:
            raise ValueError("join() concerns all ranks: call it on the communicator of all, with commlib.join()")
        for callback in self._before_join:
            callback()
        if self._joining is None:
            self._joining = Joining(self._submitter.kin)
        last = self._joining.run()
        self._joining = None
        for callback in self._after_join:
            callback()
        return last

    def on_join(self, before=None, after=None):
        """Has before() called when this rank is about to join, and after() when all have, before join() returns."""
        for callback, callbacks in ((before, self._before_join), (after, self._after_join)):
            if callback is not None:
                callbacks.append(callback)

    def on_close(self, callback):
        """Has callback() called when this rank is about to leave the group, while operations still work; the last one first.

        In a forked child, which has nothing to leave, it is not called.

        Example:
            >>> import commlib
            >>> commlib.init().on_close(lambda: print("leaving"))
            >>> commlib.shutdown()
            leaving
        """
        self._before_close.append(callback)
