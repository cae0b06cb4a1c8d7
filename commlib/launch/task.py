"""One rank of `commlib.run`: reads the call from standard input, makes it, writes how it ended to descriptor 3.

Started by commrun as a rank's program. The pickles come from the user's own process, through commrun and ssh.
"""
from __future__ import annotations

import os
import pickle
import sys
import traceback

from commlib.errors import PeerLeftError, PeerLostError
from commlib.launch.caller import DESCRIPTOR
from commlib.run import pickler


def main() -> int:
    with open(DESCRIPTOR, "wb", closefd=True) as output:
        os.set_inheritable(DESCRIPTOR, False)
        code, outcome = _outcome(sys.stdin.buffer.read())
        output.write(outcome)
    return code


def _outcome(call: bytes) -> tuple:
    """(exit code, pickled outcome): ("returned", pickled value), or ("raised", text, pickled error or None, whether it only
    says that another rank has gone)."""
    dumps = pickler()
    try:
        outer = pickle.loads(call)
        sys.path[:] = outer["path"] + [folder for folder in sys.path if folder not in outer["path"]]
        function, args, kwargs = pickle.loads(outer["call"])
        value = function(*args, **kwargs)
        return 0, pickle.dumps(("returned", dumps(value)))
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickled = dumps(error)
            pickle.loads(pickled)  # errors whose __init__ wants more than their args come back broken
        except Exception:
            pickled = None
        return 1, pickle.dumps(("raised", text, pickled, isinstance(error, (PeerLeftError, PeerLostError))))


if __name__ == "__main__":
    sys.exit(main())
