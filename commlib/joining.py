"""Join: a rank that has run out of work stands in for itself in what the others still reduce, until all have joined.

The engine tells the rank what others submit (native/join.c); this file decides what becomes of it, and ends the epoch. It knows
keys and handles; how a stand-in is made is the submitter's business.
"""

import numpy

from commlib.errors import CommlibError
from commlib.names import EPOCH, STRIDE

_SLICE_S = 0.1  # so that Python can run signal handlers (Ctrl-C)

_INVERSE = numpy.uint64(pow(STRIDE, -1, 1 << 64))


class Submitted:
    """The keys that this rank has used in an epoch, to be asked for by value.

    Args:
        names: every Names of this rank.
        first: the number of the first use in the epoch.
    """

    def __init__(self, names, first):
        used = [pair for one in names for pair in one.used_in_epoch()]
        self._first = first
        self._bases = numpy.array([base for base, _ in used], dtype=numpy.uint64)
        self._counts = numpy.array([count for _, count in used], dtype=numpy.uint64)

    def __contains__(self, key):
        """Whether some name has a use of this key: (key - base) / STRIDE is its number, and STRIDE is odd."""
        uses = (numpy.uint64(key) - self._bases) * _INVERSE - numpy.uint64(self._first)
        return bool((uses < self._counts).any())


class Joining:
    """One join of this rank, from its first call until all have joined; `run` may be interrupted and called again.

    Args:
        submitters: all of this rank on one engine; the first is that of all ranks.
    """

    def __init__(self, submitters):
        self._submitters = submitters
        self._engine = submitters[0].engine
        self._first = submitters[0].names.first
        with submitters[0].lock:
            self._engine.join()
            self._submitted = Submitted([one.names for one in submitters], self._first)
        self._answered = set()
        self._standing_in = []

    def run(self):
        """Takes part in what the others do. Returns the last rank that joined.

        Raises:
            PeerLeftError, PeerLostError: a rank has gone, so that not all will join.
        """
        told = None
        while type(told) is not int:
            told = self._engine.next_announced(_SLICE_S)
            if told is not None and type(told) is not int:
                self._answer(told)
        while self._standing_in:
            try:
                self._standing_in[-1].wait()
            except CommlibError:
                self._engine.check()  # what the others disagreed on is theirs to hear
            self._standing_in.pop()
        for submitter in self._submitters:
            submitter.names.begin_epoch(self._first + EPOCH)
        self._engine.end_join()
        self._submitters[0].flight.tell_watchers()
        return told

    def _answer(self, told):
        if told.key in self._answered or told.key in self._submitted:
            return
        self._answered.add(told.key)
        self._standing_in = [handle for handle in self._standing_in if not handle.done()]
        try:
            handle = self._submitter_of(told).stand_in(told)
        except (CommlibError, ValueError, MemoryError) as error:
            self._engine.refuse(told, str(error) or "out of memory")
        else:
            self._standing_in.append(handle)

    def _submitter_of(self, told):
        whole = self._submitters[0]
        if told.members is None:
            return whole
        known = next((one for one in self._submitters[1:] if one.members == told.members), None)
        return known or whole.for_members(told.members)  # this rank has not made the group yet
