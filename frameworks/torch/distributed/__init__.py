"""commlib as a backend of torch.distributed, for CPU tensors.

    import commlib.torch.distributed
    torch.distributed.init_process_group("commlib")

From here on DDP, FSDP2, DTensor and whatever else uses torch.distributed moves its bytes by commlib's transports, with the
algorithms that it selects. See docs/torch-distributed.md.
"""

import torch.distributed as dist

from commlib.torch.distributed.group import NAME, CommlibGroup
from commlib.torch.distributed.hook import DDPState, ddp_hook
from commlib.torch.distributed.rendezvous import SCHEME, meet
from commlib.torch.distributed.root import create
from commlib.torch.distributed.work import CollectiveTimeoutError, Work

dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu"])
dist.register_rendezvous_handler(SCHEME, meet)

__all__ = ["CollectiveTimeoutError", "CommlibGroup", "DDPState", "Work", "ddp_hook"]
