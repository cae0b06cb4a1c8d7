"""One wheel, several TensorFlows: builds it, makes an environment for each version, and tries the op library in each.

    python tests/tensorflow_versions.py [--folder FOLDER] [VERSION ...]

Not part of the test-suite: it downloads about 300 MB for each version. `make test-tensorflow-versions` runs it. What pip
cannot install for this Python is said and skipped; if none was tried, or one failed, the exit code is 1.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
VERSIONS = ("2.16", "2.18", "2.20", "2.21")
LONGEST_S = 600

# What a rank of three does: every op, in eager mode and in a function; a tape; halves; a mismatch; Keras with overlap; two lives.
PROGRAM = """
import sys
import keras
import numpy as np
import tensorflow as tf
import commlib.keras
import commlib.tensorflow as comm
from commlib.tensorflow import operations

comm.init()
rank, size = comm.rank(), comm.size()

def collectives(x):
    received, splits = comm.alltoall(tf.repeat(x, size), splits=[1] * size)
    return [comm.allreduce(x, op=comm.Sum), comm.allgather(x), comm.broadcast(x, 1),
            comm.reducescatter(tf.repeat(x, size), op=comm.Sum), received, splits,
            comm.rank_op(), comm.size_op(), *comm.grouped_allreduce([x, x * 2], op=comm.Max)]

def check(x):
    for function in (collectives, tf.function(collectives)):
        got = [one.numpy().tolist() for one in function(x)]
        everybody = [r + 1.0 for r in range(size)]
        assert got == [[6.0], everybody, [2.0], [6.0], everybody, [1] * size, rank, size, [3.0], [6.0]], got

variables = [tf.Variable([1.0, 2.0]), tf.Variable(3.0)]

@tf.function
def step(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(variables[0] * x) * variables[1]
    return comm.DistributedGradientTape(tape).gradient(loss, variables)

@tf.function
def halves(x):
    for i in range(3):
        operations.begin(x * i, f"half {i}", op=comm.Sum)
    return [operations.finish(f"half {i}", tf.float32, [1], op=comm.Sum) for i in range(3)]

@tf.function
def mismatch():
    return comm.allreduce(tf.ones(2 + rank // 2), name="m")

def train(overlap):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    model.compile(commlib.keras.DistributedOptimizer(keras.optimizers.Adam(0.1)), "mse")
    model = commlib.keras.enable_forward_overlap(model) if overlap else model
    x = np.random.default_rng(rank).normal(size=(12, 3)).astype("float32")
    model.fit(x, x[:, :2], batch_size=4, verbose=0, shuffle=False)
    everybody = comm.allgather_object([one.tobytes() for one in model.get_weights()])
    assert all(one == everybody[0] for one in everybody)
    return everybody[0]

for life in range(2):
    x = tf.constant([rank + 1.0])
    check(x)
    assert [one.numpy().tolist() for one in step(x)] == [[6.0, 6.0], 6.0]
    try:
        mismatch()
        raise SystemExit("no error")
    except tf.errors.OpError as error:
        assert "ranks disagree" in str(error), error
    try:
        tf.function(lambda: comm.allreduce(x), jit_compile=True)()
        raise SystemExit("no error")
    except ValueError as error:
        assert "cannot be compiled by XLA" in str(error), error
    layer = comm.SyncBatchNormalization()
    assert layer(tf.constant([[rank + 0.0]]), training=True).shape == (1, 1)
    assert abs(layer.moving_mean.numpy()[0] - 0.01) < 1e-6
    for _ in range(3):
        for i in range(3):
            operations.begin(x * i, f"half {i}", op=comm.Sum)
        assert [operations.finish(f"half {i}", tf.float32, [1], op=comm.Sum).numpy()[0] for i in range(3)] == [0.0, 6.0, 12.0]
    assert comm.allreduce(tf.ones(3), op=comm.Adasum).numpy().tolist() == [1.0] * 3
    assert train(False) == train(True)
    comm.shutdown()
    comm.init()
if rank == 0:
    sys.stdout.write(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python {sys.version.split()[0]}: well\\n")
"""


def run(*command, **options):
    return subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=LONGEST_S, **options)  # fmt: skip


def must(*command):
    result = run(*command)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stdout}")


def build_wheel(folder):
    must(sys.executable, "-m", "venv", folder / "build")
    must(folder / "build/bin/pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    return max(folder.glob("commlib-*.whl"), key=os.path.getmtime)


def try_version(version, wheel, folder):
    """True: it works; False: it does not; None: there is none for this Python."""
    environment = folder / version
    must(sys.executable, "-m", "venv", "--clear", environment)
    pip = (environment / "bin/pip", "install", "--quiet", "--disable-pip-version-check")
    installed = run(*pip, f"tensorflow-cpu=={version}.*", wheel)
    if installed.returncode:
        print(f"TensorFlow {version} cannot be installed here: {installed.stdout.strip().splitlines()[-1]}", flush=True)
        return None
    program = folder / "program.py"
    program.write_text(PROGRAM)
    ran = run(environment / "bin/commrun", "-np", "3", environment / "bin/python", program, cwd=folder,
              env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "TF_NUM_INTRAOP_THREADS": "1"})  # fmt: skip
    words = [line for line in ran.stdout.splitlines() if line.endswith(": well")]
    print(words[0] if ran.returncode == 0 and words else f"TensorFlow {version} FAILED:\n{ran.stdout}", flush=True)
    return ran.returncode == 0 and bool(words)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--folder", help="where the environments are made (about 2 GB each); a temporary one by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(arguments.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        wheel = build_wheel(folder)
        outcomes = [try_version(version, wheel, folder) for version in arguments.versions]
    sys.exit(0 if any(outcomes) and False not in outcomes else 1)


if __name__ == "__main__":
    main()
