"""The types of the backend of torch.distributed; see the page above."""

from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from commlib import CommlibError, Communicator
from commlib.torch import Compressor

NAME: str

class CollectiveTimeoutError(CommlibError, TimeoutError): ...
class Work(dist.Work): ...

class CommlibGroup(dist.ProcessGroup):
    communicator: Communicator

class GradBucket(Protocol):
    """What torch.distributed.GradBucket has, which torch's own types do not name."""

    def index(self) -> int: ...
    def buffer(self) -> Tensor: ...
    def gradients(self) -> list[Tensor]: ...
    def parameters(self) -> list[Tensor]: ...
    def is_last(self) -> bool: ...
    def set_buffer(self, tensor: Tensor) -> None: ...

class DDPState:
    communicator: Communicator
    def __init__(self, process_group: dist.ProcessGroup | None = None, compression: type[Compressor] | Compressor | None = ...,
                 timeout: timedelta | None = None) -> None: ...

def ddp_hook(state: DDPState | None, bucket: GradBucket) -> Future[Tensor]: ...
