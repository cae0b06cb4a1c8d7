"""What moves the gradients of emulated training: commlib, or a peer that can stand in for it.

A mover has `array(count)`, float32 of zeros; `start(array, name, priority)`, which begins an all-reduce (sum, in place) and
returns a function that waits; `barrier()`; and `schedules`, the names of those that it can keep.
"""

import os


class Commlib:
    """The engine: every schedule."""

    schedules = ("none", "backward", "unordered", "ours")

    def __init__(self):
        import commlib

        self.communicator, self.sum = commlib.init(), commlib.Sum

    def array(self, count):
        import numpy

        return numpy.zeros(count, numpy.float32)

    def start(self, array, name, priority):
        return self.communicator.allreduce_async_(array, name=name, op=self.sum, priority=priority, overlapped=True).wait

    def barrier(self):
        self.communicator.barrier()


class Gloo:
    """torch.distributed's gloo: moves bytes in the background, in the order of submission."""

    schedules = ("none", "backward", "unordered")

    def __init__(self):
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.torch, self.dist = torch, dist
        dist.init_process_group("gloo", init_method=os.environ["BENCHMARK_STORE"], rank=int(os.environ["COMMLIB_RANK"]),
                                world_size=int(os.environ["COMMLIB_SIZE"]))  # fmt: skip

    def array(self, count):
        return self.torch.zeros(count)

    def start(self, array, name, priority):
        return self.dist.all_reduce(array, async_op=True).wait

    def barrier(self):
        self.dist.barrier()


MOVERS = {"commlib": Commlib, "gloo": Gloo}
