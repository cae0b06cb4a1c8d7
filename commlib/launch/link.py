"""commrun's end of one host: the process that leads there (ssh, a launch agent, or none), frames both ways, and what it
means when that process fails. Knows no jobs.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from typing import Callable, List, Mapping, Optional

from commlib.launch import processes
from commlib.launch.environment import absolute
from commlib.launch.hosts import is_here
from commlib.launch.words import FOR_HOST_ONLY, MARK
from commlib.launch.loop import WRITE, Loop
from commlib.launch.output import say
from commlib.rendezvous_wire import Decoder, Message, WireError, encode

_READ_NBYTES = 1 << 16
_KEPT_NBYTES = 2000     # of what the other side printed before it spoke to us: enough for an error message
CLOSE_S = 2.0           # for a process that has closed its output to end
_CONNECT_S = 30         # for ssh to reach a host; the start time-out may be shorter

# What a failed start looks like in ssh's and the remote shell's words, and what to do about it.
_MEANINGS = (
    (r"Permission denied",
     "ssh may not log in without a password, and commrun cannot type one: try `{ssh} {host} true`, and install a key with "
     "ssh-copy-id, or name one with -i"),
    (r"Host key verification failed|REMOTE HOST IDENTIFICATION",
     "ssh does not know this host's key, or it has changed: log in once by hand with `{ssh} {host}` and confirm it"),
    (r"Could not resolve hostname|Name or service not known|Unknown host|No such namespace|Cannot open network namespace",
     "there is no host of this name: correct it in -H or --hostfile"),
    (r"Connection refused", "nobody listens there for ssh: start sshd, or give its port with -p"),
    (r"timed out|No route to host|Network is unreachable",
     "it cannot be reached: is it up, and is its port for ssh open to this host?"),
    (r"No module named '?commlib(?!\.launch\.host)",
     "it has no commlib in {python}: install the same version there, or name another interpreter with --python"),
    (r"No module named '?commlib\.launch\.host", "its commlib is too old: install the same version there"),
    (r"not found|No such file or directory",
     "it has no {python}, or not what it needs: install the same environment there, or name its interpreter with --python"),
)  # fmt: skip


class Link:
    """The connection with one host.

    Args:
        loop: whose turns this object is part of.
        host: its name.
        options: commrun's.
        heard: called with (this link, message) of each message.
        lost: called with (this link, text) once, when the connection has ended; not after `close`.
    """

    def __init__(self, loop: Loop, host: str, options: argparse.Namespace, environ: Mapping[str, str],
                 heard: Callable[["Link", Message], None], lost: Callable[["Link", str], None]):
        self.host, self._loop, self._options, self._heard, self._lost = host, loop, options, heard, lost
        self.heard_at = time.monotonic()
        self.is_open = True
        self._decoder: Optional[Decoder] = None  # until MARK has come
        self._before, self._errors = b"", b""
        self._outbox, self._lock = bytearray(), threading.Lock()
        # Not killed by the kernel when we die: the end of its input tells it, and the host can then end its ranks in order.
        self._process = subprocess.Popen(self._command(environ), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, start_new_session=True)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            os.set_blocking(pipe.fileno(), False)
        loop.watch(self._process.stdout, self._read)
        loop.watch(self._process.stderr, self._read_errors)

    def _command(self, environ: Mapping[str, str]) -> List[str]:
        """How to start host.py there. Nothing secret: everybody on either host can see it."""
        words = ["env"]
        if environ.get("PYTHONPATH"):
            words.append(f"PYTHONPATH={absolute(environ['PYTHONPATH'])}")
        words += [*(f"{name}=1" for name in FOR_HOST_ONLY), self._python, "-m", "commlib.launch.host"]
        if self._options.launch_agent is not None:
            return [*shlex.split(self._options.launch_agent), self.host, *words]
        if self.is_direct:
            return words
        return [*_ssh(self._options), self.host, " ".join(map(shlex.quote, words))]

    @property
    def is_direct(self) -> bool:
        """Whether no other program stands between us and the host."""
        return self._options.launch_agent is None and is_here(self.host)

    @property
    def _python(self) -> str:
        return self._options.python or sys.executable

    # ---- out ----

    def send(self, header: dict, payload: bytes = b"") -> None:
        """Sends a message, as soon as the host takes it."""
        if self.is_open:
            with self._lock:
                self._outbox += encode(header, payload)
            self._flush(0)

    def pulse(self) -> None:
        """Says that we live; for a thread of its own, since the main one may be waiting for the user's terminal."""
        with self._lock:
            if self.is_open and not self._outbox:
                self._outbox += encode({"op": "alive"})
                with contextlib.suppress(OSError):
                    self._write()

    def _flush(self, _events: int) -> None:
        with self._lock:
            try:
                self._write()
            except OSError:
                self._outbox.clear()  # reading finds out why
        if self._outbox:
            self._loop.watch(self._process.stdin, self._flush, WRITE)
        else:
            self._loop.unwatch(self._process.stdin)

    def _write(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._outbox:
                del self._outbox[:os.write(self._process.stdin.fileno(), self._outbox[:_READ_NBYTES])]

    # ---- in ----

    def _read(self, _events: int) -> None:
        data = self._take(self._process.stdout)
        if data is None:
            return
        if not data:
            self._fail()
            return
        self.heard_at = time.monotonic()
        try:
            self._decode(data)
        except WireError as error:
            self._fail(f"something there disturbs the connection ({error}): nothing may print into it after it has begun")

    def _decode(self, data: bytes) -> None:
        if self._decoder is None:
            before, mark, data = (self._before + data).partition(MARK)
            if not mark:
                self._before = before[-_KEPT_NBYTES:]
                return
            self._before, self._decoder = before, Decoder()
        self._decoder.feed(data)
        message = self._decoder.next()
        while message is not None and self.is_open:
            self._heard(self, message)
            message = self._decoder.next()

    def _read_errors(self, _events: int) -> None:
        data = self._take(self._process.stderr)
        if data:
            self._errors = (self._errors + data)[-_KEPT_NBYTES:]
            if self._decoder is not None or self._options.verbose:
                for line in data.decode(errors="replace").splitlines():
                    say(f"{self.host}: {line}")
        elif data is not None and self.is_open:
            self._loop.unwatch(self._process.stderr)

    def _take(self, pipe) -> Optional[bytes]:
        if not self.is_open:
            return None
        try:
            return os.read(pipe.fileno(), _READ_NBYTES)
        except BlockingIOError:
            return None

    # ---- the end ----

    def _fail(self, text: str = "") -> None:
        """The connection has ended, and not because we wanted it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        self._read_errors(0)
        code = self._process.poll()
        began = self._decoder is not None
        self.close()
        self._lost(self, text or (self._broken(code) if began else self._never_began(code)))

    def _broken(self, code: Optional[int]) -> str:
        return f"the connection was lost while the job ran ({self._way} {_how(code)}){self.printed()}"

    def _never_began(self, code: Optional[int]) -> str:
        text = f"the start failed ({self._way} {_how(code)}){self.printed()}"
        for pattern, meaning in _MEANINGS:
            if re.search(pattern, self.printed()):
                ssh = shlex.join(_ssh(self._options)) if self._options.launch_agent is None else self._options.launch_agent
                return f"{text}: " + meaning.format(ssh=ssh, host=self.host, python=self._python)
        return text

    @property
    def _way(self) -> str:
        if self._options.launch_agent is not None:
            return self._options.launch_agent
        return self._python if self.is_direct else "ssh"

    def printed(self) -> str:
        """The end of what came in place of our words, for a message; "" if nothing did."""
        text = (self._errors.strip() or self._before.strip()).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()][-3:]
        return ': "' + " / ".join(lines) + '"' if lines else ""

    def close(self) -> None:
        """Hangs up, and sees to it that the process is gone."""
        self.hang_up()
        self.reap(time.monotonic() + CLOSE_S)

    def hang_up(self) -> None:
        """Ends the connection; whoever is still there ends for want of us. Idempotent."""
        if not self.is_open:
            return
        with self._lock:
            self.is_open = False
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            self._loop.unwatch(pipe)
            with contextlib.suppress(OSError):
                pipe.close()

    def reap(self, deadline: float) -> None:
        """Waits for the process to end, and kills it at the deadline."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _ssh(options: argparse.Namespace) -> List[str]:
    """ssh that asks nobody anything, forwards nothing, and does not wait for ever."""
    words = ["ssh", "-T", "-x", "-a", "-oBatchMode=yes", f"-oConnectTimeout={_CONNECT_S}", "-oServerAliveInterval=10"]
    words += ["-p", str(options.ssh_port)] if options.ssh_port is not None else []
    words += ["-i", options.ssh_identity_file] if options.ssh_identity_file is not None else []
    return words


def _how(code: Optional[int]) -> str:
    if code is None:
        return "has closed its output"
    return f"ended with code {code}" if code >= 0 else processes.describe(-code)
