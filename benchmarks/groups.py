"""All ranks of a peer, started once and waiting for orders, so that repeats of peers can be interleaved."""

import contextlib
import json
import os
import socket
import subprocess
import tempfile

from environments import bin_folder
from peers import HERE, PEERS, is_crowded

START_S = 60.0
ORDER_S = 60.0  # far beyond what any order takes, unless ranks that poll starve each other
END_S = 20.0


class Absent(Exception):
    """A peer whose ranks do not come, or leave; the text says why."""


class Group:
    """The ranks of one peer.

    Args:
        name: of PEERS.
        size: how many ranks.
        folder: for its socket, whose path must be short.
    """

    def __init__(self, name, size, folder):
        self.name, self.size, self.folder = name, size, folder
        peer, programs = PEERS[name], bin_folder(name)
        address = os.path.join(folder, name)
        meeting = address + ".at"
        program = [programs / "python", HERE / "rank.py", name, address] if peer.make else [programs / name, address, meeting]
        environment = {**os.environ, **peer.running, **(peer.crowded if is_crowded(size) else {}), "OMP_NUM_THREADS": "1",
                       "BENCHMARK_FILE": meeting, "PATH": f"{programs}:{os.environ['PATH']}"}  # fmt: skip
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(size)
            listener.settimeout(START_S)
            self.processes = self.start([str(word) for word in program], environment)
            try:
                self.streams = self._accept(listener, size)
            except BaseException:
                self._stop()
                raise

    def start(self, program, environment):
        """Has the peer's launcher start the program as `size` ranks. Returns the processes to be waited for."""
        launcher, *words = PEERS[self.name].launch(self.size)
        command = [bin_folder(self.name) / launcher, *words, *program]
        return [subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)]

    def _stop(self):
        for process in self.processes:
            process.kill()

    def _accept(self, listener, size):
        ranks = {}
        for _ in range(size):
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise Absent(f"only {len(ranks)} of {size} ranks came within {START_S:g} s") from None
            connection.settimeout(ORDER_S)
            stream = connection.makefile("rw")
            ranks[self._read(stream)["rank"]] = stream
        return [ranks[rank] for rank in sorted(ranks)]

    def order(self, do, **details):
        """Has all ranks do it; returns rank 0's seconds of each repeat, none if the peer cannot do this.

        Raises:
            Absent: a rank was lost, or took too long.
        """
        line = json.dumps({"do": do, **details}) + "\n"
        try:
            for stream in self.streams:
                stream.write(line)
                stream.flush()
            return [self._read(stream) for stream in self.streams][0]
        except (OSError, Absent) as error:
            for process in self.processes:
                process.terminate()  # ranks that hang may poll, and would disturb the others
            what = ", ".join(f"{name} {value}" for name, value in details.items())
            raise Absent(f"{do} ({what}): {error}") from None

    def _read(self, stream):
        line = stream.readline()
        if not line:
            raise Absent("a rank has ended")
        return json.loads(line)

    def close(self):
        """The ranks end when their sockets do."""
        for stream in self.streams:
            with contextlib.suppress(OSError):
                stream.close()
        try:
            for process in self.processes:
                process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._stop()


@contextlib.contextmanager
def groups(names, size, absent):
    """Groups of all peers that start; the reasons of others are added to `absent`, a dict."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        started = []
        for name in names:
            try:
                started.append(Group(name, size, folder))
            except Absent as error:
                absent[name] = f"{size} ranks: {error}"
            else:
                stack.callback(started[-1].close)
        yield started
