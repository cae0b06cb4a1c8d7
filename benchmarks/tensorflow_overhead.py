"""What reducing a small tensor costs in a TensorFlow function, per tensor.

    commrun -np 1 python benchmarks/tensorflow_overhead.py
    commrun -np 2 python benchmarks/tensorflow_overhead.py --output benchmarks/results/tensorflow_overhead.json

Three pairs of functions, without reductions and with them, all in turn; the difference of the medians, divided by the number of
tensors, is the cost. With one rank nothing is communicated: it is the adapter's and the engine's alone. With two it holds the
communication, too.

- tape: gradients of `--tensors` variables by a tape, applied by hand;
- keras: the same, applied by a Keras optimizer, SGD;
- list: as many tensors in grouped_allreduce, where each one is an operation of its own.
"""

import argparse
import os
import statistics
import time

import keras
import tensorflow as tf
from record import add_run

import commlib.keras
import commlib.tensorflow as comm


def of_list(tensors, reduce):
    """Tensors are made and added up, with something done to them in between."""

    def function():
        made = reduce([tensor * 1.5 for tensor in tensors])
        return tf.add_n([one + 1.0 for one in made])

    return tf.function(function, autograph=False)


def gradients_of(variables, wrap):
    """Of a loss to which every variable contributes."""
    with tf.GradientTape() as tape:
        loss = tf.add_n([tf.reduce_sum(tf.square(one)) for one in variables])
    return wrap(tape).gradient(loss, variables)


def of_tape(variables, wrap):
    """A step by hand."""

    def function():
        for variable, gradient in zip(variables, gradients_of(variables, wrap)):
            variable.assign_sub(1e-6 * gradient)

    return tf.function(function, autograph=False)


def of_keras(variables, optimizer):
    """A step by an optimizer."""
    optimizer.build(variables)

    def function():
        optimizer.apply(gradients_of([one.value for one in variables], lambda tape: tape), variables)

    return tf.function(function, autograph=False)


def functions_of(count, elements):
    """form -> (without reductions, with them)."""
    tensors = [tf.ones([elements]) * i for i in range(count)]
    weights = [[tf.Variable(tensor) for tensor in tensors] for _ in range(2)]
    keras_weights = [[keras.Variable(tensor) for tensor in tensors] for _ in range(2)]
    sgd = keras.optimizers.SGD
    return {
        "tape": (of_tape(weights[0], lambda tape: tape), of_tape(weights[1], comm.DistributedGradientTape)),
        "keras": (of_keras(keras_weights[0], sgd(1e-6)), of_keras(keras_weights[1], commlib.keras.DistributedOptimizer(sgd(1e-6)))),
        "list": (of_list(tensors, lambda made: made), of_list(tensors, lambda made: comm.grouped_allreduce(made, op=comm.Sum))),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--count", type=int, default=256, help="elements of each")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", help="JSON, to which this run is added")
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    comm.init()
    functions = functions_of(arguments.tensors, arguments.count)
    times_us = {form: ([], []) for form in functions}
    for round_ in range(arguments.rounds + 10):
        for form, pair in functions.items():
            for function, times in zip(pair, times_us[form]):
                begin = time.perf_counter()
                for _ in range(5):
                    function()
                if round_ >= 10:
                    times.append((time.perf_counter() - begin) / 5 * 1e6)
    if comm.rank() == 0:
        for form, pair in times_us.items():
            plain, reduced = map(statistics.median, pair)
            print(f"{comm.size()} ranks, {arguments.tensors} tensors of {arguments.count}, {form:5s}: plain {plain:.0f} us, "
                  f"reduced {reduced:.0f} us, per tensor {(reduced - plain) / arguments.tensors:.2f} us")  # fmt: skip
        if arguments.output:
            add_run(arguments.output, f"{comm.size()} ranks", arguments, load_before,
                    {"tensorflow": tf.__version__, "times_us": times_us})  # fmt: skip


if __name__ == "__main__":
    main()
