"""One host's part of a job, and its only process that commrun starts there: python -m commlib.launch.host.

Orders come as frames over standard input, what happens goes back over standard output. When the input ends or stays silent
(commrun was killed, the network is gone) nobody is left to work for: the ranks are ended, to the last descendant. The
job's secret is part of the first order, and so on no command line.
"""
from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import time
from typing import Callable, Dict, List, Optional, Tuple

from commlib.bootstrap import StartError
from commlib.connect import host_identity
from commlib.launch import environment, network, processes, survey
from commlib.launch.caller import DESCRIPTOR, file_of
from commlib.launch.cores import share
from commlib.launch.words import FOR_HOST_ONLY, LOST_S, MARK, beat_s
from commlib.launch.loop import WRITE, Loop
from commlib.launch.ranks import Ranks, firmly
from commlib.rendezvous import listen
from commlib.rendezvous_server import Server
from commlib.rendezvous_wire import Decoder, Message, encode
from commlib.secret import VARIABLE, Secret
from commlib.version import VERSION

EXPLAIN_S = 1.0                # the store waits this long for the reason why a rank's connection broke: it may come from afar
_FULL_NBYTES, _LOW_NBYTES = 1 << 20, 1 << 18  # of what waits for commrun: ranks wait with their output meanwhile
_READ_NBYTES = 1 << 16
_LEAVE_S = 2.0                 # for the last words to be taken


