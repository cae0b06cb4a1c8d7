"""Communication that a step in TensorFlow exposes, two workers: commlib beside tf.distribute's MultiWorkerMirroredStrategy.

    python benchmarks/tensorflow_training.py --output benchmarks/results/tensorflow_training.json

A network of 3.1 million parameters (12.6 MB of gradients) is trained by hand with a tape in a tf.function. Every job runs, in
turn, its own step and one without communication on the same data; what the first takes longer is exposed. Jobs are started one
after the other, `--jobs` times each; medians over jobs are printed, and all times are kept.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

# Two workers on two cores: as commrun sets them.
THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
MODES = ("commlib", "strategy")


def build(tf, keras):
    """The network, its data and its optimizer."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(1024, activation="relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((1024,)), *layers])
    return model, keras.optimizers.SGD(0.01), tf.random.normal([int(os.environ["BENCH_ROWS"]), 1024])


def gradients_of(tf, model, x, wrap=lambda tape: tape):
    """Of a loss."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x, training=True)))
    return wrap(tape).gradient(loss, model.trainable_variables)


def commlib_steps(tf, keras):
    """(step, step without communication, whether this process reports)."""
    import commlib.tensorflow as comm

    comm.init()
    model, optimizer, x = build(tf, keras)

    def step(wrap):
        def function():
            optimizer.apply(gradients_of(tf, model, x, wrap), model.trainable_variables)

        return tf.function(function, autograph=False)

    optimizer.build(model.trainable_variables)
    return step(comm.DistributedGradientTape), step(lambda tape: tape), comm.rank() == 0


def strategy_steps(tf, keras):
    """The same with MultiWorkerMirroredStrategy; its variables of their own."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        shapes = [(1024, 1024), (1024,)] * 3
        variables = [tf.Variable(tf.random.normal(shape, stddev=0.03)) for shape in shapes]
    alone = [tf.Variable(tf.random.normal(shape, stddev=0.03)) for shape in shapes]
    _, _, x = build(tf, keras)

    def gradients(weights):
        with tf.GradientTape() as tape:
            y = x
            for kernel, bias in zip(weights[::2], weights[1::2]):
                y = tf.nn.relu(y @ kernel + bias)
            loss = tf.reduce_mean(tf.square(y))
        return tape.gradient(loss, weights)

    def replica():
        reduced = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, gradients(variables))
        for variable, gradient in zip(variables, reduced):
            variable.assign_sub(0.01 * gradient)

    def plain():
        for variable, gradient in zip(alone, gradients(alone)):
            variable.assign_sub(0.01 * gradient)

    both = tf.function(lambda: strategy.run(replica), autograph=False), tf.function(plain, autograph=False)
    return (*both, strategy.cluster_resolver.task_id == 0)


def worker(mode, rounds):
    """One process of a job: prints the times of its steps in ms, as JSON."""
    import keras
    import tensorflow as tf

    step, plain, reports = {"commlib": commlib_steps, "strategy": strategy_steps}[mode](tf, keras)
    times_ms = {"step": [], "plain": []}
    for round_ in range(rounds + 5):
        for name, function in (("step", step), ("plain", plain)):
            begin = time.perf_counter()
            function()
            if round_ >= 5:
                times_ms[name].append(1e3 * (time.perf_counter() - begin))
    if reports:
        sys.stdout.write("times " + json.dumps(times_ms) + "\n")
        sys.stdout.flush()
    if mode == "strategy":
        os._exit(0)  # its threads wait for each other at exit


def free_ports(count):
    """Ports that nobody listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run_job(mode, arguments):
    """The times of the worker that reports."""
    environ = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **dict.fromkeys(THREADS, "1"), "BENCH_ROWS": str(arguments.rows)}
    command = [sys.executable, __file__, "--worker", mode, "--rounds", str(arguments.rounds)]
    if mode == "commlib":
        commands = [([sys.executable, "-m", "commlib.launch", "-np", "2", *command], environ)]
    else:
        workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
        commands = [(command, {**environ, "TF_CONFIG": json.dumps({"cluster": {"worker": workers},
                                                                  "task": {"type": "worker", "index": index}})})
                    for index in range(2)]  # fmt: skip
    processes = [subprocess.Popen(one, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                 for one, env in commands]  # fmt: skip
    output = "".join(process.communicate(timeout=240)[0] for process in processes)
    return json.loads(next(line.partition("times ")[2] for line in output.splitlines() if "times " in line))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="of each kind")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=256, help="of a worker's batch")
    parser.add_argument("--output", help="JSON, to which this run is added")
    parser.add_argument("--worker", choices=MODES)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker, arguments.rounds)
    from record import add_run

    load_before = os.getloadavg()
    jobs = {mode: [] for mode in MODES}
    for _ in range(arguments.jobs):
        for mode in MODES:
            jobs[mode].append(run_job(mode, arguments))
    for mode, times in jobs.items():
        step, plain = (statistics.median(statistics.median(one[name]) for one in times) for name in ("step", "plain"))
        print(f"{mode:9s} step {step:6.1f} ms, without communication {plain:6.1f} ms, exposed {step - plain:6.1f} ms")
    if arguments.output:
        add_run(arguments.output, f"{arguments.rows} rows", arguments, load_before, {"jobs_ms": jobs})


if __name__ == "__main__":
    main()
