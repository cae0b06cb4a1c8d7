"""Which gradients existed on any rank in a step, and whether a rank wants new groups: one small operation per step.

Nobody waits for it but who needs it: the counts, where this rank had no gradient; the wish, one step later.
"""

import torch

import commlib
from commlib.torch.tensors import buffer_of

# The numbers of steps of all ranks are added up in an int32.
_STEPS = 1 << 12


class Presence:
    """The counts of one step after the other.

    Args:
        communicator: the core's communicator.
        name: of the operation.

    Attributes:
        handle: of the operation that was sent last; None: there was none.
    """

    def __init__(self, communicator, name):
        self._communicator = communicator
        self._name = name
        self._counts = self._buffer = self.handle = None
        self._steps = 0

    def wanted(self):
        """Whether a rank wanted new groups in the last step; its operation is done when that step's gradients are."""
        return self.handle is not None and bool(self._landed()[-2])

    def check_steps(self):
        """Looks whether all ranks had made the same steps when they sent this last.

        Raises:
            RuntimeError: they had not, so their weights differ.
        """
        if self.handle is not None and self._landed()[-1] != self._steps * self._communicator.size:
            raise RuntimeError(
                f"ranks have made different numbers of steps, so their weights differ; this one had made {self._steps} (modulo "
                f"{_STEPS}). A step must be skipped by all ranks or by none: after an exception on one rank it still has to "
                "call step()"
            )

    def send(self, count, absent, wants, steps):
        """Tells all ranks about this one's step.

        Args:
            count: how many gradients there are.
            absent: numbers of those that this rank did not have.
            wants: whether this rank wants new groups.
            steps: how many steps this rank has made.
        """
        self._landed()
        if self._counts is None or len(self._counts) != count + 2:
            self._counts = torch.empty(count + 2, dtype=torch.int32)
            self._buffer = buffer_of(self._counts)
        self._counts.fill_(1)
        for number in (*absent, *(() if wants else (count,))):
            self._counts[number] = 0
        self._counts[-1] = self._steps = steps % _STEPS
        self.handle = self._communicator.allreduce_async_(
            self._buffer, name=self._name, op=commlib.Sum, overlapped=True
        )

    def anywhere(self, number):
        """Whether any rank had this gradient in the step that was sent last."""
        return bool(self._landed()[number])

    def _landed(self):
        if self.handle is not None:
            self.handle.wait()
        return self._counts
