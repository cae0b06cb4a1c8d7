"""What an optimizer's communication cost: how much of it was hidden behind compute, and why the rest was not.

This file adds up times that others measured; it measures and changes nothing.
"""


class Meter:
    """Adds up the communication of one optimizer.

    Attributes:
        steps: finished calls of step().
        communication_s: time in which at least one operation was under way.
    """

    def __init__(self):
        self.steps = 0
        self.communication_s = 0.0

    def add(self, spans):
        """Adds operations of one step: pairs (started_s, done_s), which may overlap each other."""
        end_s = float("-inf")
        for started_s, done_s in sorted(spans):
            if done_s > end_s:
                self.communication_s += done_s - max(started_s, end_s)
                end_s = done_s


class Report(dict):
    """What `optimizer.report()` returns: a dict that prints as a table.

    Keys:
        steps: how often step() was called. The first is not in the times: it measures, probes and imports.
        overlap: "backward and forward", "backward" or "none".
        communication_s: time in which gradients were under way, in seconds, over all steps but the first.
        exposed_s: time for which the main thread waited for them.
        hidden_s: communication_s - exposed_s, at least 0.
        fallbacks: reasons, in words, why something is waited for at step().
        tensors: name -> {"priority", "nbytes", "exposed_s"}.
    """

    def __str__(self):
        hidden = self["hidden_s"] / self["communication_s"] if self["communication_s"] else 0.0
        lines = [
            f"{self['steps']} steps; communication overlaps with: {self['overlap']}",
            f"after the first step: communication {self['communication_s']:.3f} s"
            f" = {self['hidden_s']:.3f} s hidden ({hidden:.0%}) + {self['exposed_s']:.3f} s exposed",
        ]
        lines += [f"waited for at step(): {reason}" for reason in self["fallbacks"]]
        if self["tensors"]:
            width = max(len(name) for name in self["tensors"])
            lines.append(f"{'priority':>8}  {'parameter':<{width}}  {'bytes':>12}  {'exposed ms':>10}")
        for name, tensor in sorted(self["tensors"].items(), key=lambda item: item[1]["priority"]):
            exposed_ms = tensor["exposed_s"] * 1e3
            lines.append(f"{tensor['priority']:>8}  {name:<{width}}  {tensor['nbytes']:>12,}  {exposed_ms:>10.1f}")
        return "\n".join(lines)


def make_report(meter, exchange, overlap, fallbacks):
    """The Report of an optimizer, from its Meter, its GradientExchange, what overlaps and why the rest does not."""
    exposed_s = exchange.exposed_s
    return Report(
        steps=meter.steps,
        overlap=overlap,
        communication_s=meter.communication_s,
        exposed_s=exposed_s,
        hidden_s=max(0.0, meter.communication_s - exposed_s),
        fallbacks=list(fallbacks),
        tensors={
            gradient.name: {
                "priority": gradient.priority,
                "nbytes": gradient.parameter.numel() * gradient.parameter.element_size(),
                "exposed_s": group.exposed_s,
            }
            for group in exchange.groups
            for gradient in group.gradients
        },
    )
