"""Horovod's process sets: some of the ranks, which make collectives among themselves; for the adapters of frameworks.

This file keeps which sets of the default communicator there are, the same on all ranks; `Communicator.group` does the work.
Ids count up from 0, the set of all ranks, and none is used again.
"""

import json
import weakref
from collections.abc import Iterable

import commlib


class ProcessSet:
    """Some of the ranks. Pass it to init(process_sets=[...]) or add_process_set, on every rank; then collectives take it.

    Args:
        ranks_or_comm: ranks, in any order; or an mpi4py communicator of these processes, whose ranks are found out when the
            set is registered. Communicators may differ between ranks, as those of `Split` do: each becomes a set, and every
            rank's object is the set that it is in. A rank that is in none passes MPI.COMM_NULL.

    Attributes:
        process_set_id: its number, the same on all ranks; None while it is not registered, and for MPI.COMM_NULL.
        ranks: in ascending order; None: a communicator's, not registered yet. Ranks within the set, and parts of gathered
            tensors, are in that order.
        mpi_comm: the communicator that it was made of, or None.

    Raises:
        ValueError: neither a sequence of ints nor a communicator.

    Example:
        >>> import commlib
        >>> from commlib.process_sets import ProcessSet, global_process_set
        >>> communicator = commlib.init()
        >>> global_process_set.ranks, ProcessSet([0]).process_set_id
        ([0], None)
        >>> commlib.shutdown()
    """

    mpi_comm = None

    def __init__(self, ranks_or_comm):
        if all(hasattr(ranks_or_comm, name) for name in ("Get_rank", "allgather")):
            self.mpi_comm, self.ranks = ranks_or_comm, None
        elif not isinstance(ranks_or_comm, Iterable) or any(type(rank) is not int for rank in ranks_or_comm):
            raise ValueError("ProcessSet should be initialized with a list of process ranks or an mpi4py communicator, not "
                             f"{ranks_or_comm!r}")  # fmt: skip
        else:
            self.ranks = sorted(ranks_or_comm)
        self.process_set_id = None  # its number, the same on all ranks, while it is registered
        self._communicator = None

    def included(self):
        """Whether this process is in the set; None while that is not registered."""
        return None if self.process_set_id is None else commlib.rank() in self.ranks

    def size(self):
        """How many ranks are in the set; None while it is not registered."""
        return None if self.process_set_id is None else len(self.ranks)

    def rank(self):
        """This process's place in the set; None while that is not registered.

        Raises:
            ValueError: this process is not part of it.
        """
        return None if self.process_set_id is None else self.communicator().rank

    def communicator(self):
        """The core's communicator of these ranks.

        Raises:
            ValueError: the set is not registered, or this process is not part of it.
        """
        if self.process_set_id is None:
            commlib.communicator()  # or there is nothing that could have sets
            raise ValueError(f"{self} is not registered (or was removed): pass it to init(process_sets=[...]) or to "
                             "add_process_set, on every rank")  # fmt: skip
        if self._communicator is None:
            raise ValueError(f"process is not part of provided process set: rank {commlib.rank()} is not in {self}; make this "
                             "call within `if process_set.included():`")  # fmt: skip
        return self._communicator

    def __deepcopy__(self, memo):
        """Modules that hold a set are copied; the set is the same."""
        return self

    def __reduce__(self):
        return _set_of, (self.ranks,)

    def __repr__(self):
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks}, mpi_comm={self.mpi_comm})"


class _GlobalProcessSet(ProcessSet):
    """All ranks, whatever these are at the time."""

    process_set_id = 0

    def __init__(self):
        """Nothing has to be registered."""

    @property
    def ranks(self):
        """All ranks, as a list."""
        return list(range(commlib.size()))

    def communicator(self):
        """The default communicator."""
        return commlib.communicator()

    def __reduce__(self):
        return "global_process_set"

    def __repr__(self):
        return "global_process_set"


global_process_set = _GlobalProcessSet()


