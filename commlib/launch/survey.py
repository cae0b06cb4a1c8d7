"""What `commrun --check` asks of one host: its limits, whether another can reach it, and how fast. Answers dicts of plain values.

The measuring port takes only connections that begin with the check's token, which came over ssh.
"""
from __future__ import annotations

import hmac
import os
import resource
import socket
import statistics
import struct
import sys
import threading
import time
from typing import Callable, Dict

from commlib.bootstrap import StartError
from commlib.connect import host_identity
from commlib.launch import network

_PINGS = 200
_STREAM_S = 0.3          # long enough for TCP to have found its speed
_PIECE_NBYTES = 1 << 18
_SHARED_NBYTES = 64 << 20  # some 64 ranks' rings
_STUCK_S = 5.0
_TOTAL = struct.Struct("!Qd")  # bytes received, seconds it took


def answer(question: dict) -> dict:
    """The answer to one question, by its "what"."""
    return {"what": question["what"], **_QUESTIONS[question["what"]](question)}


def _limits(_question: dict) -> dict:
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {"cores": len(os.sched_getaffinity(0)), "memlock_nbytes": None if memlock == resource.RLIM_INFINITY else memlock,
            "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "shared": _shared_memory(),
            "python_minor": list(sys.version_info[:2])}


def _shared_memory() -> str:
    """"" if enough can be had, else why not."""
    try:
        memory = os.memfd_create("commlib-check")
        try:
            os.posix_fallocate(memory, 0, _SHARED_NBYTES)
        finally:
            os.close(memory)
    except OSError as error:
        return error.strerror
    return ""


def _listen(question: dict) -> dict:
    """Opens the measuring port, until this process ends."""
    try:
        listener = network.listen(question["ports"])
        addresses = network.addresses(question["interfaces"])
    except (OSError, StartError) as error:
        return {"port": None, "text": str(error), "addresses": []}
    threading.Thread(target=_serve, args=(listener, question["token"].encode()), daemon=True).start()
    return {"port": listener.getsockname()[1], "addresses": addresses}


def _serve(listener: socket.socket, token: bytes) -> None:
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_answer_one, args=(sock, token), daemon=True).start()


def _answer_one(sock: socket.socket, token: bytes) -> None:
    with sock:
        try:
            sock.settimeout(_STUCK_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(_exactly(sock, len(token)), token):
                return
            sock.sendall(token[::-1])
            for _ in range(_PINGS):
                sock.sendall(_exactly(sock, 8))
            sock.sendall(_TOTAL.pack(*_swallow(sock)))
        except OSError:
            pass  # the other side sees it and says so


def _swallow(sock: socket.socket) -> tuple:
    """(bytes received until the other side stops, seconds from the first to the last)."""
    total, began = 0, time.perf_counter()
    while True:
        nbytes = len(sock.recv(_PIECE_NBYTES))
        if total == 0:
            began = time.perf_counter()
        if nbytes == 0:
            return total, time.perf_counter() - began
        total += nbytes


def _measure(question: dict) -> dict:
    """Reaches another host's measuring port; latency and bandwidth on the way there."""
    address, reason = network.reach(question["addresses"], question["port"], question["identity"] == host_identity())
    if address is None:
        return {"address": None, "reason": reason}
    try:
        with socket.create_connection((address, question["port"]), _STUCK_S) as sock:
            latency_s, rate = _latency_and_rate(sock, question["token"].encode())
    except OSError as error:
        return {"address": None, "reason": f"{address}: {error}"}
    return {"address": address, "latency_s": latency_s, "bytes_per_s": rate}


def _latency_and_rate(sock: socket.socket, token: bytes) -> tuple:
    """(half a round trip in s, bytes/s)."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(token)
    if _exactly(sock, len(token)) != token[::-1]:
        raise OSError("something else answers at this port")
    times = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        sock.sendall(b"commlib!")
        _exactly(sock, 8)
        times.append(time.perf_counter() - began)
    piece, end = bytes(_PIECE_NBYTES), time.monotonic() + _STREAM_S
    while time.monotonic() < end:
        sock.sendall(piece)
    sock.shutdown(socket.SHUT_WR)
    total, seconds = _TOTAL.unpack(_exactly(sock, _TOTAL.size))
    return statistics.median(times) / 2.0, total / max(seconds, 1e-9)


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = sock.recv(nbytes - len(data))
        if not piece:
            raise OSError("it closed the connection")
        data += piece
    return data


_QUESTIONS: Dict[str, Callable[[dict], dict]] = {"limits": _limits, "listen": _listen, "measure": _measure}
