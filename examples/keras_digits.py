"""Trains a small CNN on scikit-learn's handwritten digits with Keras, on as many ranks as you start.

    commrun -np 2 python examples/keras_digits.py             two ranks on this machine
    python examples/keras_digits.py                           one process, without a launcher
    commrun -np 2 python examples/keras_digits.py --timeline trace.json      then open it in https://ui.perfetto.dev

Every rank takes its share of each batch, so the numbers learnt do not depend on how many ranks there are, but for
rounding. The lines that commlib needs are marked.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import commlib.keras as comm


def make_model():
    """Two convolutions and two dense layers."""
    return keras.Sequential([
        keras.Input((8, 8, 1)),
        layers.Conv2D(32, 3, padding="same", activation="relu"),
        layers.Conv2D(64, 3, padding="same", activation="relu"), layers.MaxPooling2D(), layers.Flatten(),
        layers.Dense(256, activation="relu"),
        layers.Dense(10),
    ])  # fmt: skip


def load(seed):
    """(train images, train labels), (held-out images, labels): 8 x 8 pixels, in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8, 1) / 16).astype("float32")
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    return (train_x, train_y), (test_x, test_y)


class Shares(keras.utils.PyDataset):
    """This rank's part of every batch; all ranks draw the same order, and the odd rest is left out."""

    def __init__(self, images, labels, batch_size, seed):
        super().__init__()
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.random = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return len(self.images) // self.batch_size

    def __getitem__(self, batch):
        mine = self.order[batch * self.batch_size : (batch + 1) * self.batch_size][comm.rank() :: comm.size()]
        return self.images[mine], self.labels[mine]

    def on_epoch_end(self):
        self.order = self.random.permutation(len(self.images))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="images per step, over all ranks")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeline", metavar="FILE", help="write what all ranks do as a Chrome trace")
    parser.add_argument("--no-overlap", action="store_true", help="wait for all communication in every step")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    comm.init()  # commlib, line 1
    if arguments.batch_size % comm.size():
        raise SystemExit(f"--batch-size {arguments.batch_size} does not divide among {comm.size()} ranks")
    keras.utils.set_random_seed(arguments.seed)
    (train_x, train_y), (test_x, test_y) = load(arguments.seed)
    model = make_model()
    optimizer = comm.DistributedOptimizer(keras.optimizers.AdamW(arguments.learning_rate))  # line 2
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    if not arguments.no_overlap:
        comm.enable_forward_overlap(model)  # and this, to hide communication behind the forward pass, too
    if arguments.timeline:
        comm.start_timeline(arguments.timeline)
    callbacks = [comm.callbacks.BroadcastGlobalVariablesCallback(0), comm.callbacks.MetricAverageCallback()]
    model.fit(Shares(train_x, train_y, arguments.batch_size, arguments.seed), epochs=arguments.epochs, callbacks=callbacks,
              verbose=1 if comm.rank() == 0 else 0)  # fmt: skip
    if arguments.timeline:
        comm.stop_timeline()
    if comm.rank() == 0:
        _, accuracy = model.evaluate(test_x, test_y, verbose=0)
        print(f"accuracy on {len(test_x)} held-out images: {accuracy:.1%}")
    comm.shutdown()


if __name__ == "__main__":
    main()
