"""Ranks with different numbers of batches: Horovod's join."""

import commlib


def join(device=-1):
    """This rank has no more batches: returns when all ranks have called it, and takes part in their all-reduces until then.

    It contributes zeros, and averages are divided by the number of all ranks. Broadcast, allgather, alltoall, reducescatter
    and barrier fail on every rank meanwhile. Optimizers go on; afterwards they find groups anew. A rank that joined early
    has made fewer steps, so its weights are older: share those of the rank that joined last.

    Args:
        device: for Horovod's sake; there are CPU tensors only.

    Returns:
        The last rank that joined.

    Raises:
        CommlibError: a rank was lost, or shut down without joining.

    Example:
        >>> import torch, commlib.torch as comm
        >>> comm.init()
        >>> model = torch.nn.Linear(2, 1)
        >>> last = comm.join()
        >>> comm.broadcast_parameters(model.state_dict(), root_rank=last)
        >>> comm.shutdown()
    """
    return commlib.join()
