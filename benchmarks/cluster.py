"""A cluster on one machine: every host is a network namespace, all of them on one switch, each link of a limited rate.

    with Cluster(8, rate_mbit=1000) as cluster:
        process = cluster.start(3, [sys.executable, "program.py"], environment)

A host has a name of its own (`h3`), an address of its own (`cluster.address(3)`), its own /dev/shm and one full-duplex link:
what leaves it and what comes to it are limited each to the rate, by a token bucket on either end. Needs root, iproute2, and
a kernel with veth, bridges and tbf. This file knows hosts and links; what runs on them is others' business.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess

# 70 kB at once keep 64 kB packets (GSO) cheap; a message up to that size after idle passes unshaped.
BURST_NBYTES = 70_000
# Of a rate on the wire, what is left for payload: headers of TCP, IP and Ethernet at an MTU of 1500.
PAYLOAD_SHARE = 0.956
_QUEUE = "200ms"  # of a full bucket, before it drops: more than TCP keeps on the way here
_END_S = 10.0


class Cluster:
    """Hosts and their links, made on entry and removed on exit, with all that still runs on them.

    Args:
        hosts: how many, at most 250.
        rate_mbit: of each link and direction, in 10^6 bit/s.
        name: prefix of the namespaces; another cluster of this name that was left over is removed.
        congestion: TCP's congestion control on the hosts, such as "cubic"; None: this machine's default.
    """

    def __init__(self, hosts, rate_mbit, name="commlib", congestion=None):
        self.hosts, self.rate_mbit, self.name, self.congestion = hosts, rate_mbit, name, congestion
        self._processes = []

    def __enter__(self):
        if os.geteuid() != 0 or not shutil.which("ip"):
            raise SystemExit("network namespaces are needed: run it as root, with iproute2 installed")
        self._remove()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_):
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(_END_S)
        self._remove()

    def address(self, host):
        """The IPv4 address of a host."""
        return f"10.79.0.{host + 1}"

    @property
    def payload_bytes_per_s(self):
        """What a link carries of payload in one direction, at most."""
        return PAYLOAD_SHARE * self.rate_mbit * 1e6 / 8

    def command(self, host, command):
        """The command as it is run on a host: in its network and with its name."""
        setup = f'hostname h{host} && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", self._namespace(host), "unshare", "--uts", "--mount", "sh", "-c", setup, "sh", *command]

    def agent(self, path):
        """Writes a program that stands in for ssh: `PROGRAM [options] ADDRESS COMMAND...` runs the command on that host."""
        hosts = "".join(f"{self.address(host)}) host={host};; " for host in range(self.hosts))
        path.write_text(f"""#!/bin/sh
while :; do case "$1" in -*) shift;; *) break;; esac; done
case "$1" in {hosts}*) echo "no host $1" >&2; exit 1;; esac
shift
exec ip netns exec {self.name}-$host unshare --uts --mount sh -c "hostname h$host; mount -t tmpfs tmpfs /dev/shm; $*"
""")
        path.chmod(0o755)
        return str(path)

    def start(self, host, command, environment, **options):
        """Runs a command on a host, as a subprocess.Popen; it is killed on exit if it still runs then."""
        process = subprocess.Popen(self.command(host, command), env=environment, stdin=subprocess.DEVNULL,
                                   start_new_session=True, **options)  # fmt: skip
        self._processes.append(process)
        return process

    def sent_nbytes(self, host):
        """Bytes that have left a host over its link, headers included."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(_run(["ip", "netns", "exec", self._namespace(host), "cat", path]))

    def cpu_s(self):
        """Processor seconds of all that runs on the hosts, so far."""
        pids = [pid for host in range(self.hosts) for pid in _run(["ip", "netns", "pids", self._namespace(host)]).split()]
        return sum(map(_cpu_s, pids))

    def _namespace(self, host):
        return f"{self.name}-{host}"

    @property
    def _switch(self):
        return f"{self.name}-switch"

    def _make(self):
        _run(["ip", "netns", "add", self._switch])
        _batch(["ip", "-n", self._switch], ["link add br0 type bridge", "link set br0 up", "link set lo up"])
        for host in range(self.hosts):
            self._add_host(host)

    def _add_host(self, host):
        namespace, limit = self._namespace(host), f"tbf rate {self.rate_mbit}mbit burst {BURST_NBYTES} latency {_QUEUE}"
        _run(["ip", "netns", "add", namespace])
        if self.congestion:
            _run(["ip", "netns", "exec", namespace, "sysctl", "-q", "-w", f"net.ipv4.tcp_congestion_control={self.congestion}"])
        _batch(["ip", "-n", self._switch], [f"link add port{host} type veth peer name eth0 netns {namespace}",
                                            f"link set port{host} master br0 up"])  # fmt: skip
        # The neighbours are written down, so that nothing is lost or waits for ARP.
        neighbours = [f"neigh add {self.address(other)} lladdr {_mac(other)} dev eth0" for other in range(self.hosts)
                      if other != host]  # fmt: skip
        _batch(["ip", "-n", namespace], [f"link set eth0 address {_mac(host)}", f"addr add {self.address(host)}/24 dev eth0",
                                         "link set eth0 up", "link set lo up", *neighbours])  # fmt: skip
        _batch(["tc", "-n", namespace], [f"qdisc add dev eth0 root {limit}"])
        _batch(["tc", "-n", self._switch], [f"qdisc add dev port{host} root {limit}"])

    def _remove(self):
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
        ours = [line.split()[0] for line in listed.splitlines() if line.split()[:1]]
        for namespace in ours:
            prefix, _, rest = namespace.rpartition("-")
            if prefix == self.name and (rest.isdigit() or rest == "switch"):
                subprocess.run(["ip", "netns", "del", namespace], stderr=subprocess.DEVNULL, check=False)


def _cpu_s(pid):
    """User and system time of a process; 0 if it has ended."""
    try:
        fields = pathlib.Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _mac(host):
    return f"02:00:00:00:{host >> 8:02x}:{host & 255:02x}"


def _run(command, text=None):
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` failed: {done.stderr.strip()} (namespaces, veth and tbf are needed)")
    return done.stdout


def _batch(command, lines):
    _run([*command, "-batch", "-"], "\n".join(lines) + "\n")
