"""A Keras training step of two ranks over a slow link: forward overlap, waiting, and no communication at all.

    sudo python benchmarks/keras_link.py --rate-mbit 1000 --batch 256 --output benchmarks/results/keras_link.json

Two network namespaces stand for two hosts (torch_link.py makes them), each with one rank. The model is twelve dense layers of
512 x 512, 12.6 MB of gradients. The three ways take turns in one run. Beside them stands commlib.schedule's ideal: free
preemption, no latency, and as its inputs what was measured in the same run: what the link needs for all gradients (the fastest of
large all-reduces), the step alone, and the forward pass alone. The layers are alike: of backward each takes two parts, the
first one.
"""

import argparse
import json
import os
import pathlib
import sys
import time

from commlib.schedule import LayerTime, ideal_step_time

LAYERS, WIDTH, STEPS, ROUNDS = 12, 512, 30, 4


def ideal_s(forward_s, backward_s, communication_s):
    """Of a step of layers that are alike."""
    parts = [1, *[2] * (LAYERS - 1)]
    layers = [LayerTime(forward_s / LAYERS, part * backward_s / sum(parts), communication_s / LAYERS) for part in parts]
    return ideal_step_time(layers).step_s


def rank(arguments):
    """What one rank does; rank 0 writes the result."""
    import keras
    import numpy as np
    import tensorflow as tf

    import commlib.keras as comm

    comm.init()
    random = np.random.default_rng(comm.rank())
    x = random.normal(size=(arguments.batch * STEPS, WIDTH)).astype("float32")
    y = random.integers(0, 10, len(x))

    def model(distribute, overlap):
        keras.utils.set_random_seed(1)
        layers = [keras.layers.Dense(WIDTH, "relu") for _ in range(LAYERS)]
        made = keras.Sequential([keras.Input((WIDTH,)), *layers, keras.layers.Dense(10)])
        made.compile(distribute(keras.optimizers.SGD(0.01)), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return comm.enable_forward_overlap(made) if overlap else made

    ways = {"alone": model(lambda optimizer: optimizer, False), "waiting": model(comm.DistributedOptimizer, False),
            "overlapped": model(comm.DistributedOptimizer, True)}  # fmt: skip
    forward = tf.function(lambda batch: ways["alone"](batch, training=True), autograph=False)
    batch = tf.constant(x[: arguments.batch])
    everything = np.ones(LAYERS * WIDTH * WIDTH, "float32")
    seconds = {name: [] for name in (*ways, "forward", "all-reduce of all")}
    for turn in range(ROUNDS + 1):
        for name, one in ways.items():
            comm.allreduce(0.0)
            begin_s = time.perf_counter()
            one.fit(x, y, batch_size=arguments.batch, shuffle=False, verbose=0)
            seconds[name].append((time.perf_counter() - begin_s) / STEPS)
        comm.allreduce(0.0)
        begin_s = time.perf_counter()
        for _ in range(STEPS):
            forward(batch)
        seconds["forward"].append((time.perf_counter() - begin_s) / STEPS)
        begin_s = time.perf_counter()
        comm.allreduce(everything)
        seconds["all-reduce of all"].append(time.perf_counter() - begin_s)
    if comm.rank() == 0:
        result = {"batch": arguments.batch, "rate_mbit": arguments.rate_mbit, "steps": STEPS,
                  "seconds_per_step": {name: values[1:] for name, values in seconds.items()}}  # fmt: skip
        if arguments.output:
            pathlib.Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}
        medians["ideal"] = ideal_s(medians["forward"], medians["alone"] - medians["forward"], min(seconds["all-reduce of all"]))
        for name, median_s in medians.items():
            sys.stdout.write(f"{name:18} {1e3 * median_s:7.1f} ms   {median_s / medians['ideal']:.2f} x the ideal\n")
    comm.shutdown()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate-mbit", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256, help="of each rank")
    parser.add_argument("--output", help="where raw data go, as JSON")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank(arguments)
        return
    import torch_link

    os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1", TF_CPP_MIN_LOG_LEVEL="2")
    torch_link.NAMES = ("commlib-keras-0", "commlib-keras-1")
    torch_link.__file__ = __file__  # its ranks run this program
    command = ["--rate-mbit", str(arguments.rate_mbit), "--batch", str(arguments.batch)]
    command += ["--output", arguments.output] if arguments.output else []
    secret = torch_link.make_secret()
    try:
        torch_link.make_hosts(arguments.rate_mbit)
        ranks = [torch_link.start_rank(index, command, secret.name) for index in range(2)]
        codes = [one.wait() for one in ranks]
    finally:
        torch_link.remove_hosts()
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