class _Registry:
    """The process sets of one communicator, by id."""

    def __init__(self, communicator):
        self.communicator = weakref.ref(communicator)
        self.sets = {}
        self.next_id = 1
        communicator.on_close(self._forget_all)

    def add(self, process_sets):
        """Registers sets, all of them or none; every rank calls it with the same.

        Raises:
            ValueError: on every rank: they differ, are there already, or name ranks that are not.
        """
        told = self._told("add_process_set", [process_set.ranks if process_set.mpi_comm is None else self._ranks_of(process_set)
                                              for process_set in process_sets])  # fmt: skip
        size = self.communicator().size
        known = [list(range(size)), *(process_set.ranks for process_set in self.sets.values())]
        for ranks in (ranks for slot in told for ranks in slot):
            if not ranks or len(set(ranks)) != len(ranks) or ranks[0] < 0 or ranks[-1] >= size:
                raise ValueError(f"a process set needs ranks in [0, {size}), each once, not {ranks}")
            if ranks in known:
                raise ValueError(f"a process set of ranks {ranks} is there already: use that one (or global_process_set)")
            known.append(ranks)
        for process_set, slot in zip(process_sets, told):
            for ranks in slot:
                is_mine = process_set.mpi_comm is None or self.communicator().rank in ranks
                self._register(process_set if is_mine else ProcessSet(ranks), ranks)

    def _ranks_of(self, process_set):
        """A communicator's ranks here, in a dict, which says that other ranks may have other ones."""
        comm = process_set.mpi_comm
        return {"comm": sorted(comm.allgather(self.communicator().rank)) if comm else []}

    def _register(self, process_set, ranks):
        communicator = self.communicator()
        process_set.ranks = ranks
        process_set.process_set_id = self.next_id
        process_set._communicator = communicator.group(process_set.ranks) if communicator.rank in process_set.ranks else None
        self.sets[self.next_id] = process_set
        self.next_id += 1

    def remove(self, process_set):
        """Forgets a set; every rank calls it with the same. Returns False for one that is not there.

        Raises:
            ValueError: on every rank: they want different ones removed.
        """
        mine = [] if process_set.process_set_id is None else [process_set.process_set_id]
        (slot,) = self._told("remove_process_set", [mine if process_set.mpi_comm is None else {"comm": mine}])
        known = [number for ids in slot for number in ids if number in self.sets]
        for number in known:
            self._forget(number)
        return bool(known)

    def _forget(self, process_set_id):
        process_set = self.sets.pop(process_set_id)
        process_set.process_set_id = process_set._communicator = None

    def _forget_all(self):
        """This rank leaves: the same objects may be registered again after the next init()."""
        for process_set_id in list(self.sets):
            self._forget(process_set_id)

    def _told(self, what, mine):
        """What all ranks want, which is the same; for each of it a list, of one, or of all that communicators' ranks want."""
        communicator = self.communicator()
        told = [json.loads(payload) for payload in communicator.exchange(json.dumps(mine).encode(), name=what)]
        plain = [[None if isinstance(one, dict) else one for one in theirs] for theirs in told]
        other = next((rank for rank, theirs in enumerate(plain) if theirs != plain[0]), None)
        if other is not None:
            raise ValueError(f"{what}: ranks want different process sets: rank 0 {told[0]}, rank {other} {told[other]}; call it "
                             "on every rank, also on those outside the set, with the same ranks in the same order")  # fmt: skip
        return [[one] if one is not None else _different(theirs[slot]["comm"] for theirs in told)
                for slot, one in enumerate(plain[0])]  # fmt: skip


def _different(lists):
    """Each list that is not empty, once, in order."""
    return [list(one) for one in sorted(set(map(tuple, filter(None, lists))))]


# Communicator -> its _Registry. Who is gone takes it along.
_registries = weakref.WeakKeyDictionary()


def _set_of(ranks):
    """What a pickled set becomes: the registered one of these ranks, or one that is to be registered."""
    known = _registry().sets.values() if commlib.is_initialized() else ()
    return next((process_set for process_set in known if process_set.ranks == ranks), None) or ProcessSet(ranks)


def _registry():
    communicator = commlib.communicator()
    if communicator not in _registries:
        _registries[communicator] = _Registry(communicator)
    return _registries[communicator]


def add_process_set(process_set):
    """Registers a process set; every rank calls it, also those outside the set.

    Args:
        process_set: a ProcessSet, or a list of ranks.

    Returns:
        The ProcessSet.

    Raises:
        ValueError: on every rank: there is a set of these ranks, the ranks want different sets, or a rank does not exist.
    """
    registry = _registry()
    process_set = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    registry.add([process_set])
    return process_set


def add_process_sets(process_sets):
    """As `add_process_set`, for init(): all of them or none; "dynamic" asks for nothing, as sets can be added at all times.

    Raises:
        ValueError: as `add_process_set`; or this is no list of process sets.
    """
    if process_sets is None or process_sets == "dynamic":
        return
    if not isinstance(process_sets, Iterable) or isinstance(process_sets, str):
        raise ValueError(f'process_sets must be a list of ProcessSet or "dynamic", not {process_sets!r}')
    given = [one if isinstance(one, ProcessSet) else ProcessSet(one) for one in process_sets]
    if given:
        _registry().add(given)


def remove_process_set(process_set):
    """Forgets a process set; every rank calls it, also those outside the set. What is in flight on it ends as it would have.

    Returns:
        True; False for the global process set, and for one that is not registered.

    Raises:
        ValueError: on every rank: they want different ones removed.
    """
    return False if process_set is global_process_set else _registry().remove(process_set)


def communicator_of(process_set):
    """The core's communicator that a collective with this argument is for; None: all ranks.

    Raises:
        ValueError: commlib is not initialized, no process set, one that is not registered, or that this rank is not part of.
    """
    if process_set is None or process_set is global_process_set:
        return commlib.communicator()
    if not isinstance(process_set, ProcessSet):
        raise ValueError(f"process_set must be a ProcessSet, not {process_set!r}")
    return process_set.communicator()


def process_set_of_id(process_set_id):
    """The process set of a number, for a program that was written down with the number in it.

    Raises:
        ValueError: commlib is not initialized; no set has this number.
    """
    if process_set_id == 0:
        return global_process_set
    process_set = _registry().sets.get(process_set_id)
    if process_set is None:
        raise ValueError(f"there is no process set of number {process_set_id}: it was removed, or shutdown() forgot it; register "
                         "it on every rank, and make the function that used it anew")  # fmt: skip
    return process_set
