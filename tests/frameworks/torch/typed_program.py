"""A user's program, as mypy sees it: test_typing.py checks what it reveals. It is never run."""

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import reveal_type

import commlib
import commlib.torch as hvd
import commlib.torch.distributed as backend

# ---- the core

communicator = commlib.init(timeout_s=3.0, settings=commlib.Settings(transport="tcp"))
array = np.ones(3, dtype=np.float32)
reveal_type(commlib.allreduce(array, op=commlib.Sum))  # numpy.ndarray float32
reveal_type(commlib.allreduce_async_(array, name="x", priority=3).wait(1.0))  # numpy.ndarray float32
reveal_type(commlib.grouped_allreduce([array, array]))  # list ndarray
reveal_type(commlib.alltoall(array, [1, 2])[1])  # numpy.ndarray int32
reveal_type(communicator.group([0]).exchange(b"", name="x"))  # list bytes
reveal_type(commlib.Buffer(None, (3,), "float32", array, True).nbytes)  # int
reveal_type(communicator.stats()["operations"])  # int
reveal_type(commlib.run(len, ([1],), num_proc=2))  # list
commlib.barrier(timeout_s=2)
try:
    commlib.start_timeline("trace.json")
except commlib.PeerLostError as error:
    reveal_type(error.rank)  # int

# ---- PyTorch, in Horovod's words

hvd.init(process_sets=[hvd.ProcessSet([0, 1]), [1, 2]])
tensor = torch.ones(3)
reveal_type(hvd.rank())  # int
reveal_type(hvd.allreduce(tensor, op=hvd.Sum, name="x", compression=hvd.Compression.fp16))  # Tensor
reveal_type(hvd.synchronize(hvd.allreduce_async(tensor)))  # Tensor
reveal_type(hvd.grouped_allgather_async([tensor]).wait())  # list Tensor
reveal_type(hvd.alltoall(tensor))  # Tensor
reveal_type(hvd.alltoall(tensor, torch.tensor([1, 2])))  # tuple Tensor Tensor
reveal_type(hvd.broadcast_object({"epoch": 3}))  # dict str int
reveal_type(hvd.allgather_object("x"))  # list str
reveal_type(hvd.sparse_allreduce_async(tensor, "x", hvd.Average)())  # Tensor
model = torch.nn.Sequential(torch.nn.Linear(3, 3), hvd.SyncBatchNorm(3))
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
with optimizer.skip_synchronize():
    optimizer.step()
reveal_type(optimizer.report())  # dict str
torch.optim.lr_scheduler.StepLR(optimizer, 1)
some = hvd.add_process_set([0])
reveal_type(some.included())  # bool None
try:
    hvd.barrier(process_set=some)
except hvd.HorovodInternalError:
    hvd.shutdown()

# ---- torch.distributed

torch.distributed.init_process_group("commlib", pg_options=commlib.Settings())
parallel = DistributedDataParallel(model)
parallel.register_comm_hook(backend.DDPState(compression=hvd.Compression.bf16), backend.ddp_hook)
group = torch.distributed.group.WORLD
if isinstance(group, backend.CommlibGroup):
    reveal_type(group.communicator.algorithm("allreduce", 1000))  # str
