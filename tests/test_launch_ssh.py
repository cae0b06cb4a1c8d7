"""commrun over the real ssh: an sshd of our own on loopback addresses, with a key that lives as long as these tests."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from support_launch import IMPATIENT, environ_with, mark_of, marked, run, start, wait_for

SSHD = shutil.which("sshd", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")))
pytestmark = pytest.mark.skipif(SSHD is None or shutil.which("ssh") is None,
                                reason="needs ssh and sshd (apt-get install openssh-server)")  # fmt: skip

KNOWN, STRANGE = ("127.0.0.2", "127.0.0.3"), "127.0.0.4"  # the key of the last is not known
JOIN = ["-c", "import commlib, numpy, sys; commlib.init(); c = commlib.communicator()\n"
              "total = commlib.allreduce(numpy.full(5, 2.0**c.rank), op=commlib.Sum)[0]\n"
              "sys.stdout.write(f'{c.rank} {c.size} {c.local_rank} {c.local_size} {c.cross_rank} {c.cross_size} {total:g}\\n')"]


class Sshd:
    """A running sshd, its user's key, and a folder whose `ssh` reads a configuration of ours and none of the user's."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        for name in ("key", "hostkey", "wrongkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        shutil.copy(folder / "key.pub", folder / "authorized")
        listen = "".join(f"ListenAddress {address}\n" for address in (*KNOWN, STRANGE))
        (folder / "sshd_config").write_text(
            f"Port {self.port}\n{listen}HostKey {folder}/hostkey\nAuthorizedKeysFile {folder}/authorized\nPidFile none\n"
            "UsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n")
        host_key = (folder / "hostkey.pub").read_text()
        (folder / "known_hosts").write_text("".join(f"[{host}]:{self.port} {host_key}" for host in KNOWN))
        (folder / "ssh_config").write_text(f"UserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile /dev/null\n"
                                           "IdentitiesOnly yes\n")  # fmt: skip
        (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        (folder / "ssh").chmod(0o755)
        if os.getuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # where root's sshd locks itself up
        self.log = open(folder / "log", "w+b")
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=self.log,
                                        start_new_session=True)  # fmt: skip
        wait_for(lambda: self.answers() or self.process.poll() is not None, "sshd does not listen")

    def answers(self):
        with socket.socket() as sock:
            return sock.connect_ex((KNOWN[0], self.port)) == 0

    @property
    def options(self):
        return ["-p", self.port, "-i", self.folder / "key"]

    def environ(self, mark):
        return environ_with(mark, PATH=os.pathsep.join((str(self.folder), os.environ["PATH"])))

    def sessions(self):
        """Pids of the processes that serve one connection each."""
        lines = subprocess.run(["ps", "-eo", "pid=,ppid="], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        return [int(pid) for pid, parent in map(str.split, lines) if int(parent) == self.process.pid]

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.log.close()


def free_port():
    with socket.socket() as sock:
        sock.bind((KNOWN[0], 0))
        return sock.getsockname()[1]


@pytest.fixture(name="sshd", scope="module")
def make_sshd(tmp_path_factory):
    sshd = Sshd(tmp_path_factory.mktemp("sshd"))
    if sshd.process.poll() is not None:
        sshd.log.seek(0)
        pytest.skip(f"sshd does not start here: {sshd.log.read().decode(errors='replace')[-300:]}")
    yield sshd
    sshd.close()


@pytest.fixture(name="mark")
def make_mark(request):
    yield from mark_of(request)


def test_a_job_over_ssh(mark, sshd):
    ran = run("-H", "127.0.0.2:1,127.0.0.3:2", *sshd.options, "-x", "MARK", "--prefix-output", sys.executable, *JOIN,
              env=sshd.environ(mark), deadline_s=40.0)  # fmt: skip
    assert ran.returncode == 0, ran.err
    expected = ["0 3 0 1 0 2 7", "1 3 0 2 1 2 7", "2 3 1 2 1 2 7"]
    assert sorted(ran.out.splitlines()) == [f"[{rank}]<stdout>:{line}" for rank, line in enumerate(expected)]


@pytest.mark.parametrize("host, port, key, words", [
    ("127.0.0.3", None, "wrongkey", ("Permission denied", "without a password", "ssh-copy-id")),
    (STRANGE, None, "key", ("Host key verification failed", "log in once by hand")),
    ("127.0.0.3", 1, "key", ("refused", "start sshd", "-p")),
    ("no-such-host.invalid", None, "key", ("Could not resolve", "no host of this name")),
])
def test_what_ssh_says_is_explained(mark, sshd, host, port, key, words):
    ran = run("-H", host, "-p", port or sshd.port, "-i", sshd.folder / key, "true", env=sshd.environ(mark),
              stdin=subprocess.DEVNULL)  # fmt: skip
    assert ran.returncode == 1
    for word in (f"host {host}", *words):
        assert word in ran.err, ran.err


FAMILY = "sleep 1000 & setsid sleep 1000 & echo up; wait"


def start_family(mark, sshd):
    process = start("-H", "127.0.0.2,127.0.0.3", *sshd.options, "-x", "MARK", "sh", "-c", FAMILY, env=sshd.environ(mark),
                    commrun=IMPATIENT)  # fmt: skip
    for _ in range(2):
        assert process.stdout.readline() == "up\n", process.stderr.read()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_commrun(mark, sshd, number):
    process = start_family(mark, sshd)
    process.send_signal(number)
    process.communicate(timeout=20.0)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    wait_for(lambda: not marked(mark), "ranks outlive commrun")


def test_a_broken_ssh_connection_ends_both_sides(mark, sshd):
    process = start_family(mark, sshd)
    os.kill(sshd.sessions()[0], signal.SIGKILL)
    _, err = process.communicate(timeout=20.0)
    assert process.returncode == 1
    assert re.search(r"commrun: host 127.0.0.[23]: the connection was lost while the job ran \(ssh ended with code 255\)", err), err
    wait_for(lambda: not marked(mark), "ranks outlive the connection")


def test_check_over_ssh(mark, sshd):
    ran = run("--check", "-H", "127.0.0.2,127.0.0.3", *sshd.options, env=sshd.environ(mark), deadline_s=40.0)
    assert ran.returncode == 0 and "fit for a job" in ran.out, ran.err
