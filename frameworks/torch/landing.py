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


def watch(communicator, exchange):
    """Lets this exchange's gradients land before the communicator is closed by `shutdown` or the end of the program."""
    if not hasattr(communicator, "exchanges"):
        communicator.exchanges = weakref.WeakSet()
        # The last one registered runs first: before the session's own, which closes the communicator.
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)
    communicator.exchanges.add(exchange)


def land(communicator, limit_s=LANDING_S):
    """Waits until nothing of this rank's gradients is on its way, or it is hopeless."""
    deadline_s = time.monotonic() + limit_s
    for exchange in list(getattr(communicator, "exchanges", ())):
        try:
            exchange.land(deadline_s)
        except (commlib.CommlibError, TimeoutError) as error:
            _log.info("commlib: left with gradients on their way: %s", error)
            return


def shutdown():
    """Leaves the other ranks, once gradients that are on their way have arrived. Does nothing without init()."""
    if commlib.is_initialized():
        land(commlib.communicator())
    commlib.shutdown()


def _at_exit():
    # After an exception nobody knows what other ranks still wait for: they are to learn of it soon.
    failed = getattr(sys, "last_value", None) is not None
    if commlib.is_initialized() and not failed:
        land(commlib.communicator())
