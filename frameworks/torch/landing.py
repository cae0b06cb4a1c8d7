"""The end of a program: gradients that are still on their way land before this rank leaves, as others need them.

A script ends with step(), and step() returns before its gradients have arrived. Rank 0 may want to save the model then,
while the others have nothing left to do. A rank that leaves at once would take their gradients with it.
"""

import atexit
import logging
import sys
import time
import weakref

import commlib

# Other ranks may be a step behind, busy with its compute. One that is later than this is not waited for.
LANDING_S = 60.0

_log = logging.getLogger("commlib.torch")


# Communicator -> its Landing. Who is gone takes it along.
_landings = weakref.WeakKeyDictionary()


def landing_of(communicator):
    """The Landing of a communicator."""
    if communicator not in _landings:
        _landings[communicator] = Landing(communicator)
    return _landings[communicator]


class Landing:
    """What a communicator's optimizers have on their way.

    Args:
        communicator: before it closes, gradients land, unless the program ends with an exception: then nobody knows what
            other ranks still wait for, and they are to learn of it soon.
    """

    def __init__(self, communicator):
        self._optimizers = 0
        self._exchanges = weakref.WeakSet()
        communicator.on_close(self._before_close)
        communicator.on_join(self._before_join, self._after_join)

    def number(self):
        """How many optimizers had been wrapped before this one."""
        self._optimizers += 1
        return self._optimizers - 1

    def watch(self, exchange):
        """This exchange's gradients are to land, too."""
        self._exchanges.add(exchange)

    def _before_close(self):
        if not _ending.by_exception:
            self.land()
        for exchange in list(self._exchanges):
            exchange.ended = True

    def _before_join(self):
        """The last step's updates are made: nothing of it may be left when all begin anew."""
        for exchange in list(self._exchanges):
            if exchange.finish_updates is not None:
                exchange.finish_updates()

    def _after_join(self):
        for exchange in list(self._exchanges):
            exchange.begin_anew()

    def land(self, limit_s=LANDING_S):
        """Waits until nothing of this rank's gradients is on its way, or it is hopeless."""
        deadline_s = time.monotonic() + limit_s
        for exchange in list(self._exchanges):
            try:
                exchange.land(deadline_s)
            except (commlib.CommlibError, TimeoutError) as error:
                _log.info("commlib: left with gradients on their way: %s", error)
                return


class _Ending:
    """How the program ends."""

    def __init__(self):
        self.by_exception = False
        atexit.register(self._at_exit)  # after the session's own, which closes the communicator, and so called before it

    def _at_exit(self):
        self.by_exception = getattr(sys, "last_value", None) is not None


_ending = _Ending()
