"""commrun on hosts that are network namespaces: addresses, names and links of their own, out of reach of commrun itself."""

import os
import re
import shutil
import subprocess
import sys
import uuid

import pytest
from support_launch import environ_with, mark_of, run, start

LEFT, RIGHT, APART = "left", "right", "apart"  # the last has no link to anywhere

# Enters the namespace, with a host name of its own there.
AGENT = """#!/bin/sh
host=$1; shift
exec ip netns exec {prefix}$host unshare --uts sh -c 'hostname "$0"; exec "$@"' "$host" "$@"
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_namespaces():
    if os.getuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        return False
    name = f"cl-try-{uuid.uuid4().hex[:6]}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if tried.returncode == 0:
        entered = subprocess.run(["ip", "netns", "exec", name, "unshare", "--uts", "hostname", name], capture_output=True,
                                 check=False)  # fmt: skip
        ip("netns", "delete", name)
        return entered.returncode == 0
    return False


pytestmark = pytest.mark.skipif(not can_make_namespaces(), reason="needs root, ip, and network namespaces")


@pytest.fixture(name="hosts", scope="module")
def make_hosts(tmp_path_factory):
    """Options of commrun for the three hosts, and the name of LEFT's namespace."""
    prefix = f"cl-{uuid.uuid4().hex[:6]}-"
    try:
        for host in (LEFT, RIGHT, APART):
            ip("netns", "add", prefix + host)
            ip("-n", prefix + host, "link", "set", "lo", "up")
        ip("-n", prefix + LEFT, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", prefix + RIGHT)
        for number, host in enumerate((LEFT, RIGHT), 1):
            ip("-n", prefix + host, "addr", "add", f"10.99.0.{number}/24", "dev", "wire")
            # an address that both have, as container bridges do: it must never be taken for the other's
            ip("-n", prefix + host, "addr", "add", "172.17.0.1/32", "dev", "lo")
            ip("-n", prefix + host, "link", "set", "wire", "up")
        agent = tmp_path_factory.mktemp("agent") / "agent"
        agent.write_text(AGENT.format(prefix=prefix))
        agent.chmod(0o755)
        yield ["--launch-agent", str(agent)], prefix + LEFT
    finally:
        for host in (LEFT, RIGHT, APART):
            subprocess.run(["ip", "netns", "delete", prefix + host], capture_output=True, check=False)


@pytest.fixture(name="mark")
def make_mark(request):
    yield from mark_of(request)


JOB = ("import commlib, numpy, socket, sys; c = commlib.init()\n"
       "total = commlib.allreduce(numpy.full(5, 2.0**c.rank), op=commlib.Sum)[0]\n"
       "sys.stdout.write(f'{c.rank} {c.local_rank} {c.cross_rank} {socket.gethostname()} {total:g}\\n')")


@pytest.mark.parametrize("more", [(), ("--network-interfaces", "wire", "--port-range", "21000-21019")])
def test_hosts_meet_over_their_own_network(mark, hosts, more):
    ran = run("-H", f"{LEFT}:2,{RIGHT}:2", *hosts[0], *more, "--verbose", sys.executable, "-c", JOB, env=environ_with(mark),
              deadline_s=40.0)  # fmt: skip
    assert ran.returncode == 0, ran.err
    assert sorted(ran.out.splitlines()) == ["0 0 0 left 15", "1 1 0 left 15", "2 0 1 right 15", "3 1 1 right 15"]
    port = re.findall(r"meet at 10\.99\.0\.1:(\d+)", ran.err)
    assert len(port) == 2 and port[0] == port[1], ran.err
    assert not more or 21000 <= int(port[0]) < 21020


def test_hosts_that_cannot_reach_each_other(mark, hosts):
    ran = run("-H", f"{LEFT},{APART}", *hosts[0], "true", env=environ_with(mark))
    assert ran.returncode == 1
    assert re.search(r"host apart cannot reach host left, where the ranks meet, at port \d+ \(.*10\.99\.0\.1", ran.err), ran.err
    assert "--network-interfaces" in ran.err


def test_check_finds_the_pair_that_is_apart(mark, hosts):
    ran = run("--check", "-H", f"{LEFT},{RIGHT},{APART}", *hosts[0], "--port-range", "21000-21019", env=environ_with(mark),
              deadline_s=60.0)  # fmt: skip
    assert ran.returncode == 1
    apart = re.findall(r"host (\w+) cannot reach host (\w+) at port 210[01]\d", ran.err)
    assert sorted(apart) == [(APART, LEFT), (APART, RIGHT), (LEFT, APART), (RIGHT, APART)], ran.err
    assert re.search(r"left +right +10\.99\.0\.2", ran.out) and re.search(r"right +left +10\.99\.0\.1", ran.out)


LOOP = ("import commlib, numpy, sys; c = commlib.init()\n"
        "for step in range(1000000):\n"
        "    commlib.allreduce(numpy.ones(1000), name='w')\n"
        "    if step == 3: sys.stdout.write('up\\n'); sys.stdout.flush()\n")


def test_a_link_that_goes_down_ends_the_job(mark, hosts):
    """Silently: only time-outs see it. commrun itself is reached by another way and hears both hosts."""
    options, left = hosts
    environ = environ_with(mark, COMMLIB_HEARTBEAT_MS="300", COMMLIB_LOST_MS="1500")
    process = start("-H", f"{LEFT},{RIGHT}", *options, sys.executable, "-c", LOOP, env=environ)
    try:
        for _ in range(2):
            assert process.stdout.readline() == "up\n", process.stderr.read()
        ip("-n", left, "link", "set", "wire", "down")
        _, err = process.communicate(timeout=40.0)
    finally:
        process.kill()
        ip("-n", left, "link", "set", "wire", "up")
    assert process.returncode == 1, err
    assert "PeerLostError" in err and re.search(r"commrun: rank [01] \(pid \d+ on (left|right)\) exited with code 1", err), err
