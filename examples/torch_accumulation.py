"""Gradient accumulation and mixed precision: forward and backward in bfloat16, updates in fp32.

    commrun -np 2 python examples/torch_accumulation.py

Each step adds the gradients of several small batches before anything is sent. Autocast computes in bfloat16 where that is safe, and
gradients travel in bfloat16, too.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import commlib.torch as comm


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--accumulate", type=int, default=4, help="batches of 16 in one step")
    arguments = parser.parse_args()
    comm.init()
    torch.manual_seed(1)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x))
    held_out, mine = order[:360], order[360:][comm.rank() :: comm.size()]  # every rank has rows of its own

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = comm.DistributedOptimizer(optimizer, model=model, backward_passes_per_step=arguments.accumulate,
                                          compression=comm.Compression.bf16)  # fmt: skip
    generator = torch.Generator().manual_seed(comm.rank())
    for _ in range(arguments.steps):
        optimizer.zero_grad()
        for _ in range(arguments.accumulate):
            rows = mine[torch.randint(len(mine), (16,), generator=generator)]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            (loss / arguments.accumulate).backward()
        optimizer.step()

    model.eval()
    accuracy = (model(x[held_out]).argmax(1) == y[held_out]).float().mean()
    if comm.rank() == 0:
        print(f"{comm.size()} ranks, {arguments.accumulate} batches a step, accuracy on held-out images: {accuracy:.1%}")
    comm.shutdown()


if __name__ == "__main__":
    main()
