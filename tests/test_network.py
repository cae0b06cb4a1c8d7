"""Ranks on hosts of their own: which addresses they meet by, and what a fault of the network does to them.

Faults are real: a link that goes down, packets that vanish, connections that are reset. Every rank must fail in time with the
lost host's name, or, if the fault is over soon enough, lose nothing.
"""

import contextlib
import os
import resource
import signal
import socket
import time

import numpy as np
import pytest
from support import RankFailed
from support_hosts import FarApart, Hosts, ranks_on, run, why_not

import commlib

NOT_HERE = why_not()
pytestmark = pytest.mark.skipif(NOT_HERE is not None, reason=str(NOT_HERE))

TCP_NOTSENT_LOWAT = 25  # of linux/tcp.h

LOST_S = 5.0  # the configured timeout; the default of 30 s would make these tests long and prove no more
SETTINGS = {"lost_ms": int(1000 * LOST_S), "heartbeat_ms": 500}
SLACK_S = 1.0  # for processes that share cores with other tests


def total():
    """What an all-reduce of rank + 1 gives."""
    communicator = commlib.communicator()
    return set(communicator.allreduce(np.full(100_000, 1.0 + communicator.rank, np.float32), op=commlib.Sum).tolist())


def own_ends():
    """(address, port) of this side of every TCP connection of this process."""
    ends = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.family in (socket.AF_INET, socket.AF_INET6):
                    ends.add(sock.getsockname()[:2])
        except OSError:
            continue
    return sorted(ends)


# ---- addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6, "link-local"])
def test_hosts_meet_by_the_address_that_they_have(version):
    with ranks_on(3, version) as (hosts, ranks):
        assert ranks.call(total) == [{6.0}] * 3
        for address, ends in zip(hosts.addresses, ranks.call(own_ends)):
            assert {end[0] for end in ends} == {address.partition("%")[0]}


def test_networks_and_ports_can_be_chosen():
    with Hosts(2) as hosts:
        for index, name in enumerate(hosts.names):
            run(f"ip -n {name} addr add 10.78.0.{index + 1}/24 dev eth0")
        with hosts.start(network_interfaces="10.78.0.0/16,eth0", port_range="23450-23459") as ranks:
            assert ranks.call(total) == [{3.0}] * 2
            (called, port), = ranks.call(own_ends)[0]  # rank 1 has called rank 0
            assert called == "10.78.0.1" and 23450 <= port <= 23459


def give_bridge(name, address):
    """An interface that leads nowhere, as software for containers makes one."""
    run(f"ip -n {name} link add veil0 type bridge")
    run(f"ip -n {name} addr add {address}/24 dev veil0")
    run(f"ip -n {name} link set veil0 up")


def test_an_address_that_both_hosts_have_is_passed_by():
    """Whoever calls it meets himself, or nobody."""
    with Hosts(2) as hosts:
        for name in hosts.names:
            give_bridge(name, "10.200.0.1")
        with hosts.start(network_interfaces="10.200.0.1,eth0", port_range="23450-23451") as ranks:
            assert ranks.call(total) == [{3.0}] * 2
            assert [{end[0] for end in ends} for ends in ranks.call(own_ends)] == [{address} for address in hosts.addresses]


def test_an_unreachable_host_is_an_error_that_names_what_was_tried():
    with Hosts(2) as hosts:
        for index, name in enumerate(hosts.names):
            give_bridge(name, f"10.20{index}.0.1")
        with hosts.start(network_interfaces="veil0", initialize=False, start_timeout_s=3) as ranks:
            texts = [str(outcome.error) for outcome in ranks.outcomes("support_rank:initialize")]
    assert "rank 1 cannot connect to rank 0 (10.200.0.1 port" in texts[1] and "COMMLIB_NETWORK_INTERFACES" in texts[1], texts
    assert "rank 1" in texts[0] and "10.200.0.1" in texts[0], texts


def test_without_a_secret_nobody_meets_over_a_network():
    with Hosts(2) as hosts, hosts.start(initialize=False, secret="") as ranks:
        for outcome in ranks.outcomes("support_rank:initialize"):
            assert isinstance(outcome.error, commlib.StartError) and "COMMLIB_SECRET_FILE" in str(outcome.error)


def give_choices():
    """Each rank makes its own choice, one in words and one in Python's."""
    mine = {"network_interfaces": ["10.78.0.0/16", "eth0"], "port_range": (23470, 23479)}
    if os.environ["COMMLIB_RANK"] == "1":
        mine = {"network_interfaces": "eth0", "port_range": "23480-23489"}
    commlib.init(timeout_s=30.0, **mine)


def test_init_takes_networks_and_ports():
    with Hosts(2) as hosts:
        for index, name in enumerate(hosts.names):
            run(f"ip -n {name} addr add 10.78.0.{index + 1}/24 dev eth0")
        with hosts.start(initialize=False, network_interfaces="lo", port_range="1-1") as ranks:
            ranks.call(give_choices)
            assert ranks.call(total) == [{3.0}] * 2
            (called, port), = ranks.call(own_ends)[0]
            assert called == "10.78.0.1" and 23470 <= port <= 23479


