"""The order of first use: which parameter the forward pass needs first. It becomes the priority, 0 first.

Backward runs the operations of forward from the last to the first, so a parameter's gradient is complete when backward
has undone the parameter's first use: the order in which gradients arrive, reversed, is the order of first use. That
needs no hooks in forward, sees shared weights and blocks chosen at run time, and is the same in every form of the
optimizer. This file knows lists of numbers; it knows no tensors and no order of registration.
"""

# A new order has to stay for so many steps, then for twice as many, and so on: of a model that changes all the time, no
# order is better than another, and to regroup costs a wait of all ranks.
_FIRST_PATIENCE = 2


class FirstUse:
    """What all ranks agreed on, and what this rank has measured since.

    Attributes:
        order: numbers of gradients, needed first first. One that was never used on any rank is not in it.
        cohorts: number -> one text per agreement: which ranks had used it then. Gradients of equal cohorts come together.
        measured: the order that this rank has measured since the last agreement; empty: nothing new.
        arrivals: where whoever sees gradients arrive appends their numbers; None: there is nothing to measure.
        sent: where whoever sends groups in backward appends their priorities; cheaper than arrivals, so always kept. Blocks
            that change places show in it.
    """

    def __init__(self):
        self.order = []
        self.cohorts = {}
        self.arrivals = []
        self._known = frozenset()
        self._is_complete = False  # whether every gradient has a place in the order
        self.measured = []
        self.sent = []
        self._usual = self._latest = None  # `sent` of most steps, and of the last one that differed
        self._repeats = 0  # how often in a row
        self._patience = _FIRST_PATIENCE
        self._again = False  # whether known gradients are to be measured once more

    def watch(self):
        """At the end of a step: if groups were sent in a new order, and that stays, the next steps are measured."""
        sent, self.sent = self.sent, []
        if self._usual is None:
            self._usual = sent
        if sent == self._usual:
            self._repeats = 0
            return
        self._repeats = self._repeats + 1 if sent == self._latest else 1
        self._latest = sent
        if self._repeats >= self._patience:
            self._patience *= 2
            self._usual, self._repeats, self._again = sent, 0, True
            self.arrivals = self.arrivals or []

    def end_step(self):
        """Takes over what arrived in one step. Returns True if that asks for another order."""
        if not self.arrivals:
            return False
        arrivals, self.arrivals = self.arrivals, []
        if self._known.issuperset(arrivals):
            return self._again and self._measure_again(arrivals)
        self.measured = merged(order_of_use(arrivals), self.measured)
        return True

    def _measure_again(self, arrivals):
        self._again = False
        if self._is_complete:
            self.arrivals = None
        measured = order_of_use(arrivals)
        used = frozenset(measured)
        if [number for number in self.order if number in used] == measured:
            return False
        self.measured = measured
        return True

    def agree(self, measured, count):
        """Makes one order of all ranks' measurements; every rank calls it at the same step.

        Args:
            measured: what every rank measured, in rank order.
            count: how many gradients there are.
        """
        order = []
        for one in (*measured, self.order):
            order = merged(order, one)
        self.order, self._known = order, frozenset(order)
        sets = [frozenset(one) for one in measured]
        for number in range(count):
            pattern = "".join(".x"[number in used] for used in sets)
            self.cohorts[number] = f"{self.cohorts.get(number, '')} {pattern}"
        self.measured = []
        self._is_complete = len(order) == count
        self.arrivals = None if self._is_complete else []
        self._usual = None

    def add(self):
        """There is a gradient more, whose place is to be measured."""
        if self.arrivals is None:
            self.arrivals = []


def order_of_use(arrivals):
    """The order of first use behind a list of arrivals, of one backward pass or of several.

    A number that comes again begins the next pass. The last pass counts; what only earlier ones used joins it.

    Example:
        >>> order_of_use([2, 1, 0])
        [0, 1, 2]
        >>> order_of_use([3, 1, 0, 3, 2, 0])
        [0, 1, 2, 3]
    """
    passes = [[]]
    seen = set()
    for number in arrivals:
        if number in seen:
            passes.append([])
            seen.clear()
        seen.add(number)
        passes[-1].append(number)
    order = []
    for one in reversed(passes):
        order = merged(order, one[::-1])
    return order


def merged(first, second):
    """`first` with the items that only `second` has, each right behind the item that it follows there.

    Example:
        >>> merged(["stem", "a", "head"], ["early", "stem", "b", "c", "head"])
        ['early', 'stem', 'b', 'c', 'a', 'head']
    """
    placed = set(first)
    followers = {}
    anchor = None
    for item in second:
        if item in placed:
            anchor = item
        else:
            followers.setdefault(anchor, []).append(item)
    result = list(followers.get(None, ()))
    for item in first:
        result.append(item)
        result += followers.get(item, ())
    return result
