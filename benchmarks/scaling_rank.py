"""One rank of emulated training; scaling.py starts it on a host of the cluster and reads what it wrote.

    scaling_rank.py ORDER RESULT     two files of JSON
"""

import json
import pathlib
import resource
import sys
import time

from emulated import Training
from movers import MOVERS

from commlib.messages import SCHEDULES
from commlib.schedule import LayerTime


def main():
    order = json.loads(pathlib.Path(sys.argv[1]).read_text())
    mover = MOVERS[order["mover"]]()
    times = [LayerTime(*layer) for layer in order["times_s"]]
    steps_s, cpu_s, wall_s = {}, {}, {}
    for schedule in order["schedules"]:
        training = Training(order["counts"], times, SCHEDULES[schedule], mover, schedule, order["shrink"])
        training.run(2)  # touches memory, and lets TCP's windows open
        before_s, begin_s = _cpu_s(), time.monotonic()
        steps_s[schedule] = training.run(order["steps"])
        cpu_s[schedule], wall_s[schedule] = _cpu_s() - before_s, time.monotonic() - begin_s
        mover.barrier()
    pathlib.Path(sys.argv[2]).write_text(json.dumps({"steps_s": steps_s, "cpu_s": cpu_s, "wall_s": wall_s}))
    mover.barrier()


def _cpu_s():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
