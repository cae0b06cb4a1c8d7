"""Raw data: what was measured, with which versions, on which machine, how loaded before and after."""

import contextlib
import datetime
import json
import os
import pathlib
import platform
import subprocess

from environments import absence, versions
from peers import HERE


@contextlib.contextmanager
def recorded(path, names, absent):
    """Yields a dict for the results, and writes it to a JSON file with all that a reader must know beside them.

    Args:
        path: of the file.
        names: of the peers that were to be measured.
        absent: {peer: why it was not measured, or not to the end}; it may grow meanwhile.
    """
    results = {}
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"architecture": platform.machine(), "processor": _processor(), "cores": len(os.sched_getaffinity(0)),
                    "kernel": platform.release(), "python": platform.python_version()},
        "load_before": os.getloadavg(),
    }  # fmt: skip
    yield results
    about["load_after"] = os.getloadavg()
    about["versions"] = {name: versions(name) for name in names if absence(name) is None}
    about["absent"] = absent
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **results}, indent=1) + "\n")


def _commit():
    """The sources measured; "+" after it: with changes."""
    answer = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=HERE, capture_output=True, text=True)
    return answer.stdout.strip() or None


def _processor():
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None
