"""One operation of a process group as torch.distributed's Work, and the thread that completes futures.

Whoever waits for a Work moves its bytes himself. A future cannot be waited for that way, since C++ waits for it; so the
first one that somebody asks for starts a thread, which then waits for all works that have one. Knows no collective.
"""

import contextlib
import threading
import time

import torch
import torch.distributed as dist

from commlib import CommlibError

# Older torch's C++, such as DDP's, holds a Work by its half in C++ and would find the other one gone: it is kept until it was
# waited for. That torch keeps it itself is seen by what came to it with that.
_kept = None if hasattr(dist.ProcessGroup, "shutdown") else set()

# The attendant looks at the oldest work this long before it looks at the others.
_SLICE_S = 2e-3


class CollectiveTimeoutError(CommlibError, TimeoutError):
    """A collective of a process group was not done within its timeout: some rank did not call it, or not in time."""


class Work(dist.Work):
    """One operation in flight; made by the methods of a CommlibGroup.

    Args:
        what: how messages call it, such as "all_reduce".
        attendant: completes its future, if somebody asks for one.
        handles: of the core, all of which it needs.
        tensors: what `result` and the future give.
        land: called once with the handles' results, to bring them to the user's tensors; None: they are there.
        timeout_s: how long the operation may take from now on.
        source: the rank that a message came from, for receives.
    """

    def __init__(self, what, attendant, handles, tensors, land=None, timeout_s=None, source=-1):
        super().__init__()
        self._what = what
        self._attendant = attendant
        self._handles = handles
        self._tensors = tensors
        self._land = land
        self._timeout_s = timeout_s
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._source = source
        self._lock = threading.Lock()  # of the three below
        self._is_settled = False
        self._error = None
        self._future = self._outcome = None
        if _kept is not None:
            _kept.add(self)

    # ---- torch.distributed's names

    def wait(self, timeout=None):
        """Returns True when the operation is done, and its results are in the tensors.

        Args:
            timeout: a timedelta; None or 0: as long as the operation may take.

        Raises:
            CommlibError: it failed: MismatchError, PeerLostError, PeerLeftError, ShutdownError, CollectiveTimeoutError.
        """
        seconds = timeout.total_seconds() if timeout is not None else 0
        end_s = time.monotonic() + seconds if seconds > 0 else None
        if not self._settles_by(end_s):
            raise CollectiveTimeoutError(f"{self._what} is not done after {seconds:.3g} s; it goes on: wait again")
        _let_go(self)
        if self._error is not None:
            raise self._error.with_traceback(None)
        return True

    def is_completed(self):
        """True if the operation is done, well or not; its results are in the tensors then."""
        return self._settles_by(time.monotonic())

    def is_success(self):
        """True if it is done and did not fail."""
        return self.is_completed() and self._error is None

    def exception(self):
        """What `wait` would raise; None if it is not done, or is done well."""
        return self._error if self.is_completed() else None

    def result(self):
        """The tensors with the results, a list."""
        self.wait()
        return self._tensors

    def synchronize(self):
        """As `wait`: there are no streams on the CPU."""
        self.wait()

    def source_rank(self):
        """The rank that a message came from; -1 if this is no receive, or nothing has come yet."""
        return self._source

    _source_rank = source_rank

    def get_future(self):
        """A torch.futures.Future of the list of tensors; where the operation fails, it fails with the same text."""
        with self._lock:
            if self._future is None:
                self._outcome = torch.futures.Future()
                self._future = self._outcome.then(self._tell)
                is_new = True
            else:
                is_new = False
        if is_new:
            self._attendant.attend(self)
        return self._future

    # ---- for the attendant

    def complete(self):
        """The work is settled: its future learns how."""
        self._outcome.set_result(None)
        _let_go(self)

    def look(self, seconds):
        """Waits for at most so long; True: it is settled."""
        return self._settles_by(time.monotonic() + seconds)

    def _tell(self, _):
        if self._error is not None:
            raise self._error.with_traceback(None)
        return self._tensors

    # ---- the end, which comes once

    def _settles_by(self, end_s):
        """Waits until it is known how the operation ends, or until end_s (time.monotonic(); None: its own end). True: it is."""
        if self._is_settled:
            return True
        limit_s = self._end_s if end_s is None else end_s if self._end_s is None else min(end_s, self._end_s)
        try:
            if not self._begins_by(limit_s):
                return self._is_late()
            results = [handle.wait(None if limit_s is None else max(0.0, limit_s - time.monotonic())) for handle in self._handles]
        except TimeoutError:
            return self._is_late()
        except Exception as error:
            return self._settle(error)
        return self._settle(None, results)

    def _begins_by(self, end_s):
        """True if there are handles to wait for; a receive from anybody finds its peer first."""
        return True

    def _is_late(self):
        """True if the operation has used up its time, which fails it here."""
        if self._end_s is None or time.monotonic() < self._end_s:
            return False
        return self._settle(CollectiveTimeoutError(
            f"{self._what} was not done within {self._timeout_s:.3g} s, the timeout of its process group (or of its call): see "
            "that every rank of the group makes the same calls in the same order, or give init_process_group(timeout=...) more"
        ))  # fmt: skip

    def _settle(self, error, results=()):
        with self._lock:
            if not self._is_settled:
                if error is None and self._land is not None:
                    try:
                        self._land(results)
                    except Exception as wrong:
                        error = wrong
                self._error = error
                self._handles, self._land = [], None
                self._is_settled = True
        return True


def _let_go(work):
    if _kept is not None:
        _kept.discard(work)


class Attendant:
    """The thread that waits for works with futures; it begins with the first and ends with `close`."""

    def __init__(self):
        self._changed = threading.Condition()
        self._works = []
        self._thread = None
        self._is_closing = False

    def attend(self, work):
        """Completes a work's future when it is settled."""
        with self._changed:
            self._works.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="commlib futures", daemon=True)
                self._thread.start()
            self._changed.notify()

    def dismiss(self):
        """Lets the thread end as soon as it has nothing to wait for; returns at once."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def close(self):
        """Ends the thread; all operations have ended, well or not."""
        self.dismiss()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self):
        while True:
            with self._changed:
                while not self._works and not self._is_closing:
                    self._changed.wait()
                works = list(self._works)
            if not works:
                return
            works[0].look(_SLICE_S)
            for work in [work for work in works if work.is_completed()]:
                with self._changed:
                    self._works.remove(work)
                with contextlib.suppress(RuntimeError):  # a callback of the user's that fails is told by its own future
                    work.complete()
            works = None  # nothing is kept alive while there is nothing to do
