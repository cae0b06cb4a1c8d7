"""A communication hook for DistributedDataParallel: its buckets with commlib's priorities and wire formats.

    model = DistributedDataParallel(model)
    model.register_comm_hook(DDPState(compression=Compression.bf16), ddp_hook)

DDP fills its buckets from the last layer to the first, so the last bucket is what the next forward pass needs first: it
overtakes those that are still on their way.
"""

import torch.distributed as dist

import commlib
from commlib.compressor import checked_compression
from commlib.torch.compression import Compression
from commlib.torch.distributed.group import CommlibGroup
from commlib.torch.distributed.work import Attendant, Work
from commlib.torch.tensors import buffer_of


class DDPState:
    """What `ddp_hook` works with.

    Args:
        process_group: the model's process group; None: the default one. If it is none of commlib's, the hook moves the
            gradients by the default communicator of `commlib.init()`, whose ranks must be the same.
        compression: what travels: one of commlib.torch.Compression.
        timeout: how long an all-reduce may take, a timedelta; None: as the process group.

    Raises:
        ValueError: no compression; or neither a process group of commlib's nor a default communicator.
    """

    def __init__(self, process_group=None, compression=Compression.none, timeout=None):
        group = process_group or dist.group.WORLD
        self.compression = checked_compression(compression)
        if isinstance(group, CommlibGroup):
            self.communicator, self.attendant = group.communicator, group._root.attendant
            self.timeout_s = group._seconds(None, timeout)
            return
        self.communicator, self.attendant = commlib.communicator(), Attendant()
        self.communicator.on_close(self.attendant.dismiss)  # what is in flight then fails, and it has to tell that
        if self.communicator.size != group.size():
            raise ValueError(f"the model's process group has {group.size()} ranks, and commlib's {self.communicator.size}: give "
                             "DDP a process group of commlib's")  # fmt: skip
        self.timeout_s = timeout.total_seconds() if timeout else None


def ddp_hook(state, bucket):
    """Averages a bucket of gradients over all ranks; for `register_comm_hook(state, ddp_hook)`.

    Args:
        state: a DDPState; None: the default process group, which is commlib's, without compression.
        bucket: DDP's.

    Returns:
        A future of the bucket's tensor.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from commlib.torch.distributed import ddp_hook
        >>> dist.init_process_group("commlib", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
        >>> model.register_comm_hook(None, ddp_hook)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.module.weight.grad
        tensor([[1., 1.]])
        >>> dist.destroy_process_group()
    """
    state = DDPState() if state is None else state
    buffer = bucket.buffer()
    wire, ctx = state.compression.compress(buffer)
    # Contributions are divided before they are added: a sum of halves might not fit into 16 bits.
    handle = state.communicator.allreduce_async_(
        buffer_of(wire), op=commlib.Sum, prescale_factor=1 / state.communicator.size, priority=-bucket.index(), overlapped=True
    )  # fmt: skip

    def land(_):
        if wire is not buffer:
            buffer.copy_(state.compression.decompress(wire, ctx))

    return Work("DDP's all_reduce", state.attendant, [handle], buffer, land, state.timeout_s).get_future()