class Host:
    """Runs once, in the main thread of a process of its own.

    Args:
        source, target: descriptors of the connection with commrun.
    """

    def __init__(self, source: int, target: int):
        self._source, self._target = source, target
        self._decoder, self._outbox = Decoder(), bytearray(MARK)
        self._job: Dict = {}
        self._call = bytearray()
        self._ranks: Optional[Ranks] = None
        self._server: Optional[Server] = None
        self._paused = self._lost = self._done = self._leaving = False
        self._heard_at = self._beat_at = time.monotonic()
        for descriptor in (source, target):
            os.set_blocking(descriptor, False)

    def run(self) -> int:
        with Loop(self._interrupted) as loop:
            self._loop = loop
            loop.watch(self._source, self._read)
            self._send({"op": "hello", **facts()})
            try:
                while not self._leaving and not (self._lost and (self._ranks is None or self._done)):
                    self._turn()
                self._flush_within(_LEAVE_S)
            finally:
                if self._server is not None:
                    self._server.close()
        return 1 if self._lost else 0

    def _turn(self) -> None:
        looked_at = time.monotonic()
        silent_at = float("inf") if self._lost else self._heard_at + self._lost_s
        own = float("inf") if self._ranks is None else self._ranks.deadline
        self._loop.turn(min(silent_at, own, float("inf") if self._lost else self._beat_at))
        # only if a look after that time found nothing: if it was we who were stopped, what was said meanwhile lies there
        if not self._lost and looked_at >= self._heard_at + self._lost_s:
            self._lose()
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + beat_s(self._lost_s)
            self._send({"op": "alive"})
        if self._ranks is not None:
            self._tend()

    @property
    def _lost_s(self) -> float:
        return self._job.get("lost_s", LOST_S)

    # ---- orders ----

    def _read(self, _events: int) -> None:
        try:
            data = os.read(self._source, _READ_NBYTES)
        except BlockingIOError:
            return
        if not data:
            self._lose()
            return
        self._heard_at = time.monotonic()
        self._decoder.feed(data)
        message = self._decoder.next()
        while message is not None:
            _ORDERS[message.header["op"]](self, message)
            message = self._decoder.next()

    def _alive(self, _message: Message) -> None:
        """Heard, which is all that it is for."""

    def _take_call(self, message: Message) -> None:
        self._call += message.payload

    def _prepare(self, message: Message) -> None:
        """Learns what is to be run; refuses what cannot be."""
        self._job = message.header
        own = {name: value for name, value in os.environ.items() if name not in FOR_HOST_ONLY}
        self._job["environ"] = {**own, **json.loads(message.payload)}
        try:
            os.chdir(self._job["cwd"])
        except OSError as error:
            self._refuse(f"has no folder {self._job['cwd']} ({error.strerror}): make it there, or name another with --wdir")
            return
        wrong = processes.unusable(self._job["command"][0], self._job["environ"].get("PATH"))
        if wrong is not None:
            self._refuse(f"cannot start {wrong[1]}, that holds on every host")
            return
        self._send({"op": "ready"})

    def _refuse(self, text: str) -> None:
        self._send({"op": "refused", "text": text})

    def _serve(self, message: Message) -> None:
        """Opens the store where the ranks meet; in reach of other hosts if there are any."""
        job, secret = message.header["job"], Secret(self._job["environ"][VARIABLE])
        try:
            if message.header["alone"]:
                store = f"unix:@commlib-{os.getpid()}-{secrets.token_hex(8)}"
                self._server = Server(listen(store), job, "commrun", explain_s=EXPLAIN_S, secret=secret)
                self._send({"op": "serving", "store": store})
                return
            listener = network.listen(message.header["ports"])
            addresses = network.addresses(message.header["interfaces"])
        except (OSError, StartError) as error:
            self._refuse(f"has no port where the ranks can meet: {error}")
            return
        self._server = Server(listener, job, "commrun", explain_s=EXPLAIN_S, secret=secret)
        self._send({"op": "serving", "port": listener.getsockname()[1], "addresses": addresses})

    def _reach(self, message: Message) -> None:
        """Finds the address of another host that this one can reach."""
        header = message.header
        address, reason = network.reach(header["addresses"], header["port"], header["identity"] == host_identity())
        self._send({"op": "reached", "address": address, "reason": reason})

    def _start(self, message: Message) -> None:
        header = message.header
        self._ranks = Ranks(self._loop, self._ended)
        for local_rank, rank in enumerate(header["ranks"]):
            environ = environment.of_rank(self._job["environ"], rank, header["size"], local_rank, len(header["ranks"]),
                                          header["index"], header["hosts"], header["store"], header["job"], True)
            cores = share(os.sched_getaffinity(0), local_rank, len(header["ranks"])) if self._job["binds"] else ()
            stdin = file_of(bytes(self._call)) if self._job["calls"] else subprocess.DEVNULL
            try:
                pid = self._ranks.start(rank, self._job["command"], environ, stdin, self._sinks(rank), cores)
            except OSError as error:
                self._refuse(f"cannot start rank {rank}: {error}; start fewer ranks there, or raise ulimit -u and ulimit -n")
                return
            finally:
                if stdin != subprocess.DEVNULL:
                    os.close(stdin)
            self._send({"op": "started", "rank": rank, "pid": pid})

    def _stop(self, message: Message) -> None:
        if self._ranks is None:
            self._finish()
        else:
            self._ranks.stop([tuple(item) for item in message.header["signals"]])

    def _hurry(self, _message: Message) -> None:
        if self._ranks is not None:
            self._ranks.hurry()

    def _tell_store(self, message: Message) -> None:
        """Some rank, perhaps elsewhere, has ended: those that still start shall know why."""
        if self._server is not None:
            self._server.rank_ended(message.header["rank"], message.header["text"])

    def _survey(self, message: Message) -> None:
        self._send({"op": "surveyed", **survey.answer(message.header)})

    def _leave(self, _message: Message) -> None:
        self._leaving = True

    # ---- ranks ----

    def _sinks(self, rank: int) -> List[Tuple[int, Callable, Callable]]:
        names = [(1, "stdout"), (2, "stderr")] + ([(DESCRIPTOR, "result")] if self._job["calls"] else [])

        def forward(name: str) -> Callable[[bytes], None]:
            return lambda data: self._send({"op": "output", "rank": rank, "stream": name}, data)
        return [(descriptor, forward(name), lambda: None) for descriptor, name in names]

    def _tend(self) -> None:
        self._ranks.tend()
        if not self._ranks.running and not self._done:
            self._ranks.finish()
            self._finish()
            return
        full = len(self._outbox) > (_LOW_NBYTES if self._paused else _FULL_NBYTES)
        if full != self._paused:
            self._paused = full
            self._ranks.pause_output(full)

    def _ended(self, rank: int, pid: int, status: int) -> None:
        self._send({"op": "ended", "rank": rank, "pid": pid, "status": status})

    def _finish(self) -> None:
        if not self._done:
            self._done = True
            self._send({"op": "done"})

    def _interrupted(self, _number: int) -> None:
        """sshd hangs up, or somebody ends this process: then so must the ranks."""
        self._lose()

    def _lose(self) -> None:
        """Nobody gives orders any more."""
        self._lost = True
        self._outbox.clear()
        for descriptor in (self._source, self._target):
            self._loop.unwatch(descriptor)
        if self._ranks is not None:
            self._ranks.stop(firmly())

    # ---- words ----

    def _send(self, header: dict, payload: bytes = b"") -> None:
        if not self._lost:
            self._outbox += encode(header, payload)
            self._flush(0)

    def _flush(self, _events: int) -> None:
        try:
            while self._outbox:
                del self._outbox[:os.write(self._target, self._outbox[:_READ_NBYTES])]
        except BlockingIOError:
            self._loop.watch(self._target, self._flush, WRITE)
            return
        except OSError:
            self._lose()
            return
        self._loop.unwatch(self._target)

    def _flush_within(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self._loop.unwatch(self._source)
        while self._outbox and not self._lost and time.monotonic() < deadline:
            self._loop.turn(deadline)


def facts() -> dict:
    """What commrun must know of this host before anything else."""
    return {"version": VERSION, "python": platform.python_version(), "executable": sys.executable, "name": socket.gethostname(),
            "identity": host_identity(), "pid": os.getpid()}


_ORDERS: Dict[str, Callable] = {
    "alive": Host._alive, "call": Host._take_call, "job": Host._prepare, "serve": Host._serve, "reach": Host._reach,
    "start": Host._start, "stop": Host._stop, "hurry": Host._hurry, "ended": Host._tell_store, "survey": Host._survey,
    "leave": Host._leave,
}  # fmt: skip


def main() -> int:
    source, target = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what anybody here prints must not come between the frames
    return Host(source, target).run()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.exit(main())
