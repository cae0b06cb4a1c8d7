"""Hosts for tests of the network: network namespaces on a bridge, each with its own name, and ranks that live there.

Needs root and the tools of iproute2; `why_not` says what is missing. A host's link can be cut, made silent, slowed down.
"""

import contextlib
import fcntl
import os
import select
import shutil
import struct
import subprocess
import threading
import time
import uuid
from collections import deque

from support import Ranks

PORT = 29400
_DROP_ALL = "tbf rate 1kbit burst 10 limit 10"  # no packet is as small as its bucket


def run(command, check=True):
    """Runs one command line, without a shell."""
    return subprocess.run(command.split(), check=check, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20)


def why_not():
    """Why there can be no such hosts here; None if there can."""
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if os.getuid() != 0 or missing:
        return f"needs root, and {', '.join(missing) or 'nothing else'}"
    name = f"cln-{uuid.uuid4().hex[:8]}"
    made = run(f"ip netns add {name}", check=False)
    run(f"ip netns del {name}", check=False)
    return f"no network namespaces here: {made.stdout.strip()}" if made.returncode else None


class Hosts:
    """A few hosts on one switch; a context manager.

    Args:
        count: how many; host number i has the address `addresses[i]` on eth0 and the name "host<i>".
        version: 4, 6 (global addresses only of IPv6), or "link-local" (no addresses but those that Linux gives every link).
    """

    def __init__(self, count, version=4):
        self._tag = f"cln{uuid.uuid4().hex[:6]}"
        self._switch = f"{self._tag}sw"
        self.names = [f"{self._tag}h{index}" for index in range(count)]
        self.version = version
        self.addresses = []

    def __enter__(self):
        try:
            run(f"ip netns add {self._switch}")
            run(f"ip -n {self._switch} link add br0 up type bridge forward_delay 0")
            for index, name in enumerate(self.names):
                self.addresses.append(self._add(index, name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _add(self, index, name):
        run(f"ip netns add {name}")
        run(f"ip -n {name} link set lo up")
        run(f"ip netns exec {name} sysctl -qw net.ipv6.conf.default.accept_dad=0")  # else addresses wait for a second
        run(f"ip -n {self._switch} link add p{index} type veth peer name eth0 netns {name}")
        run(f"ip -n {self._switch} link set p{index} master br0 up")
        run(f"ip -n {name} link set eth0 up")
        if self.version == 4:
            run(f"ip -n {name} addr add 10.77.0.{index + 1}/24 dev eth0")
            return f"10.77.0.{index + 1}"
        if self.version == 6:
            run(f"ip -n {name} addr add fd77::{index + 1}/64 dev eth0 nodad")
            return f"fd77::{index + 1}"
        return self._link_local(name)

    def _link_local(self, name):
        end_s = time.monotonic() + 10.0
        while time.monotonic() < end_s:
            words = run(f"ip -n {name} -6 -o addr show dev eth0 scope link").stdout.split()
            if "inet6" in words and "tentative" not in words:
                return words[words.index("inet6") + 1].partition("/")[0] + "%eth0"
        raise AssertionError("no link-local address came")

    def __exit__(self, *_):
        for name in [*self.names, self._switch]:
            run(f"ip netns del {name}", check=False)

    # ---- ranks ----

    def start(self, per_host=1, store=None, **options):
        """A support.Ranks with `per_host` ranks on every host, that meet on host 0; options as there."""
        address = store or self.addresses[0]
        where = f"[{address}]:{PORT}" if ":" in address else f"{address}:{PORT}"
        prefixes = [["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname host{index}; exec "$@"', "sh"]
                    for index, name in enumerate(self.names) for _ in range(per_host)]  # fmt: skip
        return Ranks(len(prefixes), store=where, local_size=per_host, prefixes=prefixes,
                     **{"secret": uuid.uuid4().hex, "start_timeout_s": 20, **options})  # fmt: skip

    # ---- faults ----

    def cut(self, index):
        """The link goes down, and nobody is told."""
        run(f"ip -n {self._switch} link set p{index} down")

    def mend(self, index):
        """The link comes up again."""
        run(f"ip -n {self._switch} link set p{index} up")

    def silence(self, index):
        """The link stays up, and nothing comes through any more, either way."""
        run(f"ip -n {self._switch} link set p{index} nomaster")

    def mute(self, index):
        """Nothing leaves a host any more; what the others send comes through."""
        run(f"tc -n {self.names[index]} qdisc replace dev eth0 root {_DROP_ALL}")

    def deafen(self, index):
        """Nothing reaches a host any more; what it sends comes through."""
        run(f"tc -n {self._switch} qdisc replace dev p{index} root {_DROP_ALL}")

    def limit(self, index, mbit):
        """A host sends at this rate from now on."""
        run(f"tc -n {self.names[index]} qdisc replace dev eth0 root tbf rate {mbit}mbit burst 70kb latency 50ms")

    def reset(self, index):
        """Destroys the TCP connections of a host, with a RST to the others. Returns False where the kernel cannot."""
        before = run(f"ip netns exec {self.names[index]} ss -Htn state established").stdout
        run(f"ip netns exec {self.names[index]} ss -K state established", check=False)
        after = run(f"ip netns exec {self.names[index]} ss -Htn state established").stdout
        return bool(before.strip()) and not after.strip()


class FarApart:
    """A second way between two hosts, on which every packet takes its time; a context manager.

    A device `far0` on each, 10.66.0.1 and 10.66.0.2; between them a thread holds each packet for `delay_s`.
    """

    _SET_INTERFACE, _TUN_NO_HEADER, _MTU = 0x400454CA, 0x1001, 9000  # TUNSETIFF, IFF_TUN | IFF_NO_PI

    def __init__(self, hosts, delay_s):
        self._hosts, self._delay_s, self._ends = hosts, delay_s, []
        self._over, self._thread = threading.Event(), threading.Thread(target=self._carry, daemon=True)

    def __enter__(self):
        for index, name in enumerate(self._hosts.names):
            self._ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            device = f"{name[3:]}f"
            fcntl.ioctl(self._ends[-1], self._SET_INTERFACE, struct.pack("16sH22x", device.encode(), self._TUN_NO_HEADER))
            run(f"ip link set {device} netns {name} name far0")
            run(f"ip -n {name} addr add 10.66.0.{index + 1}/24 dev far0")
            run(f"ip -n {name} link set far0 mtu {self._MTU} txqueuelen 1000 up")
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(10.0)
        for end in self._ends:
            os.close(end)

    def _carry(self):
        held = deque()  # (when it arrives, where, the packet), in that order
        while not self._over.is_set():
            left_s = max(held[0][0] - time.monotonic(), 0.0) if held else 0.05
            readable, _, _ = select.select(self._ends, [], [], min(left_s, 0.05))
            for end in readable:
                with contextlib.suppress(BlockingIOError):
                    held.append((time.monotonic() + self._delay_s, self._ends[1 - self._ends.index(end)], os.read(end, 65536)))
            while held and held[0][0] <= time.monotonic():
                _, end, packet = held.popleft()
                with contextlib.suppress(BlockingIOError):  # as a full queue of a switch
                    os.write(end, packet)


@contextlib.contextmanager
def ranks_on(count, version=4, per_host=1, **options):
    """(Hosts, Ranks) for one test."""
    with Hosts(count, version) as hosts, hosts.start(per_host, **options) as ranks:
        yield hosts, ranks
