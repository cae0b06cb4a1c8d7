"""Tensors as the flat memory that travels, and back. What is copied here is copied because it does not lie in order.

c10d compares numbers of elements and no shapes, so everything is flat. Dtypes that the core does not add (float8, uint16)
can be moved: they travel as bytes; complex ones as pairs of reals, which can be summed, too.
"""

import torch

import commlib
from commlib.torch.tensors import DTYPE_NAMES, check_tensor, contiguous, real_view


def flat_of(tensor, what):
    """The memory of a dense CPU tensor as a flat tensor of a dtype that the core knows; the tensor's own where it lies in order.

    Raises:
        TypeError, ValueError: no tensor, not on the CPU, sparse.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        check_tensor(tensor, what)  # says what is wrong
    flat = real_view(contiguous(tensor)).reshape(-1)
    return flat if flat.dtype in DTYPE_NAMES else flat.view(torch.uint8)


def return_to(tensors, flats):
    """A function that brings flat memory back to the tensors that it is a copy of; None: it is their own."""
    copies = [(tensor, flat) for tensor, flat in zip(tensors, flats) if not _is_own(tensor, flat)]
    if not copies:
        return None

    def land(_):
        for tensor, flat in copies:
            put(tensor, flat)

    return land


def _is_own(tensor, flat):
    return tensor.is_contiguous() and tensor.data_ptr() == flat.data_ptr()


def put(tensor, flat):
    """Copies flat memory into a tensor; autograd's count of changes stays, as with other backends."""
    tensor.data.copy_(flat.view(tensor.dtype).view(tensor.shape))


def elements_of(tensor, dtype):
    """How many elements of the dtype that travels a tensor has."""
    return tensor.numel() * tensor.element_size() // dtype.itemsize


def deal(what, outputs, flat, counts=None):
    """Copies flat memory into tensors, one after the other.

    Args:
        what: the collective, for messages.
        outputs: as many as ranks; or one, which takes it all.
        flat: what came.
        counts: elements from each rank; None: they need no check.

    Raises:
        MismatchError: the outputs have not the sizes of what came.
    """
    sizes = [elements_of(output, flat.dtype) for output in outputs]
    if counts is not None:
        wanted = sizes if len(sizes) == len(counts) else [sizes[0] // len(counts)] * len(counts)
        check_counts(what, counts, wanted)
    elif sum(sizes) != len(flat):
        raise commlib.MismatchError(f"{what}: {len(flat)} elements came, and the output has {sum(sizes)}")
    first = 0
    for output, size in zip(outputs, sizes):
        put(output, flat[first:first + size])
        first += size


def check_counts(what, counts, wanted):
    """Raises MismatchError if a rank sent another number of elements than this one has room for."""
    for rank, (count, want) in enumerate(zip(counts, wanted)):
        if count != want:
            raise commlib.MismatchError(f"{what}: rank {rank} of the group sent {count} elements, and the output has room for "
                                        f"{want} of them: give outputs of the sizes that the ranks send")  # fmt: skip


def row_splits(what, tensor, flat, splits, size):
    """Rows for each rank as elements of the flat memory.

    Raises:
        ValueError: they are not as many as the tensor has.
    """
    rows = tensor.shape[0] if tensor.dim() else 1
    if not splits:
        if rows % size:
            raise ValueError(f"{what} cannot share {rows} rows evenly among {size} ranks: give split sizes")
        splits = [rows // size] * size
    if len(splits) != size or sum(splits) != rows or min(splits) < 0:
        raise ValueError(f"{what}: split sizes must be {size} numbers that add up to the {rows} rows, not {list(splits)}")
    width = len(flat) // rows if rows else 0
    return [split * width for split in splits]


def check_outputs(what, outputs, tensor):
    """Refuses outputs that are not dense CPU tensors of the input's dtype."""
    for output in outputs:
        flat_of(output[:0] if output.dim() else output, what)
        if output.dtype != tensor.dtype:
            raise ValueError(f"{what}: the input is {tensor.dtype} and an output is {output.dtype}: they must be the same")
