"""What a rank process of `support.Ranks` runs: reads (function, arguments), answers with the result, until its input ends."""

import importlib
import os
import pickle
import struct
import sys
import traceback

_LENGTH = struct.Struct("!Q")


def initialize():
    """The first call of most sets of ranks."""
    import commlib

    commlib.init(timeout_s=30.0)


def _answer(message):
    from support import Raised

    try:
        function, args = pickle.loads(message)
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(*args)
    except Exception as error:
        return Raised(error, traceback.format_exc())


def main():
    # Prints of the functions must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        header = sys.stdin.buffer.read(_LENGTH.size)
        if len(header) < _LENGTH.size:
            return
        payload = pickle.dumps(_answer(sys.stdin.buffer.read(_LENGTH.unpack(header)[0])))
        answers.write(_LENGTH.pack(len(payload)) + payload)
        answers.flush()


if __name__ == "__main__":
    sys.modules["support_rank"] = sys.modules["__main__"]
    main()
