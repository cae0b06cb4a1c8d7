"""Ranks with different numbers of batches, and a process set of some of them.

    commrun -np 2 python examples/torch_uneven.py

Rank 0 has most of the rows. Who runs out of batches joins: he contributes zeros to what the others reduce, until all have joined.
The last to join has the newest weights, which everybody takes. A process set of the even ranks averages a number of its own.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import commlib.torch as comm


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    arguments = parser.parse_args()
    comm.init()
    even = comm.add_process_set(range(0, comm.size(), 2))
    torch.manual_seed(1)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x))
    held_out, rest = order[:360], order[360:]
    shares = [2 * (comm.size() - rank) for rank in range(comm.size())]  # the higher the rank, the fewer rows
    first = len(rest) * sum(shares[: comm.rank()]) // sum(shares)
    mine = rest[first : first + len(rest) * shares[comm.rank()] // sum(shares)]

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    optimizer = comm.DistributedOptimizer(optimizer, model=model)
    for _ in range(arguments.epochs):
        for rows in mine[torch.randperm(len(mine))].split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        last = comm.join()
        comm.broadcast_parameters(model.state_dict(), root_rank=last)
        comm.broadcast_optimizer_state(optimizer, root_rank=last)

    model.eval()
    accuracy = (model(x[held_out]).argmax(1) == y[held_out]).float().mean()
    if even.included():
        rows_each = comm.allreduce(torch.tensor(float(len(mine))), name="rows", process_set=even)
    if comm.rank() == 0:
        print(f"{comm.size()} ranks, {len(mine)} rows on rank 0, {rows_each:.0f} on an even rank in the mean, accuracy on held-out "
              f"images: {accuracy:.1%}")  # fmt: skip
    comm.shutdown()


if __name__ == "__main__":
    main()
