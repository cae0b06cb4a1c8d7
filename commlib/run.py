"""`commlib.run`: a function on every rank of a new job, its results back in rank order.

The job is a commrun of its own, since a launcher must own its process: its signals, its children. This file knows the
two pipes to it (launch/caller.py is at their other end) and pickles.
"""
from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from commlib.rendezvous_wire import Decoder

LENGTH = struct.Struct("!Q")
_READ_NBYTES = 1 << 16
_STOP_S = 15.0  # commrun itself needs at most 8 s to end stubborn ranks


class RunError(RuntimeError):
    """The job of `commlib.run` failed.

    Args:
        text: what happened, with the rank's traceback if it raised.
        rank: the rank that failed first; None if it was none, or is not known.
    The rank's own exception is the `__cause__`, where it can be pickled.
    """

    def __init__(self, text: str, rank: Optional[int] = None):
        super().__init__(text)
        self.rank = rank


def run(func: Callable, args: Sequence = (), kwargs: Optional[Mapping] = None, num_proc: Optional[int] = None,
        hosts: Optional[str] = None, hostfile: Optional[str] = None, *, start_timeout: Optional[float] = None,
        timeout: Optional[float] = None, ssh_port: Optional[int] = None, ssh_identity_file: Optional[str] = None,
        launch_agent: Optional[str] = None, network_interfaces: Optional[str] = None, settings: Optional[str] = None,
        output_filename: Optional[str] = None, prefix_output: bool = False, prefix_output_with_timestamp: bool = False,
        verbose: bool = False, executable: Optional[str] = None, env: Optional[Mapping[str, str]] = None) -> List[Any]:
    """Runs func(*args, **kwargs) on every rank of a new job and returns the results.

    Args:
        func: what each rank runs; it calls commlib.init() itself. Functions of `__main__` and lambdas need cloudpickle
            installed here and on every host; others must be importable there.
        args, kwargs: equal for all ranks; pickled.
        num_proc: number of ranks; None: all slots of the hosts.
        hosts, hostfile: as commrun's -H and --hostfile; None: this host.
        start_timeout, timeout: seconds for ranks and hosts to come, and for the whole job; None: 60, and no limit.
        ssh_port, ssh_identity_file, launch_agent, network_interfaces, settings, output_filename, prefix_output,
            prefix_output_with_timestamp, verbose: commrun's options of these names.
        executable: the Python of the ranks; None: this one, by its path on every host.
        env: further variables for the ranks.
    Returns:
        What func returned, in rank order.
    Raises:
        RunError: a rank raised (its exception is the cause), died, or the job could not start.
        ValueError: neither num_proc nor hosts were given, or the call cannot be pickled.
    Example:
        >>> import math
        >>> run(math.sqrt, args=(9.0,), num_proc=2)
        [3.0, 3.0]
    """
    if num_proc is None and hosts is None and hostfile is None:
        raise ValueError("give num_proc, the number of ranks, or hosts: commlib.run(func, num_proc=2)")
    options: Dict[str, Any] = {
        "-np": num_proc, "-H": hosts, "--hostfile": hostfile, "--start-timeout": start_timeout, "--timeout": timeout,
        "-p": ssh_port, "-i": ssh_identity_file, "--launch-agent": launch_agent, "--network-interfaces": network_interfaces,
        "--settings": settings, "--output-filename": output_filename, "--prefix-output": prefix_output or None,
        "--prefix-output-with-timestamp": prefix_output_with_timestamp or None, "--verbose": verbose or None,
        "--python": executable,
    }  # fmt: skip
    words = [word for name, value in options.items() if value is not None
             for word in ([name] if value is True else [name, str(value)])]
    words += [word for name in env or () for word in ("-x", name)]
    command = [executable or sys.executable, "-m", "commlib.launch.task"]
    return _outcomes(_pickled(func, args, kwargs), [*words, "--", *command], env or {})


def pickler() -> Callable[[Any], bytes]:
    """cloudpickle's dumps if it is installed, which takes functions of __main__ and lambdas along; else pickle's."""
    try:
        import cloudpickle
    except ImportError:
        return pickle.dumps
    return cloudpickle.dumps


def _pickled(func: Callable, args: Sequence, kwargs: Optional[Mapping]) -> bytes:
    dumps = pickler()
    if dumps is pickle.dumps and getattr(func, "__module__", None) == "__main__":
        raise ValueError(f"{getattr(func, '__name__', func)!r} is defined in __main__, where ranks cannot import it: "
                         "pip install cloudpickle, or put it into a module")
    try:
        call = dumps((func, tuple(args), dict(kwargs or {})))
    except Exception as error:
        raise ValueError(f"the function or its arguments cannot be pickled ({error}): pip install cloudpickle, or give a "
                         "function of a module and plain arguments") from error
    return pickle.dumps({"path": [os.path.abspath(folder) for folder in sys.path], "call": call})


def _outcomes(call: bytes, words: List[str], env: Mapping[str, str]) -> List[Any]:
    """Runs commrun with these words; returns what the ranks returned."""
    their_input, our_output = os.pipe()
    our_input, their_output = os.pipe()
    program = [sys.executable, "-m", "commlib.launch", "--call", f"{their_input}:{their_output}"]
    try:
        # a session of its own: Ctrl-C comes from us, once
        process = subprocess.Popen([*program, *words], stdin=subprocess.DEVNULL, env={**os.environ, **env}, start_new_session=True,
                                   pass_fds=(their_input, their_output))
    finally:
        os.close(their_input)
        os.close(their_output)
    with open(our_input, "rb", buffering=0) as source:
        try:
            _say_what(our_output, call)
            pieces, failure = _listen(source)
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            os.close(our_output)
    return _judge(pieces, failure, code)


def _say_what(pipe: int, call: bytes) -> None:
    left = memoryview(LENGTH.pack(len(call)) + call)
    with contextlib.suppress(BrokenPipeError):  # it has ended already, and said why
        while left:
            left = left[os.write(pipe, left):]


def _listen(source) -> tuple:
    """(rank -> bytes of its outcome, (rank, text) of the first failure or None), when commrun has closed its end."""
    decoder, pieces, failure = Decoder(), {}, None
    while True:
        data = source.read(_READ_NBYTES)
        if not data:
            return pieces, failure
        decoder.feed(data)
        message = decoder.next()
        while message is not None:
            rank = message.header["rank"]
            if message.header["op"] == "piece":
                pieces.setdefault(rank, bytearray()).extend(message.payload)
            elif failure is None:
                failure = (rank, message.header["text"])
            message = decoder.next()


def _judge(pieces: Dict[int, bytes], failure: Optional[tuple], code: int) -> List[Any]:
    outcomes = {rank: pickle.loads(bytes(data)) for rank, data in pieces.items()}
    raised = {rank: outcome for rank, outcome in outcomes.items() if outcome[0] == "raised"}
    if failure is not None and failure[0] not in raised:
        raise RunError(failure[1], failure[0])
    # as they came; those that failed because another rank did come last
    for rank, (_, text, error, _) in sorted(raised.items(), key=lambda item: item[1][3]):
        raise RunError(f"rank {rank} raised:\n{text}", rank) from (pickle.loads(error) if error else None)
    if code != 0:
        raise RunError(f"commrun ended with code {code}; what it said is on standard error")
    return [pickle.loads(outcomes[rank][1]) for rank in sorted(outcomes)]


def _end(process: subprocess.Popen) -> None:
    """Lets commrun stop its ranks in order."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()  # its guard kills the ranks
        process.wait()
