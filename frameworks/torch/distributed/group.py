"""commlib as a process group of torch.distributed: every collective of c10d in terms of the core's.

Work of one group runs on its own communicator of the core, which lives on its root's engine (root.py). The older and the
newer names of a collective, as torch 2.4 and 2.13 have them, are one method.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

import commlib
from commlib.torch.distributed.memory import check_counts, check_outputs, deal, flat_of, put, return_to, row_splits
from commlib.torch.distributed.points import FromAnybody, Points
from commlib.torch.distributed.reductions import check_reducible, reduced_bitwise, reduction_of
from commlib.torch.distributed.work import Work
from commlib.torch.tensors import buffer_of, contiguous, tensor_of

NAME = "commlib"


class CommlibGroup(dist.ProcessGroup):
    """A process group whose bytes commlib moves; `init_process_group("commlib")` and `new_group` make them.

    Args:
        communicator: the core's communicator of its ranks.
        root: whose engine it lives on.
        timeout: how long an operation may take, a timedelta.

    Attributes:
        communicator: the core's, for what c10d has no word for: `communicator.algorithm(...)`, `start_timeline`, `stats()`.
    """

    supports_coalescing = supports_splitting = supports_time_estimate = False  # what torch asks of a backend

    def __init__(self, communicator, root, timeout):
        super().__init__(communicator.rank, communicator.size)
        self.communicator = communicator
        self._root = root
        self._timeout = timeout
        self._points = Points(communicator)
        self._group_name = self._group_desc = ""

    # ---- all-reduce, reduce

    def allreduce(self, tensors, opts=None, timeout=None):
        """Reduces a tensor over all ranks, in place."""
        return self._reduce("all_reduce", _listed(tensors), opts, timeout)

    def allreduce_coalesced(self, tensors, opts=None):
        """As allreduce of each tensor of a list; they complete together."""
        return self._reduce("all_reduce_coalesced", _listed(tensors), opts)

    def reduce(self, tensors, opts=None, op=None, timeout=None):
        """Reduces to one rank; the other ranks' tensors stay as they are."""
        (tensor,) = _listed(tensors)
        root = self._checked_root(opts)
        copy = tensor if self.rank() == root else contiguous(tensor).clone()
        return self._reduce("reduce", [copy], op if type(opts) is int else opts, timeout, result=[tensor])

    def _reduce(self, what, tensors, opts, timeout=None, result=None, after=None):
        op = _op_of(opts)
        if any(tensor.is_sparse for tensor in tensors):
            return self._reduce_sparse(what, tensors, op, opts)
        for tensor in tensors:
            check_reducible(op, tensor, what)
        flats = [flat_of(tensor, what) for tensor in tensors]
        native, factor = reduction_of(op)
        if native is None:
            handles = [self.communicator.allgather_async(buffer_of(flat)) for flat in flats]
        else:
            handles = [self.communicator.allreduce_async_(buffer_of(flat), op=native, prescale_factor=factor,
                                                          overlapped=len(flats) > 1) for flat in flats]  # fmt: skip
        bring_back = return_to(tensors, flats)

        def land(results):
            for tensor, gathered in zip(tensors, results if native is None else ()):
                put(tensor, reduced_bitwise(op, tensor_of(gathered).view(self.size(), -1)))
            if native is not None and bring_back is not None:
                bring_back(results)
            if after is not None:
                after()

        return self._work(what, handles, result or tensors, land, opts, timeout)

    def _reduce_sparse(self, what, tensors, op, opts):
        """Sums sparse tensors: their indices and values are gathered, and added where they meet."""
        native, factor = reduction_of(op)
        if native not in (commlib.Sum, commlib.Average) or factor != 1.0:
            raise ValueError(f"{what}: sparse tensors can be summed and averaged only")
        handles = []
        for tensor in tensors:
            part = tensor.detach().coalesce()
            handles += [self.communicator.allgather_async(buffer_of(memory.contiguous()))
                        for memory in (part.indices().t(), part.values())]  # fmt: skip

        def land(results):
            share = self.size() if native is commlib.Average else 1
            for tensor, indices, values in zip(tensors, results[0::2], results[1::2]):
                gathered = torch.sparse_coo_tensor(tensor_of(indices).t(), tensor_of(values) / share, tensor.shape)
                with torch.no_grad():
                    tensor.copy_(gathered.coalesce())  # .data of a sparse tensor would be another

        return self._work(what, handles, tensors, land, opts)

    # ---- broadcast, barrier

    def broadcast(self, tensors, opts=None, timeout=None):
        """Overwrites a tensor with the root's."""
        (tensor,) = _listed(tensors)
        root, flat = self._checked_root(opts), flat_of(tensor, "broadcast")
        handle = self.communicator.broadcast_async_(buffer_of(flat), root)
        return self._work("broadcast", [handle], [tensor], return_to([tensor], [flat]), opts, timeout)

    def barrier(self, opts=None, timeout=None):
        """Done when all ranks have called it."""
        return self._work("barrier", [self.communicator.barrier_async()], [], None, opts, timeout)

    # ---- all-gather

    def allgather(self, output_tensors, input_tensors, opts=None):
        """Every rank's tensor, one for each in the list of outputs; sizes may differ from rank to rank."""
        return self._gather_all("all_gather", [_first_list(output_tensors)], _listed(input_tensors), opts)

    def allgather_coalesced(self, output_lists, input_list, opts=None):
        """As allgather of each tensor of a list: output_lists[r][i] is rank r's input_list[i]."""
        return self._gather_all("all_gather_coalesced", [list(parts) for parts in zip(*output_lists)], input_list, opts)

    def all_gather_single(self, output, tensor, opts=None):
        """Every rank's tensor, joined in one."""
        return self._gather_all("all_gather_single", [[output]], [tensor], opts)

    def all_gather_single_coalesced(self, outputs, inputs, opts=None):
        """As all_gather_single of each tensor of a list."""
        return self._gather_all("all_gather_single_coalesced", [[output] for output in outputs], inputs, opts)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def _gather_all(self, what, outputs, inputs, opts):
        for parts, tensor in zip(outputs, inputs):
            check_outputs(what, parts, tensor)
        handles = [self.communicator.allgather_async(buffer_of(flat_of(tensor, what))) for tensor in inputs]

        def land(results):
            for parts, handle, gathered in zip(outputs, handles, results):
                deal(what, parts, tensor_of(gathered), handle.result_memory()[2])

        return self._work(what, handles, [part for parts in outputs for part in parts], land, opts)

    # ---- reduce-scatter

    def reduce_scatter(self, output_tensors, input_tensors, opts=None, timeout=None):
        """Reduces a list of tensors, one for each rank, of which every rank gets its own."""
        outputs, inputs = _listed(output_tensors), _first_list(input_tensors)
        if len(inputs) != self.size():
            raise ValueError(f"reduce_scatter needs a tensor for each of {self.size()} ranks, not {len(inputs)}")
        if len({tensor.numel() for tensor in inputs}) > 1:
            return self._reduce_scatter_uneven(outputs[0], inputs, opts, timeout)
        joined = torch.cat([contiguous(tensor).reshape(-1) for tensor in inputs])
        return self._reduce_scatter("reduce_scatter", outputs, [joined], opts, timeout)

    def reduce_scatter_single(self, output, tensor, opts=None):
        """Reduces a tensor, of which every rank gets an equal part."""
        return self._reduce_scatter("reduce_scatter_single", [output], [tensor], opts)

    def reduce_scatter_single_coalesced(self, outputs, inputs, opts=None):
        """As reduce_scatter_single of each tensor of a list."""
        return self._reduce_scatter("reduce_scatter_single_coalesced", outputs, inputs, opts)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _reduce_scatter(self, what, outputs, inputs, opts, timeout=None):
        op = _op_of(opts)
        for output, tensor in zip(outputs, inputs):
            check_reducible(op, tensor, what)
            check_outputs(what, [output], tensor)
            if tensor.numel() != output.numel() * self.size():
                raise ValueError(f"{what}: the input has {tensor.numel()} elements, and {self.size()} ranks with outputs of "
                                 f"{output.numel()} need {output.numel() * self.size()}")  # fmt: skip
        buffers = [buffer_of(flat_of(tensor, what)) for tensor in inputs]
        native, factor = reduction_of(op)
        if native is None:
            handles = [self.communicator.allgather_async(buffer) for buffer in buffers]
        else:
            handles = [self.communicator.reducescatter_async(buffer, op=native, prescale_factor=factor) for buffer in buffers]

        def land(results):
            for output, result in zip(outputs, results):
                part = tensor_of(result)
                if native is None:
                    part = reduced_bitwise(op, part.view(self.size(), self.size(), -1)[:, self.rank()])
                deal(what, [output], part)

        return self._work(what, handles, outputs, land, opts, timeout)

    def _reduce_scatter_uneven(self, output, inputs, opts, timeout):
        """Parts of different sizes: all are reduced everywhere, and each rank keeps its own."""
        copies = [contiguous(tensor).clone() for tensor in inputs]
        mine = copies[self.rank()]
        check_outputs("reduce_scatter", [output], mine)
        if mine.numel() != output.numel():
            raise ValueError(f"reduce_scatter: this rank's part has {mine.numel()} elements, and its output {output.numel()}")
        return self._reduce("reduce_scatter", copies, opts, timeout, result=[output],
                            after=lambda: output.data.copy_(mine.view(output.shape)))  # fmt: skip

    # ---- gather, scatter, all-to-all

    def gather(self, output_tensors, input_tensors, opts=None, timeout=None):
        """Every rank's tensor, on one rank."""
        root = self._checked_root(opts)
        (tensor,) = _listed(input_tensors)
        outputs = _first_list(output_tensors) if self.rank() == root else []
        if self.rank() == root and len(outputs) != self.size():
            raise ValueError(f"gather needs an output for each of {self.size()} ranks, not {len(outputs)}")
        check_outputs("gather", outputs, tensor)
        flat = flat_of(tensor, "gather")
        splits = [len(flat) if rank == root else 0 for rank in range(self.size())]
        return self._all_to_all("gather", outputs, flat, splits, opts, timeout)

    def scatter(self, output_tensors, input_tensors, opts=None, timeout=None):
        """One rank's tensors, one to each rank."""
        root = self._checked_root(opts)
        outputs = _listed(output_tensors)
        inputs = _first_list(input_tensors) if self.rank() == root else []
        if self.rank() == root and len(inputs) != self.size():
            raise ValueError(f"scatter needs a tensor for each of {self.size()} ranks, not {len(inputs)}")
        flats = [flat_of(tensor, "scatter") for tensor in inputs]
        for tensor in inputs:
            check_outputs("scatter", outputs, tensor)
        joined = torch.cat(flats) if flats else flat_of(outputs[0], "scatter")[:0]
        splits = [len(flat) for flat in flats] or [0] * self.size()
        wanted = [len(flat_of(outputs[0], "scatter")) if rank == root else 0 for rank in range(self.size())]
        return self._all_to_all("scatter", outputs, joined, splits, opts, timeout, wanted)

    def alltoall(self, output_tensors, input_tensors, opts=None, timeout=None):
        """A tensor to each rank, and one from each."""
        flats = [flat_of(tensor, "all_to_all") for tensor in input_tensors]
        check_outputs("all_to_all", output_tensors, input_tensors[0])
        return self._all_to_all("all_to_all", output_tensors, torch.cat(flats), [len(flat) for flat in flats], opts, timeout)

    def all_to_all_single(self, output, tensor, output_split_sizes, input_split_sizes, opts=None, timeout=None):
        """Rows of a tensor to each rank, and rows from each, joined."""
        what = "all_to_all_single"
        check_outputs(what, [output], tensor)
        flat = flat_of(tensor, what)
        sent = row_splits(what, tensor, flat, input_split_sizes, self.size())
        wanted = row_splits(what, output, flat_of(output, what), output_split_sizes, self.size())
        return self._all_to_all(what, [output], flat, sent, opts, timeout, wanted)

    alltoall_base = all_to_all_single

    def _all_to_all(self, what, outputs, flat, splits, opts, timeout=None, wanted=None):
        handle = self.communicator.alltoall_async(buffer_of(flat), splits)

        def land(results):
            received, counts = results[0]
            if wanted is not None:
                check_counts(what, counts, wanted)
            if outputs:
                deal(what, outputs, tensor_of(received), counts if wanted is None else None)

        return self._work(what, [handle], outputs, land, opts, timeout)

    # ---- send, receive

    def send(self, tensors, receiver, tag):
        """Sends a tensor; done when it has left."""
        (tensor,) = _listed(tensors)
        self._check_peer(receiver, "send to")
        handle = self._points.send(buffer_of(flat_of(tensor, "send")), receiver, tag)
        return self._work(f"send to rank {receiver} with tag {tag}", [handle], [tensor])

    def recv(self, tensors, sender, tag):
        """Receives a tensor."""
        (tensor,) = _listed(tensors)
        self._check_peer(sender, "receive from")
        flat = flat_of(tensor, "recv")
        handle = self._points.receive(buffer_of(flat), sender, tag)
        return self._work(f"recv from rank {sender} with tag {tag}", [handle], [tensor], return_to([tensor], [flat]),
                          source=sender)  # fmt: skip

    def recv_anysource(self, tensors, tag):
        """Receives from whoever sends first; the Work's `source_rank` says who it was."""
        (tensor,) = _listed(tensors)
        flat = flat_of(tensor, "recv")
        return FromAnybody(self._points, buffer_of(flat), tag, f"recv from any rank with tag {tag}", self._root.attendant,
                           [tensor], return_to([tensor], [flat]), self._seconds(None, None))  # fmt: skip

    # ---- what torch asks of a group

    def getBackendName(self):  # noqa: N802, C++ calls it so
        """What it was asked for by."""
        return NAME

    name = _get_backend_name = getBackendName

    def getGroupName(self):  # noqa: N802
        """What torch.distributed has called it."""
        return self._group_name

    group_name = pg_name = property(getGroupName)

    def setGroupName(self, name):  # noqa: N802
        """Torch.distributed names it, once it is made."""
        self._group_name = name

    _set_group_name = setGroupName

    def getGroupDesc(self):  # noqa: N802
        """What torch.distributed says that it is for."""
        return self._group_desc

    group_desc = property(getGroupDesc)

    def setGroupDesc(self, text):  # noqa: N802
        """As setGroupName."""
        self._group_desc = text

    _set_group_desc = setGroupDesc

    def set_timeout(self, timeout):
        """How long operations may take that begin from now on, a timedelta."""
        self._timeout = timeout

    _set_default_timeout = set_timeout

    _device_types = property(lambda self: [torch.device("cpu")])

    def _get_backend(self, device):
        """One object is group and backend."""
        return self

    def supports_tensor_alloc(self, device):
        """False: torch allocates."""
        return False

    def shutdown(self):
        """Ends the group, with the default one all that live on its engine; what is in flight fails."""
        self._root.leave(self)

    abort = shutdown

    def __repr__(self):
        return f"CommlibGroup(rank={self.rank()}, size={self.size()})"

    # ---- inside

    def _work(self, what, handles, tensors, land=None, opts=None, timeout=None, source=-1):
        return Work(what, self._root.attendant, handles, tensors, land, self._seconds(opts, timeout), source)

    def _seconds(self, opts, timeout):
        timeout = timeout or getattr(opts, "timeout", None)
        if not isinstance(timeout, timedelta) or timeout <= timedelta(0):  # -1 ms: not given
            timeout = self._timeout
        return timeout.total_seconds()

    def _checked_root(self, opts):
        root = opts if type(opts) is int else opts.rootRank
        if not 0 <= root < self.size():
            raise ValueError(f"the root must be a rank of the group, in [0, {self.size()}), not {root}")
        return root

    def _check_peer(self, rank, what):
        if not 0 <= rank < self.size() or rank == self.rank():
            raise ValueError(f"rank {self.rank()} cannot {what} rank {rank}: it must be another rank in [0, {self.size()})")


def _listed(tensors):
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _first_list(tensors):
    """c10d wraps lists of tensors in a list, of which there is one on the CPU; its short forms do not."""
    return list(tensors) if not tensors or isinstance(tensors[0], torch.Tensor) else list(tensors[0])


def _op_of(opts):
    """The reduction that options, or the short form's argument, ask for; a sum if they say nothing."""
    return dist.ReduceOp.SUM if opts is None else getattr(opts, "reduceOp", opts)
