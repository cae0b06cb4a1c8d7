"""One rank of truth.py: ping-pong, all-reduces one at a time, and emulated training; writes what it measured.

    truth_rank.py ORDER RESULT     two files of JSON
"""

import json
import pathlib
import statistics
import sys
import time

import numpy as np
from emulated import Training
from movers import Commlib

import commlib
from commlib import calibrate
from commlib.messages import SCHEDULES
from commlib.schedule import LayerTime


def ping_pong(communicator, sizes, rounds):
    """({bytes: seconds one way, the median of some rounds}, {bytes: this process's processor seconds to send and receive one})."""
    engine = communicator._engine
    one_way_s, busy_s = {}, {}
    for nbytes in sizes if engine.rank <= 1 else ():
        begin_s = time.process_time()
        one_way_s[str(nbytes)] = calibrate.one_way_s(engine, "between", 1, nbytes, rounds, statistics.median)
        busy_s[str(nbytes)] = (time.process_time() - begin_s) / rounds
    return one_way_s, busy_s


def allreduces(communicator, nbytes, repeats):
    """Seconds of each of a few all-reduces, one after the other, in place."""
    array, times_s = np.zeros(nbytes // 4, np.float32), []
    for repeat in range(repeats + 2):
        communicator.barrier()
        begin_s = time.monotonic()
        communicator.allreduce_(array, op=commlib.Sum)
        times_s.append(time.monotonic() - begin_s)
    return times_s[2:]  # memory is touched, TCP's windows are open


def main():
    order = json.loads(pathlib.Path(sys.argv[1]).read_text())
    mover = Commlib()
    communicator = mover.communicator
    result = {"settings": communicator.settings.to_json(), "allreduce": {}, "steps": {}}
    result["ping_pong"], result["busy"] = ping_pong(communicator, order["ping_pong"], order["rounds"])
    communicator.barrier()
    for nbytes in order["allreduce"]:
        result["allreduce"][str(nbytes)] = allreduces(communicator, nbytes, order["repeats"])
    for number, work in enumerate(order["trainings"]):
        times = [LayerTime(forward_s, backward_s, 0.0) for forward_s, backward_s in work["times_s"]]
        name = f"{work['model']} {work['schedule']}"
        training = Training(work["counts"], times, SCHEDULES[work["schedule"]], mover, f"training {number}", work["shrink"])
        training.run(2)
        result["steps"][name] = training.run(order["steps"])
        communicator.barrier()
    pathlib.Path(sys.argv[2]).write_text(json.dumps(result))
    communicator.barrier()


if __name__ == "__main__":
    main()
