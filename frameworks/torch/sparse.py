"""Sparse gradients, such as those of nn.Embedding(sparse=True): every rank's rows travel to all, and are added there.

A rank that used no row sends none. So all ranks must know which gradients are sparse: they agree on it when the first
step ends, before such a gradient is sent for the first time.
"""

import torch

import commlib
from commlib.ops import check_op
from commlib.process_sets import communicator_of, global_process_set
from commlib.torch.groups import Group
from commlib.torch.tensors import buffer_of, check_tensor, tensor_of


class SparseSet:
    """Which gradients of an exchange are sparse, as far as all ranks know.

    Args:
        as_dense: none of them: they are made dense.

    Attributes:
        dims: number of a gradient -> its sparse dimensions.
        is_agreed: False: gradients came that the ranks have not spoken about.
    """

    def __init__(self, as_dense):
        self.dims = {}
        self.is_agreed = False
        self._as_dense = as_dense

    def check_dense(self, gradient):
        """Refuses a sparse gradient that was dense when the ranks agreed.

        Raises:
            ValueError: it is to stay sparse.
        """
        if not self._as_dense:
            raise ValueError(
                f"the gradient of {gradient.name!r} is sparse and was dense before: pass sparse_as_dense=True to "
                "DistributedOptimizer"
            )

    def found(self, gradients):
        """What this rank has to tell the others: a (number, sparse dimensions) pair for each sparse gradient."""
        if self._as_dense:
            return []
        tensors = [(gradient.number, gradient.parameter.grad) for gradient in gradients]
        return [(number, tensor.sparse_dim()) for number, tensor in tensors if tensor is not None and tensor.is_sparse]

    def agree(self, told):
        """Takes over what any rank noticed; `told` is every rank's `found`. Returns the new numbers."""
        new = {number: dim for one in told for number, dim in one if number not in self.dims}
        self.dims.update(new)
        self.is_agreed = True
        return sorted(new)


class SparseGroup(Group):
    """One sparse gradient."""

    __slots__ = ("sparse_dim",)

    def __init__(self, gradients, prefix, options, sparse_dim):
        super().__init__(gradients, prefix, options)
        self.sparse_dim = sparse_dim

    def submit(self, communicator):
        """Sends this rank's rows."""
        tensor = self.tensors[0]
        if tensor is None:
            tensor = self.parameters[0].new_zeros(()).expand(self.parameters[0].shape)
            tensor = torch.sparse_coo_tensor(
                torch.empty(self.sparse_dim, 0, dtype=torch.int64), tensor.new_empty(0, *tensor.shape[self.sparse_dim :]),
                tensor.shape,
            )  # fmt: skip
        elif not tensor.is_sparse:
            tensor = tensor.detach().to_sparse(self.sparse_dim)
        return SparseReduction(communicator, tensor.coalesce(), **self.options)

    def scatter(self, is_wanted):
        """The sum of all ranks' rows, or None where no rank had any and is_wanted(gradient) is false."""
        self.tensors = [None if self.absent and not is_wanted(self.gradients[0]) else self.handle.result]

    lend = scatter

    def take_back(self):
        """The result is whoever's it was given to."""
        self.tensors = None


class SparseReduction:
    """A sum or an average over ranks of sparse tensors, in flight: two gatherings, of indices and of values."""

    def __init__(self, communicator, tensor, *, name, op, priority=0, prescale_factor=1.0, postscale_factor=1.0,
                 overlapped=False):  # fmt: skip
        if op not in (commlib.Average, commlib.Sum):
            raise ValueError(f"a sparse gradient cannot be reduced with op={op!r}: use Average or Sum, or sparse_as_dense=True")
        check_tensor(tensor.values(), f"the sparse gradient {name!r}")
        self.result = None
        self._shape = tensor.shape
        self._factor = prescale_factor * postscale_factor / (communicator.size if op is commlib.Average else 1)
        self._handles = [
            communicator.allgather_async(buffer_of(part), name=name and f"{name} {what}", priority=priority)
            for what, part in (("indices", tensor.indices().t().contiguous()), ("values", tensor.values().contiguous()))
        ]

    @property
    def times(self):
        """As for other handles: of the values."""
        return self._handles[1].times

    def done(self):
        """True if the operation is done, well or not."""
        return all(handle.done() for handle in self._handles)

    def wait(self, timeout_s=None):
        """Waits for both gatherings and adds up what came; ranks in order, so all have the same bits."""
        indices, values = (tensor_of(handle.wait(timeout_s)) for handle in self._handles)
        if self.result is None:
            self.result = torch.sparse_coo_tensor(indices.t(), values * self._factor, self._shape).coalesce()
        return self.result


def sparse_allreduce_async(tensor, name, op, process_set=global_process_set):
    """Reduces a sparse tensor: the rows of all ranks are gathered, and added up.

    Args:
        tensor: a sparse COO tensor on the CPU, of the same shape and dtype on all ranks, with any number of rows.
        name: matches the operation between ranks; None: by sequence number.
        op: Average (also if None) or Sum.
        process_set: the ranks that take part.

    Returns:
        A function without arguments that waits and returns the sparse result, coalesced.

    Raises:
        ValueError: another op, not a sparse tensor, or a name that is in flight.

    Example:
        >>> import torch, commlib.torch as comm
        >>> comm.init()
        >>> handle = comm.sparse_allreduce_async(torch.eye(2).to_sparse(), name="rows", op=comm.Sum)
        >>> handle().to_dense()
        tensor([[1., 0.],
                [0., 1.]])
        >>> comm.shutdown()
    """
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.sparse_coo:
        raise ValueError(f"sparse_allreduce_async needs a sparse COO tensor, not {getattr(tensor, 'layout', type(tensor))}")
    return SparseReduction(communicator_of(process_set), tensor.detach().coalesce(), name=name, op=check_op(op)).wait
