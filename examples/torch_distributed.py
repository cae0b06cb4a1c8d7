"""Trains a small network on scikit-learn's handwritten digits with PyTorch's own DDP or FSDP2, whose bytes commlib moves.

    torchrun --standalone --nproc-per-node 2 examples/torch_distributed.py      DistributedDataParallel
    torchrun --standalone --nproc-per-node 2 examples/torch_distributed.py --fsdp      FSDP2: each rank keeps half of it
    torchrun --standalone --nproc-per-node 2 examples/torch_distributed.py --backend gloo      the same by gloo, to compare
    commrun -np 2 python examples/torch_distributed.py                    without torchrun; also under mpirun and srun

The lines that commlib needs are marked; the rest is PyTorch's.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import commlib.torch as comm
from commlib.torch.distributed import DDPState, ddp_hook  # commlib, line 1: the import is what torch needs to know of it


def make_model():
    """A small perceptron."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def load(seed):
    """Datasets to train with and to test with: 64 pixels in [0, 1], and the digit."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels.astype("float32") / 16, labels, test_size=0.2, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = map(torch.as_tensor, parts)
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def distributed(model, arguments):
    """The model as PyTorch trains it on all ranks."""
    if arguments.fsdp:
        from torch.distributed.fsdp import fully_shard  # newer torch only

        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
        return model
    model = DistributedDataParallel(model)
    if arguments.backend == "commlib":
        compression = getattr(comm.Compression, arguments.compression)
        model.register_comm_hook(DDPState(compression=compression), ddp_hook)  # not needed: priorities, and 16 bits
    return model


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="commlib")
    parser.add_argument("--fsdp", action="store_true", help="shard weights, gradients and optimizer state")
    parser.add_argument("--compression", choices=("none", "fp16", "bf16"), default="none", help="what gradients travel as")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32, help="images per step and rank")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    method = "env://" if "MASTER_ADDR" in os.environ else "commlib://"  # torchrun's store, or none
    dist.init_process_group(arguments.backend, init_method=method)  # commlib, line 2
    torch.manual_seed(arguments.seed)
    train, test = load(arguments.seed)
    model = distributed(make_model(), arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    sampler = DistributedSampler(train, seed=arguments.seed)
    loader = DataLoader(train, arguments.batch_size, sampler=sampler)
    begin_s = time.monotonic()
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    elapsed_s = time.monotonic() - begin_s
    images, labels = test.tensors
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean()  # on every rank: FSDP2's forward is a collective
    if dist.get_rank() == 0:
        images_per_s = arguments.epochs * len(train) / elapsed_s
        print(f"{dist.get_world_size()} ranks by {dist.get_backend()}, {images_per_s:.0f} images/s")
        print(f"accuracy on {len(test)} held-out images: {float(right):.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
