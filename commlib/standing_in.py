"""A joined rank's part in an operation of others, as a request: what its hint says, the memory that changes nothing, the plan.

The half of a Submitter that joining.py uses.
"""

from functools import partial

from commlib.buffer import DTYPES, Buffer
from commlib.engine import KIND_CODES, TICKET_CODE
from commlib.errors import JoinedError
from commlib.memory import pointer_of
from commlib.names import Use
from commlib.reduction import neutral_array
from commlib.requests import NO_PLAN

# What a request's hint tells a rank that has joined: the kind (+ 1, as a ticket has lost it), and how the plan was chosen.
_KIND_BITS, _OVERLAPPED, _SILENT = 0xFF, 0x100, 0x200
_KIND_OF_CODE = {code: kind for kind, code in KIND_CODES.items()}
_DTYPE_OF_CODE = {code: dtype for dtype, (code, _) in DTYPES.items()}


def hint_of(kind, overlapped, is_silent):
    """What a request's hint is; is_silent: of an exchange, to which a rank that has joined contributes no bytes."""
    return KIND_CODES[kind] + 1 + (_OVERLAPPED if overlapped else 0) + (_SILENT if is_silent else 0)


class StandsIn:
    """What a Submitter can do for a rank that has joined."""

    def for_members(self, members):
        """What stands in for operations of a group that this rank does not know."""
        hosts = [self._hosts[rank] for rank in members]
        return self.part_class(self.engine, hosts, self.settings, "unknown", members, self.flight, self)

    def stand_in(self, told):
        """Posts this rank's part in an operation of others, which changes nothing. Returns its handle.

        Args:
            told: a commlib.engine.Announced.

        Raises:
            JoinedError: that cannot be: it is no all-reduce.
        """
        kind = _KIND_OF_CODE.get((told.hint & _KIND_BITS) - 1)
        is_silent = kind == "exchange" and bool(told.hint & _SILENT)
        if kind != "allreduce" and not is_silent:
            raise JoinedError(f"rank {self.engine.rank} has joined, and {kind or 'this'} needs every rank: until all have joined, "
                              "only allreduce goes on", self.engine.rank)  # fmt: skip
        dtype = _DTYPE_OF_CODE[told.dtype]
        count = 0 if is_silent else told.count
        array = neutral_array(told.reduction, count, dtype)
        source = Buffer(None, (count,), dtype, array, True)
        request, itemsize = told.request, source.itemsize
        request.input = request.output = pointer_of(source)
        request.count = count
        request.my_part = self.rank
        if is_silent or told.kind == TICKET_CODE:
            request.members, request.nmembers = self._members, self.size
        plan = NO_PLAN
        if told.kind != TICKET_CODE:
            plan, _ = self._plan_of_engine(kind, count * itemsize, itemsize, 0, bool(told.hint & _OVERLAPPED))
        request.plan = plan
        handle = self.handle_class(self.flight, Use(self.names.group, kind, None, self.size), kind, f"for {told.text}",
                                   (source, source), None, None)  # fmt: skip
        handle.note = plan
        self.flight.add(handle)
        try:
            self._post(handle, request, partial(self.engine.stand_in, told))
        except BaseException:
            self.flight.discard(handle)
            raise
        return handle

    def _plan_of_engine(self, *args):
        """As `_plan`, for an operation that the engine moves."""
        return self._plan(*args)
