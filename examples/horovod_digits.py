"""A script for Horovod as its users write them, with no word of commlib: it trains on scikit-learn's handwritten digits.

    commrun -np 2 python -m commlib.horovod examples/horovod_digits.py
    commrun -np 2 python -m commlib.horovod examples/horovod_digits.py --fp16-allreduce --batches-per-allreduce 2

Where Horovod is installed, `horovodrun -np 2 python examples/horovod_digits.py` runs the same file.
"""

import argparse

import horovod.torch as hvd
import torch
import torch.utils.data
import torch.utils.data.distributed
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn


def metric_average(value, name):
    """The mean over ranks of a number that each rank has."""
    return hvd.allreduce(torch.tensor(value), name=name).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.05, help="for one rank and one batch per step")
    parser.add_argument("--fp16-allreduce", action="store_true", help="gradients travel in 16 bits")
    parser.add_argument("--batches-per-allreduce", type=int, default=1, help="accumulate gradients over so many batches")
    arguments = parser.parse_args()

    hvd.init()
    torch.manual_seed(42)
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels.astype("float32") / 16, labels, test_size=0.2, random_state=1, stratify=labels)
    train_x, test_x, train_y, test_y = map(torch.as_tensor, parts)
    train = torch.utils.data.TensorDataset(train_x, train_y)
    test = torch.utils.data.TensorDataset(test_x, test_y)
    train_sampler = torch.utils.data.distributed.DistributedSampler(train, num_replicas=hvd.size(), rank=hvd.rank())
    test_sampler = torch.utils.data.distributed.DistributedSampler(test, num_replicas=hvd.size(), rank=hvd.rank())
    batch = arguments.batch_size * arguments.batches_per_allreduce
    train_loader = torch.utils.data.DataLoader(train, batch_size=batch, sampler=train_sampler)
    test_loader = torch.utils.data.DataLoader(test, batch_size=64, sampler=test_sampler)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    # As many ranks and batches as go into a step, as much larger is the step.
    scale = hvd.size() * arguments.batches_per_allreduce
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr * scale, momentum=0.5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), op=hvd.Average,
        compression=hvd.Compression.fp16 if arguments.fp16_allreduce else hvd.Compression.none,
        backward_passes_per_step=arguments.batches_per_allreduce,
    )  # fmt: skip

    for epoch in range(arguments.epochs):
        model.train()
        train_sampler.set_epoch(epoch)
        for images, digits in train_loader:
            optimizer.zero_grad()
            for place in range(arguments.batches_per_allreduce):  # one piece of the batch after the other
                some, wanted = images[place :: arguments.batches_per_allreduce], digits[place :: arguments.batches_per_allreduce]
                loss = nn.functional.cross_entropy(model(some), wanted) / arguments.batches_per_allreduce
                loss.backward()
            optimizer.step()

    model.eval()
    right = [float((model(images).argmax(1) == digits).float().mean()) for images, digits in test_loader]
    accuracy = metric_average(sum(right) / len(right), "accuracy")
    if hvd.rank() == 0:
        print(f"{hvd.size()} ranks, accuracy on held-out images: {accuracy:.1%}")
    hvd.shutdown()


if __name__ == "__main__":
    main()
