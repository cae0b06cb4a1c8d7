"""Horovod's names that stand for what commlib.torch does not do yet; each says so where it is used."""


def join(device=-1):
    """Not there yet.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "join() is not supported yet: give every rank equally many batches, for example with "
        "torch.utils.data.DistributedSampler (which pads) or DataLoader(drop_last=True)"
    )
