"""One rank of a peer: connects to the benchmark's socket and does what it is told, so that it is idle while others run.

    rank.py NAME SOCKET     started by the peer's launcher

An order is a line of JSON, the answer a line with a list of seconds. oneccl_rank.cpp speaks the same in C++.
"""

import json
import socket
import sys
import time

from peers import PEERS

URGENT, ORDINARY = 0, 1
BUSY_S = 0.005  # the large operation is well under way by then


def blocking(peer, nbytes, repeats):
    """Seconds of each of some all-reduces, one after the other."""
    allreduce = peer.prepare(peer.array(nbytes), "benchmark")
    return [timed(allreduce) for _ in range(repeats)]


def at_once(peer, count, nbytes, repeats):
    """Seconds from the submission of the first of `count` tensors to the end of all of them."""
    arrays = [peer.array(nbytes) for _ in range(count)]

    def all_of_them():
        waits = [peer.start(array, f"tensor {index}", ORDINARY) for index, array in enumerate(arrays)]
        for wait in waits:
            wait()

    return [timed(all_of_them) for _ in range(repeats)]


def as_list(peer, count, nbytes, repeats):
    """Seconds of an all-reduce of a list of `count` tensors; none where the peer takes no lists."""
    arrays, reduce_list = [peer.array(nbytes) for _ in range(count)], getattr(peer, "reduce_list", None)
    return [timed(lambda: reduce_list(arrays, "list")) for _ in range(repeats)] if reduce_list else []


def urgent(peer, nbytes, behind_nbytes, repeats):
    """Seconds of an urgent all-reduce that is submitted while a large one is moving."""
    large, small = peer.array(behind_nbytes), peer.array(nbytes)
    meet, times_s = peer.prepare(peer.array(nbytes), "meet"), []
    for _ in range(repeats):
        meet()
        wait = peer.start(large, "large", ORDINARY)
        time.sleep(BUSY_S)
        times_s.append(timed(lambda: peer.start(small, "urgent", URGENT)()))
        wait()
    return times_s


def timed(function):
    """Seconds of one call."""
    begin_s = time.perf_counter()
    function()
    return time.perf_counter() - begin_s


ORDERS = {"blocking": blocking, "at_once": at_once, "as_list": as_list, "urgent": urgent}


def main():
    name, address = sys.argv[1:]
    peer = PEERS[name].make()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    orders = connection.makefile("rw")
    answer = {"rank": peer.rank}
    while True:
        orders.write(json.dumps(answer) + "\n")
        orders.flush()
        line = orders.readline()
        if not line:
            return
        order = json.loads(line)
        answer = ORDERS[order.pop("do")](peer, **order)


if __name__ == "__main__":
    main()
