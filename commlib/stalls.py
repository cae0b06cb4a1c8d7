"""The log's word on operations that wait for ranks which have not submitted them.

The engine finds them and finds the words (native/stall.c); a thread of this file takes them out and hands them to logging.
"""

import functools
import logging
import threading
import weakref

from commlib.errors import CommlibError

_log = logging.getLogger("commlib")

# The end of the engine wakes the thread; this is how soon an engine that was dropped without an end is let go of.
_SLICE_S = 5.0


def watch(engine):
    """Starts telling the log of the engine's stalls, until the engine ends.

    Args:
        engine: a started commlib.engine.Engine, of several ranks.
    """
    thread = threading.Thread(target=_tell, args=(weakref.ref(engine),), name="commlib-stalls", daemon=True)
    thread.start()
    engine.ended.append(functools.partial(_wait_for, thread))


def _wait_for(thread):
    """After a shutdown nothing of ours is left; unless it is this thread that has dropped the engine."""
    if thread is not threading.current_thread():
        thread.join(_SLICE_S)


def _tell(reference):
    while True:
        engine = reference()
        if engine is None:
            return
        try:
            text = engine.next_stall(_SLICE_S)
        except CommlibError:
            return
        del engine
        if text is not None:
            _log.warning("commlib: %s", text)
