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
        """Adds operations of whole steps: pairs (started_s, done_s), which may overlap each other."""
        end_s = float("-inf")
        for started_s, done_s in sorted(spans):
            if done_s > end_s:
                self.communication_s += done_s - max(started_s, end_s)
                end_s = done_s


class Report(dict):
    """What `optimizer.report()` returns: a dict that prints as a table.

    Keys:
        steps: how often step() was called. The first is not in the times: it measures.
        overlap: "backward and forward", "backward" or "none".
        communication_s: time in which gradients were under way, in seconds, over all steps but the first.
        exposed_s: time for which the main thread waited for them.
        hidden_s: communication_s - exposed_s, at least 0.
        fallbacks: reasons, in words, why something is waited for at step().
        groups: what travels as one operation, in the order of need, as dicts: "name", "priority", "tensors" (names),
            "nbytes", "algorithm", "path", "memory", "exposed_s". memory: where the last gradient was reduced: "private", where
            torch had made it; "copied" into memory that all ranks of the host map; "shared": accumulated there by torch.
        tensors: name -> {"priority", "nbytes", "exposed_s", "group"}; exposed_s is that of the whole group.
    """

    def __str__(self):
        hidden = self["hidden_s"] / self["communication_s"] if self["communication_s"] else 0.0
        lines = [
            f"{self['steps']} steps; communication overlaps with: {self['overlap']}",
            f"after the first step: communication {self['communication_s']:.3f} s"
            f" = {self['hidden_s']:.3f} s hidden ({hidden:.0%}) + {self['exposed_s']:.3f} s exposed",
        ]
        lines += [f"waited for at step(): {reason}" for reason in self["fallbacks"]]
        if self["groups"]:
            titles = ("priority", "gradients", "tensors", "bytes", "exposed ms", "algorithm", "path", "memory")
            lines += _table([titles] + [_row(group) for group in self["groups"]])
        return "\n".join(lines)


def _row(group):
    return (f"{group['priority']}", group["name"], f"{len(group['tensors'])}", f"{group['nbytes']:,}",
            f"{group['exposed_s'] * 1e3:.1f}", group["algorithm"], group["path"],
            group["memory"])  # fmt: skip


def _table(rows):
    """Lines of equal columns: texts to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = "><>>><<<"
    return ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)).rstrip() for row in rows]


def make_report(meter, exchange, overlap, fallbacks):
    """The Report of an optimizer, from its Meter, its GradientExchange, what overlaps and why the rest does not."""
    groups = sorted(exchange.groups, key=lambda group: group.priority)
    return Report(
        steps=meter.steps,
        overlap=overlap,
        communication_s=meter.communication_s,
        exposed_s=exchange.exposed_s,
        hidden_s=max(0.0, meter.communication_s - exchange.exposed_s),
        fallbacks=list(fallbacks),
        groups=[_described(group, exchange.communicator) for group in groups],
        tensors={
            gradient.name: {
                "priority": gradient.priority,
                "nbytes": gradient.parameter.numel() * gradient.parameter.element_size(),
                "exposed_s": group.exposed_s,
                "group": group.name,
            }
            for group in groups
            for gradient in group.gradients
        },
    )


def _described(group, communicator):
    algorithm, path = _route(communicator, group.wire_nbytes)
    return {
        "name": group.name,
        "priority": group.priority,
        "tensors": [gradient.name for gradient in group.gradients],
        "nbytes": group.wire_nbytes,
        "dtype": str(group.wire_dtype).replace("torch.", ""),
        "algorithm": algorithm,
        "path": path,
        "memory": group.path,
        "exposed_s": group.exposed_s,
    }


def _route(communicator, nbytes):
    """Which algorithm an all-reduce of so many bytes takes, and over what; empty where the communicator cannot tell."""
    settings = getattr(communicator, "settings", None)
    if settings is None:
        return "", ""
    if communicator.backend != "native":
        return "its own", communicator.backend
    algorithm = communicator.algorithm("allreduce", nbytes, overlapped=True)
    inside = settings.transport if settings.transport in ("tcp", "mpi") else "shm"
    between = "mpi" if "mpi" in communicator.transports.values() else "tcp"
    if len(communicator.host_sizes) == 1:
        return algorithm, inside
    return algorithm, between if max(communicator.host_sizes) == 1 else f"{inside}, {between} between hosts"
