"""What one all-reduce of a small tensor costs in a TensorFlow function, per tensor.

    commrun -np 1 python benchmarks/tensorflow_overhead.py
    commrun -np 2 python benchmarks/tensorflow_overhead.py --output benchmarks/results/tensorflow_overhead.json

A function makes `--tensors` small tensors and adds them up; the same function reduces each over all ranks in between. They run
in turn; the difference of the medians, divided by the number of tensors, is the cost. With one rank nothing is
communicated: it is the adapter's and the engine's alone. With two it holds the communication, too.
"""

import argparse
import os
import statistics
import time

import tensorflow as tf
from record import add_run

import commlib.tensorflow as comm


def function_of(reduce):
    """The function, with something done to the tensors that it makes."""

    def function(*tensors):
        made = reduce([tensor * 1.5 for tensor in tensors])
        return tf.add_n([one + 1.0 for one in made])

    return tf.function(function, autograph=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--count", type=int, default=256, help="elements of each")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", help="JSON, to which this run is added")
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    comm.init()
    tensors = [tf.ones([arguments.count]) * i for i in range(arguments.tensors)]
    functions = {
        "plain": function_of(lambda made: made),
        "reduced": function_of(lambda made: comm.grouped_allreduce(made, op=comm.Sum)),  # as tapes and optimizers do
    }
    times_us = {name: [] for name in functions}
    for round_ in range(arguments.rounds + 10):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(5):
                function(*tensors)
            if round_ >= 10:
                times_us[name].append((time.perf_counter() - begin) / 5 * 1e6)
    if comm.rank() == 0:
        plain, reduced = (statistics.median(times_us[name]) for name in ("plain", "reduced"))
        print(f"{comm.size()} ranks, {arguments.tensors} tensors of {arguments.count}: plain {plain:.0f} us, "
              f"reduced {reduced:.0f} us, per tensor {(reduced - plain) / arguments.tensors:.2f} us")  # fmt: skip
        if arguments.output:
            add_run(arguments.output, f"{comm.size()} ranks", arguments, load_before,
                    {"tensorflow": tf.__version__, "times_us": times_us})  # fmt: skip


if __name__ == "__main__":
    main()