def init_with_few_descriptors(rank, left):
    """(error, seconds) of an init() where one rank has so many descriptors left; None instead of an error: it went well."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    began_s, error = time.monotonic(), None
    if os.environ["COMMLIB_RANK"] == str(rank):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + left, hard))
    try:
        communicator = commlib.init(timeout_s=4.0)
        assert [communicator.transports[peer] for peer in sorted(communicator.transports)].count("shm") == 1
        assert communicator.allreduce(np.ones(5), op=commlib.Sum)[0] == communicator.size
    except commlib.StartError as caught:
        error = str(caught)
    commlib.shutdown()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return error, time.monotonic() - began_s


def test_a_process_that_runs_out_of_descriptors_says_so_to_all():
    """Wherever in init() it does: nobody hangs, no slower way is taken without a word, and the next init() is sound."""
    with Hosts(2) as hosts, hosts.start(per_host=2, initialize=False) as ranks:
        assert ranks.call(init_with_few_descriptors, -1, 0)[0][0] is None
        for left in range(1, 30):
            outcomes = ranks.call(init_with_few_descriptors, 2, left)
            if outcomes[2][0] is None:
                break
            assert "ulimit" in outcomes[2][0], outcomes
            assert all(error is not None for error, _ in outcomes), outcomes
        assert 3 < left < 29 and all(error is None for error, _ in outcomes), outcomes


# ---- what is posted ahead ----------------------------------------------------------------------------------------


def held_unsent():
    """What the kernel may hold unsent of this process's connection to the other rank, in bytes."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            if sock.family == socket.AF_INET:
                return sock.getsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT)
    raise AssertionError("no connection")


def reduce_for(rounds):
    """All-reduces of 4 MB; returns what the kernel may hold then."""
    for _ in range(rounds):
        commlib.communicator().allreduce(np.ones(1_000_000, np.float32), op=commlib.Sum)
    return held_unsent()


def has_tun():
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_tun(), reason="needs /dev/net/tun")
def test_what_is_posted_ahead_follows_bandwidth_and_delay():
    """Little on a short way; a window's bytes on a long one; and what the settings say where they say it."""
    with Hosts(2) as hosts, FarApart(hosts, delay_s=0.02):
        options = {"network_interfaces": "far0", "heartbeat_ms": 100, "lost_ms": 20_000}
        with hosts.start(inflight_most_nbytes=0, **options) as ranks:
            assert ranks.call(reduce_for, 3) == [64 << 10] * 2
        with hosts.start(inflight_most_nbytes=100_000, **options) as ranks:
            end_s = time.monotonic() + 30.0
            while ranks.call(reduce_for, 1) != [100_000] * 2:  # as soon as a tick has seen what the link carries
                assert time.monotonic() < end_s, ranks.call(held_unsent)


# ---- bytes on the wire -------------------------------------------------------------------------------------------


def bytes_sent_per_byte(count, rounds=4):
    """What leaves this host in an all-reduce, headers included, for each byte of it: by the interface's counter."""
    communicator, array = commlib.communicator(), np.ones(count, np.float32)
    sent = []
    for repeats in (0, rounds):
        communicator.barrier()
        for _ in range(repeats):
            communicator.allreduce_(array, op=commlib.Max)
        communicator.barrier()
        with open("/sys/class/net/eth0/statistics/tx_bytes", encoding="ascii") as file:
            sent.append(int(file.read()))
    return (sent[1] - sent[0]) / (rounds * array.nbytes)


@pytest.mark.parametrize("algorithm, per_byte", [("hierarchical", 1.0), ("ring", 1.5), ("recursive_doubling", 2.0)])
def test_what_two_hosts_of_two_ranks_send(algorithm, per_byte):
    """Hierarchical sends half the bytes of recursive doubling over the ranks, and two thirds of a ring's."""
    with ranks_on(2, per_host=2, algorithms=f"allreduce={algorithm}") as (_, ranks):
        for sent in ranks.call(bytes_sent_per_byte, 1_000_000):
            assert 0.99 * per_byte < sent < 1.12 * per_byte, sent  # headers and acknowledgements beside the payload


# ---- faults that end the job -------------------------------------------------------------------------------------


def reduce_until_lost():
    """All-reduces until a rank is lost; returns (rank, text, when)."""
    communicator, array = commlib.communicator(), np.ones(200_000, np.float32)
    try:
        while True:
            communicator.allreduce(array, op=commlib.Sum)
    except commlib.PeerLostError as error:
        return error.rank, str(error), time.monotonic()


def wait_until_lost():
    """The same for ranks that say nothing: heartbeats alone must notice."""
    while commlib.communicator().health is None:
        time.sleep(0.02)
    error = commlib.communicator().health
    return error.rank, str(error), time.monotonic()


def cut(hosts, ranks):
    hosts.cut(2)


def silence(hosts, ranks):
    hosts.silence(2)


def mute(hosts, ranks):
    hosts.mute(2)


