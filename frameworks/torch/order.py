"""The order of first use: which parameter the forward pass needs first. It becomes the priority, 0 first.

Backward runs the operations of forward from the last to the first, so a parameter's gradient is complete when backward
has undone the parameter's first use: the order in which gradients arrive, reversed, is the order of first use. That
needs no hooks in forward, sees shared weights and blocks chosen at run time, and is the same in every form of the
optimizer. This file knows lists of numbers; it knows no tensors and no order of registration.
"""


class FirstUse:
    """What all ranks agreed on, and what this rank has measured since.

    Attributes:
        order: numbers of gradients, needed first first. One that was never used on any rank is not in it.
        cohorts: number -> one text per agreement: which ranks had used it then. Gradients of equal cohorts come together.
        measured: the order that this rank has measured since the last agreement; empty: nothing new.
        arrivals: where whoever sees gradients arrive appends their numbers; None: there is nothing to measure.
    """

    def __init__(self):
        self.order = []
        self.cohorts = {}
        self.arrivals = []
        self._known = frozenset()
        self.measured = []

    def end_step(self):
        """Takes over what arrived in one step. Returns True if gradients arrived that have no place in the order."""
        if not self.arrivals:
            return False
        arrivals, self.arrivals = self.arrivals, []
        if self._known.issuperset(arrivals):
            return False
        self.measured = merged(order_of_use(arrivals), self.measured)
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
        self.arrivals = [] if len(order) < count else None

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
