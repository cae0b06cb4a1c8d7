"""How a hard case is judged: runs it on ranks in every form and compares bits."""

import functools
import zlib

import torch
from hard_support import FORMS, OPTIMIZERS

LIMIT = 1e-9  # of the norm-wise relative difference to one process, in fp64

# Cases in which parameters, or their state, come when the optimizer is there already.
LATE = ("swapped", "moved", "groups_added", "groups_added_in_flight", "finetuned, added")


@functools.lru_cache(None)
def knows_late_parameters(optimizer):
    """Whether torch's own optimizer can step a parameter that came later: older torch's Adagrad cannot."""
    early, late = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    plain = OPTIMIZERS[optimizer]([early])
    plain.add_param_group({"params": [late]})
    late.grad = torch.ones(1)
    try:
        plain.step()
    except KeyError:
        return False
    return True


def same_bits(first, second):
    """The first name whose tensors differ; None: nowhere."""
    assert first.keys() == second.keys()
    for name in first:
        one, other = (tensor.detach().contiguous().reshape(-1) for tensor in (first[name], second[name]))
        if first[name].shape != second[name].shape or one.dtype != other.dtype:
            return name
        if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            return name
    return None


def distance(first, second):
    """Norm-wise relative difference of all tensors together."""
    one, other = (torch.cat([t.flatten().to(torch.complex128) for t in tensors.values()]) for tensors in (first, second))
    return (torch.linalg.norm(one - other) / torch.linalg.norm(other)).item()


def check(ranks, module, case, *, as_alone=True, waited_for=None, optimizers=None, forms=FORMS, horovod_as_alone=True,
          noisy=()):  # fmt: skip
    """Runs a case with every optimizer and in every form.

    Args:
        ranks: support.Ranks.
        module, case: a key of the CASES of a module.
        as_alone: whether one process with all rows learns the same.
        waited_for: None: step() must not wait; else words that a fallback must have.
        optimizers: names, None: all.
        horovod_as_alone: whether Horovod's form must, too.
        noisy: optimizers that make steps out of the rounding of gradients which are zero but for it.
    """
    optimizers = tuple(optimizers or OPTIMIZERS)
    if case in LATE:
        optimizers = tuple(name for name in optimizers if name not in OPTIMIZERS or knows_late_parameters(name))
    if ranks.backend != "native":
        # Who moves the bytes knows nothing of optimizers: they take turns.
        optimizers = (optimizers[zlib.crc32(case.encode()) % len(optimizers)],)
    # Horovod's form waits for everything in one place: two ranks say as much about it as three.
    forms = tuple(form for form in forms if (as_alone or form != "alone") and (ranks.size == 2 or form != "horovod"))
    results = [{} for _ in range(ranks.size)]
    for optimizer in optimizers:  # a call for each, as a deadline is a call's, and some cases compile
        for of_rank, outcome in zip(results, ranks.call("hard_support:run", module, case, (optimizer,), forms)):
            of_rank.update(outcome)
    for optimizer in optimizers:
        for form in forms:
            tensors, overlap, fallbacks = results[0][optimizer, form]
            where = f"{case} with {optimizer} in form {form}: "
            for rank, other in enumerate(results[1:], 1):
                differs = same_bits(tensors, other[optimizer, form][0])
                assert differs is None, f"{where}{differs} differs between ranks 0 and {rank}"
            if form == "overlapped":
                differs = same_bits(tensors, results[0][optimizer, "waiting"][0])
                assert differs is None, f"{where}{differs} differs from the waiting form"
                if waited_for is None:
                    assert not fallbacks and set(overlap) <= {"backward and forward"}, f"{where}{fallbacks}"
                else:
                    assert any(waited_for in fallback for fallback in fallbacks), f"{where}{fallbacks}"
            if "alone" in forms and form != "alone" and optimizer not in noisy and (horovod_as_alone or form != "horovod"):
                away = distance(tensors, results[0][optimizer, "alone"][0])
                assert away <= LIMIT, f"{where}{away:.1e} away from what one process learns"
