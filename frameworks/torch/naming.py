"""Names of parameters, by which gradients are matched between ranks.

With a model the names are its own; in Horovod's form the user gives them. What has no name gets a number, which is the
same on all ranks as long as they make the same optimizers.
"""

from collections import Counter


class Names:
    """Gives every parameter of an optimizer a name of its own.

    Args:
        model: the nn.Module that is trained, asked for names whenever parameters come; None: there is none.
        named_parameters: (name, parameter) pairs in Horovod's form; None: not given.

    Raises:
        ValueError: named_parameters are no pairs, or a name comes twice.
    """

    def __init__(self, model, named_parameters=None):
        self._model = model
        self._given = None if named_parameters is None else _checked(list(named_parameters))
        self._numbered = 0
        self._taken = set()

    def check(self, parameters):
        """Refuses parameters that Horovod's form was given no name for.

        Raises:
            ValueError: there are some.
        """
        if self._given is None:
            return
        unnamed = [index for index, parameter in enumerate(parameters) if parameter not in self._given]
        if unnamed:
            raise ValueError(
                "named_parameters was specified, but one or more model parameters were not named: those at places "
                f"{', '.join(map(str, unnamed))} of the optimizer's groups"
            )

    def of(self, parameters):
        """(name, parameter) of parameters that have not been named before."""
        known = self._given or {}
        if self._model is not None:
            known = {parameter: name for name, parameter in self._model.named_parameters()}
        return [(self._unique(known.get(parameter)), parameter) for parameter in parameters]

    def _unique(self, name):
        if name is None or name in self._taken:
            # A name that is taken belonged to a parameter that the model has replaced.
            stem = name or ("allreduce.noname" if self._model is None else "outside")
            name = f"{stem}.{self._numbered}"
        self._numbered += 1
        self._taken.add(name)
        return name


def _checked(pairs):
    if any(not isinstance(pair, tuple) for pair in pairs):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            "model.named_parameters()."
        )
    twice = sorted(name for name, uses in Counter(name for name, _ in pairs).items() if uses > 1)
    if twice:
        raise ValueError(f"Parameter names in named_parameters must be unique. Found duplicates: {', '.join(twice)}")
    return {parameter: name for name, parameter in pairs}
