"""Horovod's question about gloo, which is torch's own; the others are answered by commlib.built."""

import torch.distributed


def gloo_built():
    """Whether gloo can be used: it is torch's own."""
    return torch.distributed.is_available() and torch.distributed.is_gloo_available()
