"""What every rank tells all others in each step, in one small operation: which gradients it had, and how it made the step.

Nobody waits for it but who needs it: the counts, where this rank had no gradient; all the rest, one step later. This file
knows numbers; what they mean for groups and parameters is for others to say.
"""

import numpy

import commlib

# The numbers of steps of all ranks are added up in an int32.
_STEPS = 1 << 12
# Counts of two kinds in one number: how many ranks had a gradient, and above, on how many its parameter is frozen.
_FROZEN = 1 << 15

# How many ranks made the step (all but those that have joined), want new groups, ...
_PRESENT, _WISHES, _LOOKERS, _STEPS_MADE = -4, -3, -2, -1


class Presence:
    """The counts of one step after the other.

    Args:
        communicator: the core's communicator.
        name: of the operation.

    Attributes:
        handle: of the operation that was sent last; None: there was none.
        steps, frozen: what this rank told in it.
    """

    def __init__(self, communicator, name):
        self._communicator = communicator
        self._name = name
        self._counts = self._words = self._buffer = self.handle = None
        self._ones = self._everywhere = None  # what counts are where every rank has every gradient: told, and added up
        self.steps, self.frozen = 0, []

    def send(self, count, absent, frozen, *, wants, looked, steps):
        """Tells all ranks about this one's step.

        Args:
            count: how many gradients there are.
            absent: numbers of those that this rank did not have.
            frozen: numbers of those whose parameters require no gradient here.
            wants: whether this rank wants new groups.
            looked: whether somebody is about to see reduced gradients before step() takes them.
            steps: how many steps this rank has made.
        """
        self._landed()
        words = self._words
        if words is None or len(words) != count + 4:
            words = self._make(count)
        words[:_PRESENT] = self._ones
        for number in absent:
            words[number] = 0
        for number in frozen:
            words[number] += _FROZEN
        self.steps, self.frozen = steps, frozen
        words[_PRESENT], words[_WISHES], words[_LOOKERS], words[_STEPS_MADE] = 1, wants, looked, steps % _STEPS
        self.handle = self._communicator.allreduce_async_(
            self._buffer, name=self._name, op=commlib.Sum, overlapped=True
        )

    def _make(self, count):
        self._counts = numpy.empty(count + 4, dtype=numpy.int32)
        self._buffer = commlib.Buffer(self._counts.ctypes.data, (count + 4,), "int32", owner=self._counts, writable=True)
        # Once in a step, NumPy's own loops over so few words cost ten times as much as a memoryview's: their code is cold.
        self._ones = memoryview(numpy.full(count, 1, dtype=numpy.int32))
        self._everywhere = memoryview(numpy.full(count, self._communicator.size, dtype=numpy.int32))
        self._words = memoryview(self._counts)
        return self._words

    # ---- what the step that was sent last was like

    def anywhere(self, number):
        """Whether any rank had this gradient."""
        return bool(self._landed()[number] % _FROZEN)

    def wanted(self):
        """Whether a rank wanted new groups; the operation is done when that step's gradients are."""
        return self.handle is not None and bool(self._landed()[_WISHES])

    def is_seen_by_some(self):
        """Whether reduced gradients were seen on some ranks and not on others before step() took them."""
        return 0 < self._landed()[_LOOKERS] < self._landed()[_PRESENT]

    def differs(self):
        """Whether ranks had made different numbers of steps, had frozen different parameters or seen different gradients."""
        if self.handle is None:
            return False
        same_steps = self._landed()[_STEPS_MADE] == self.steps % _STEPS * self._landed()[_PRESENT]
        return not same_steps or self.frozen_differ() or self.is_seen_by_some()

    def frozen_differ(self):
        """Whether a parameter was frozen on some ranks and not on others."""
        if self._landed()[:_PRESENT] == self._everywhere:
            return False
        on_how_many = self._counts[:_PRESENT] // _FROZEN
        return bool(((on_how_many > 0) & (on_how_many < self._landed()[_PRESENT])).any())

    def _landed(self):
        if self.handle is not None:
            self.handle.wait()
        return self._words
