"""Brief measurements at init: what a link inside a host and between hosts costs, and what a reduction costs.

Rank 0 plays ping-pong with one rank of each class through the engine, as operations of two ranks that the others never
hear of. Constants are rounded to powers of two, so that noise does not change what `selection` chooses.
"""

import math
import os
import time

from commlib._native import ffi, lib
from commlib.engine import AGAIN, operation_times
from commlib.errors import CommlibError
from commlib.names import base_key, key_of_use
from commlib.plan import Plan, recv, send
from commlib.requests import native_plan, new_request, new_text

# The best of many small ones is free of other processes' noise; large ones take 0.1 ms on shared memory and 1 ms on a
# 10 Gbit/s network, to and fro.
_SMALL_NBYTES, _SMALL_ROUNDS = 64, 24
_LARGE_NBYTES, _LARGE_ROUNDS = 512 << 10, 5
_REDUCE_NBYTES, _REDUCE_ROUNDS = 256 << 10, 6
_WAIT_S = 10.0

# Ranks that share processors pay for every message with a change of turns, which two ranks that play ping-pong do not. Fitted
# to all algorithms on 3, 4 and 8 ranks of 2 cores: 10, 12 and 9 us.
_CROWDED_MESSAGE_S = 2.0**-17


def calibrated(settings, engine, hosts):
    """The settings with the constants that are 0 and can be measured here filled in.

    Called by every rank; only rank 0's answer counts, and the caller broadcasts it.

    Args:
        settings: equal on all ranks.
        engine: started.
        hosts: the host index of every rank.

    Raises:
        CommlibError: a peer was lost meanwhile.
    """
    changes = {}
    for place, peer in (("inside", _first(hosts, same=True)), ("between", _first(hosts, same=False))):
        names = (f"alpha_{place}_s", f"beta_{place}_s_per_byte")
        if peer is None or engine.rank not in (0, peer) or all(getattr(settings, name) for name in names):
            continue
        small_s = one_way_s(engine, place, peer, _SMALL_NBYTES, _SMALL_ROUNDS)
        large_s = one_way_s(engine, place, peer, _LARGE_NBYTES, _LARGE_ROUNDS)
        beta = max(large_s - small_s, 1e-9) / (_LARGE_NBYTES - _SMALL_NBYTES)
        changes.update(zip(names, (rounded(small_s), rounded(beta))))
    if engine.rank == 0 and engine.size > 1:
        changes["gamma_s_per_byte"] = rounded(_reduction_s() / _REDUCE_NBYTES)
        if hosts.count(hosts[0]) > (os.cpu_count() or 1):
            changes["message_s"] = _CROWDED_MESSAGE_S
    return settings.replace(**{name: value for name, value in changes.items() if not getattr(settings, name)})


def rounded(value):
    """The nearest power of two.

    Example:
        >>> rounded(3.1e-6) == 2.0**-18
        True
    """
    return 2.0 ** round(math.log2(value))


def _first(hosts, same):
    """The lowest other rank on rank 0's host, or on another one; None if there is none."""
    return next((rank for rank in range(1, len(hosts)) if (hosts[rank] == hosts[0]) == same), None)


def one_way_s(engine, place, peer, nbytes, rounds, of=min):
    """The shortest of some ping-pongs, halved, or what `of` makes of them. Called by rank 0 and by its peer."""
    other = peer if engine.rank == 0 else 0
    away, back = send(other, 0, 1), recv(other, 0, 1)
    steps = (away, back) if engine.rank == 0 else (back, away)
    plan = Plan(engine.rank, 1, 0, steps)
    request, memory = new_request(), ffi.new("char[]", nbytes)
    text = new_text(f"calibration of links {place} hosts")
    request.text, request.kind, request.dtype, request.root = text, lib.CL_ALLREDUCE, lib.CL_UINT8, -1
    request.prescale = request.postscale = 1.0
    native = native_plan(plan)
    request.plan, request.input, request.output, request.count = native, memory, memory, nbytes
    base = base_key("calibration", place, str(nbytes))
    return of([_round_s(engine, request, key_of_use(base, use)) for use in range(rounds)]) / 2


def _round_s(engine, request, key):
    request.key = key
    operation = engine.submit(request)
    try:
        status = engine.wait(operation, _WAIT_S)
        if status == AGAIN:
            engine.shutdown(0)  # the memory of the ping-pong goes away now
            raise CommlibError(f"a ping-pong with a peer took more than {_WAIT_S:g} s: is it stopped or overloaded?")
        engine.check()
        submitted_s, _, done_s = operation_times(operation)
        return done_s - submitted_s
    finally:
        engine.release(operation)


def _reduction_s():
    """The shortest of some sums of float32."""
    count = _REDUCE_NBYTES // 4
    accumulator, operand = ffi.new("float[]", count), ffi.new("float[]", count)
    times_s = []
    for _ in range(_REDUCE_ROUNDS):
        begin_s = time.perf_counter()
        lib.cl_reduce(lib.CL_FLOAT32, lib.CL_SUM, accumulator, operand, count)
        times_s.append(time.perf_counter() - begin_s)
    return min(times_s)