def deafen(hosts, ranks):
    hosts.deafen(2)


def kill(hosts, ranks):
    ranks.processes[2].kill()


def reset(hosts, ranks):
    """All connections of the host at once: while they are reset, one by one, it cannot tell over the others that it lost a rank."""
    process = ranks.processes[2]
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    are_reset = hosts.reset(2)
    process.send_signal(signal.SIGCONT)
    if not are_reset:
        pytest.skip("this kernel destroys no sockets (ss -K)")


def leave_half_open(hosts, ranks):
    """The host dies and comes back without a memory of its connections."""
    hosts.cut(2)
    ranks.processes[2].kill()
    ranks.processes[2].wait(10)
    hosts.mend(2)


FAULTS = [  # what happens to host 2, what the ranks do meanwhile, how soon all must know, whether rank 2 lives to tell
    (cut, reduce_until_lost, LOST_S, True),
    (silence, reduce_until_lost, LOST_S, True),
    (silence, wait_until_lost, LOST_S, True),
    (mute, reduce_until_lost, LOST_S, True),
    (mute, wait_until_lost, LOST_S, True),
    (deafen, reduce_until_lost, LOST_S, True),
    (deafen, wait_until_lost, LOST_S, True),
    (kill, reduce_until_lost, 1.0, False),
    (reset, reduce_until_lost, 1.0, True),
    (leave_half_open, wait_until_lost, LOST_S, False),
]


@pytest.mark.parametrize("fault, body, within_s, lives", FAULTS)
def test_a_fault_is_noticed_by_all_in_time(fault, body, within_s, lives):
    with ranks_on(3, **SETTINGS) as (hosts, ranks):
        ranks.begin(body)
        time.sleep(0.3)  # some operations are done, one is in flight
        began_s = time.monotonic()
        fault(hosts, ranks)
        end_s = time.monotonic() + 20.0
        for rank in range(3 if lives else 2):
            blamed, text, noticed_s = ranks._outcome(rank, end_s)
            print(f"rank {rank} after {noticed_s - began_s:.2f} s: {text}")
            assert noticed_s - began_s < within_s + SLACK_S, text
            if rank != 2:
                assert blamed == 2 and "rank 2 on host host2 was lost" in text


# ---- faults that a job survives ----------------------------------------------------------------------------------


def reduce_without_descriptors():
    """What an all-reduce and a broadcast give when this process can open nothing any more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(OSError):
            os.close(os.open("/dev/null", os.O_RDONLY))
        communicator = commlib.communicator()
        sums = communicator.allreduce(np.full(300_000, 1.0 + communicator.rank, np.float32), op=commlib.Sum)
        return set(sums.tolist()), communicator.broadcast(np.full(3, communicator.rank), 1).tolist()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_running_job_needs_no_new_descriptors():
    with ranks_on(2, per_host=2) as (_, ranks):
        assert ranks.call(reduce_without_descriptors) == [({10.0}, [1, 1, 1])] * 4


def reduce_while(seconds):
    """All-reduces for so long, and checks each; returns how many."""
    communicator, end_s, rounds = commlib.communicator(), time.monotonic() + seconds, 0
    array = np.arange(300_000, dtype=np.float32)
    while communicator.allreduce(np.array([time.monotonic() < end_s], np.int32), op=commlib.Min)[0]:
        np.testing.assert_array_equal(communicator.allreduce(array, op=commlib.Sum), array * communicator.size)
        rounds += 1
    return rounds


def stop_for_a_while(hosts, ranks, seconds=0.7 * LOST_S):
    ranks.processes[2].send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    ranks.processes[2].send_signal(signal.SIGCONT)


def cut_for_a_while(hosts, ranks):
    hosts.cut(2)
    time.sleep(0.3 * LOST_S)  # TCP waits twice as long for each attempt: it comes back well within the timeout
    hosts.mend(2)


def slow_down(hosts, ranks):
    hosts.limit(2, mbit=20)


def starve(hosts, ranks):
    """A slow host: the process runs for a tenth of the time."""
    for _ in range(25):
        ranks.processes[2].send_signal(signal.SIGSTOP)
        time.sleep(0.09)
        ranks.processes[2].send_signal(signal.SIGCONT)
        time.sleep(0.01)


def stop_for_five_seconds(hosts, ranks):
    stop_for_a_while(hosts, ranks, 5.0)


@pytest.mark.parametrize("fault, settings", [
    (stop_for_a_while, SETTINGS), (cut_for_a_while, SETTINGS), (slow_down, SETTINGS), (starve, SETTINGS),
    (stop_for_five_seconds, {}),
])
def test_what_is_over_soon_loses_nothing(fault, settings):
    with ranks_on(3, **settings) as (hosts, ranks):
        ranks.begin(reduce_while, 3.0)
        time.sleep(0.3)
        fault(hosts, ranks)
        rounds = ranks.collect()
        assert not any(isinstance(result, (RankFailed, Exception)) for result in rounds), rounds
        assert len(set(rounds)) == 1 and rounds[0] > 0, rounds
