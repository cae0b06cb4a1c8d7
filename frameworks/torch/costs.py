"""What gradients on their way have cost: when operations ran, and how long the main thread waited for them."""


class Costs:
    """Of one exchange of gradients, as its base class.

    Attributes:
        exposed_s: how long the main thread has waited.
        groups: of the exchange.
    """

    def __init__(self):
        self.groups = []
        self.exposed_s = 0.0
        self._spans = []  # (started_s, done_s) of operations that were waited for

    def note_wait(self, group, waited_s):
        """The main thread has waited so long for a group, which is reduced now."""
        group.exposed_s += waited_s
        self.exposed_s += waited_s
        _, started_s, done_s = group.handle.times
        self._spans.append((started_s if started_s >= 0 else done_s, done_s))

    def take_spans(self):
        """(started_s, done_s) of the operations that were waited for since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def forget_costs(self):
        """Begins all measurements anew."""
        self.take_spans()
        self.exposed_s = 0.0
        for group in self.groups:
            group.exposed_s = 0.0
