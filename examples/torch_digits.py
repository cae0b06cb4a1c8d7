"""Trains a small CNN on scikit-learn's handwritten digits, on as many ranks as you start.

    commrun -np 2 python examples/torch_digits.py             two ranks on this machine
    python examples/torch_digits.py                           one process, without a launcher
    commrun -np 2 python examples/torch_digits.py --timeline trace.json      then open it in https://ui.perfetto.dev

Every rank takes its share of each batch, so the numbers learnt do not depend on how many ranks there are, but for
rounding. The two lines that commlib needs are marked.
"""

import argparse
import os
import time

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import commlib.torch as comm


def make_model():
    """Two convolutions and two linear layers, in the order in which forward uses them."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * 4 * 4, 256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip


def load(seed):
    """(train images, train labels), (held-out images, labels): 8 x 8 pixels, in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    parts = train_test_split(images.numpy(), labels, test_size=0.2, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = map(torch.as_tensor, parts)
    return (train_x, train_y), (test_x, test_y)


def shares(nimages, batch_size, generator):
    """This rank's indices of each batch of one epoch; all ranks draw the same order, and the odd rest is left out."""
    order = torch.randperm(nimages, generator=generator)
    for first in range(0, nimages - batch_size + 1, batch_size):
        yield order[first : first + batch_size][comm.rank() :: comm.size()]


def accuracy(model, images, labels):
    """The part of the images that the model names right."""
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="images per step, over all ranks")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeline", metavar="FILE", help="write what all ranks do as a Chrome trace")
    parser.add_argument("--no-overlap", action="store_true", help="wait for all communication in step()")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    comm.init()  # commlib, line 1
    if arguments.batch_size % comm.size():
        raise SystemExit(f"--batch-size {arguments.batch_size} does not divide among {comm.size()} ranks")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.local_size()))
    torch.manual_seed(arguments.seed)
    (train_x, train_y), (test_x, test_y) = load(arguments.seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    optimizer = comm.DistributedOptimizer(optimizer, model=model, overlap_forward=not arguments.no_overlap)  # line 2
    if arguments.timeline:
        comm.start_timeline(arguments.timeline)
        comm.trace_layers(model)

    generator = torch.Generator().manual_seed(arguments.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    nsteps = len(train_x) // arguments.batch_size
    begin_s = time.monotonic()
    with Progress(*columns, disable=comm.rank() != 0) as progress:
        for epoch in range(arguments.epochs):
            bar = progress.add_task(f"epoch {epoch + 1}/{arguments.epochs}", total=nsteps)
            model.train()
            for share in shares(len(train_x), arguments.batch_size, generator):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(train_x[share]), train_y[share])
                loss.backward()
                optimizer.step()
                progress.advance(bar)
            mean_loss = comm.allreduce(loss.detach(), name="loss").item()
            progress.update(bar, description=f"epoch {epoch + 1}/{arguments.epochs}  loss {mean_loss:.3f}")
    optimizer.synchronize()
    elapsed_s = time.monotonic() - begin_s

    if arguments.timeline:
        comm.stop_timeline()
    if comm.rank() == 0:
        images_per_s = arguments.epochs * nsteps * arguments.batch_size / elapsed_s
        print(f"{comm.size()} ranks, {images_per_s:.0f} images/s")
        print(f"accuracy on {len(test_x)} held-out images: {accuracy(model, test_x, test_y):.1%}")
        print(optimizer.report())
    comm.shutdown()


if __name__ == "__main__":
    main()
