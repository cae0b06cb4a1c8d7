"""The job's secret under torchrun: it lies in the store that torchrun's agents share.

torchrun gives its processes no secret, but all of them reach that store, at MASTER_ADDR and MASTER_PORT. It asks nobody who he
is: a secret that lies there keeps out who does not reach that port, and no more (docs/security.md).
"""

import functools
from datetime import timedelta

from commlib.secret import new_secret

_NAME = "commlib"


def job_secret(placement):
    """What rank 0 has put into torchrun's store, \"\" under other launchers.

    Raises:
        RuntimeError: the store cannot be reached in time.
    """
    if placement.launcher != "torchrun":
        return ""
    return _secret_of(placement.job, placement.rank, placement.size, placement.start_timeout_s)


@functools.lru_cache(maxsize=1)  # a second init() of the job finds the store gone, where rank 0 served it
def _secret_of(job, rank, size, timeout_s):
    import torch.distributed as distributed  # some builds of torch have none; they can still run on one host

    timeout = timedelta(seconds=timeout_s)
    store = next(distributed.rendezvous("env://", rank, size, timeout=timeout))[0]
    store = distributed.PrefixStore(_NAME, store)
    store.set_timeout(timeout)
    if rank == 0:
        store.set(f"{job}/secret", new_secret())
    secret = store.get(f"{job}/secret").decode()
    if store.add(f"{job}/read", 1) == size:
        store.set(f"{job}/all have read", "")
    if rank == 0:
        store.get(f"{job}/all have read")  # without an agent this process serves the store: it must not go before
    return secret
