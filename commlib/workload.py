"""What is trained: layers with their gradients and seconds of compute, from a built-in table or from a file of the user's own.

    {"name": "my network", "layers": [
        {"name": "conv1", "tensors": [9408, 64], "forward_s": 0.0011, "backward_s": 0.0021},
        {"name": "relu1", "forward_s": 0.0002, "backward_s": 0.0002}]}

Layers stand in the order of the forward pass; "tensors" are elements of each gradient. The file may also be a timeline that was
recorded in training (traced.py). This file knows layers and seconds; it knows no cluster and no schedule.
"""
from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, List, Tuple

from commlib.json_table import JsonTable, load
from commlib.models import MODELS, layer_times
from commlib.simulated_training import TrainingLayer
from commlib.traced import is_timeline, layers_of

_MOST_ELEMENTS = 1 << 40


@dataclass(frozen=True)
class Workload:
    """A training step of one rank.

    Args:
        name: for people.
        layers: in the order of the forward pass.
    """

    name: str
    layers: Tuple[TrainingLayer, ...]

    @property
    def compute_s(self) -> float:
        """Seconds of compute of a step."""
        return sum(layer.forward_s + layer.backward_s for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Elements of all gradients."""
        return sum(sum(layer.counts) for layer in self.layers)

    def scaled(self, factor: float) -> Workload:
        """The same with so many times the compute."""
        return Workload(self.name, tuple(
            TrainingLayer(layer.forward_s * factor, layer.backward_s * factor, layer.counts, layer.name)
            for layer in self.layers))  # fmt: skip

    @classmethod
    def of_model(cls, name: str, compute_s: float) -> Workload:
        """A built-in table, with the seconds that forward and backward of one rank's batch take together.

        Raises:
            ValueError: no such model, or no time above 0.

        Example:
            >>> Workload.of_model("resnet50", 0.2).parameters
            25557032
        """
        if name not in MODELS:
            raise ValueError(f"no model named {name!r}; there are {', '.join(MODELS)}, or a file of layers: see docs/simulate.md")
        if not 0 < compute_s < float("inf"):
            raise ValueError(f"a step's compute must take more than 0 seconds, not {compute_s}")
        layers = MODELS[name]()
        return cls(name, tuple(
            TrainingLayer(time.forward_s, time.backward_s, tuple(tensor.parameters for tensor in layer.tensors), layer.name)
            for layer, time in zip(layers, layer_times(layers, compute_s, 0.0))))  # fmt: skip

    @classmethod
    def load(cls, path: str) -> Workload:
        """Reads a file as above, or a timeline; a model out of a timeline is called by its file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not such a file; the text says what is wrong.
        """
        return load(path, lambda table: cls.from_timeline(table, os.path.basename(path)) if is_timeline(table)
                    else cls.from_dict(table))  # fmt: skip

    @classmethod
    def from_timeline(cls, table: Any, name: str) -> Workload:
        """The layers and times of a timeline (Chrome trace) that was read already; see commlib.traced.layers_of.

        Raises:
            ValueError: no layers were recorded in it.
        """
        return cls._that_takes_time(name, layers_of(table))

    @classmethod
    def from_dict(cls, table: Any) -> Workload:
        """As `load`, of a table that was read already.

        Example:
            >>> layer = {"name": "fc", "tensors": [10], "forward_s": 1, "backward_s": 2}
            >>> Workload.from_dict({"name": "tiny", "layers": [layer]}).compute_s
            3.0
        """
        reader = JsonTable(table, "the model")
        name, layers = reader.part("name"), reader.part("layers")
        reader.end()
        if not isinstance(layers, list) or not layers:
            raise ValueError("the model: 'layers' must be a list with at least one layer")
        return cls._that_takes_time(str(name), tuple(_layer(layer, f"layer {number}") for number, layer in enumerate(layers)))

    @classmethod
    def _that_takes_time(cls, name, layers):
        workload = cls(name, layers)
        if workload.compute_s == 0:
            raise ValueError("the model: its layers must take time, else there is nothing to speed up")
        return workload

    def to_dict(self) -> dict:
        """The table that `from_dict` reads.

        Example:
            >>> workload = Workload.of_model("alexnet", 0.1)
            >>> Workload.from_dict(workload.to_dict()) == workload
            True
        """
        return {"name": self.name, "layers": [
            {"name": layer.name, "tensors": list(layer.counts), "forward_s": layer.forward_s, "backward_s": layer.backward_s}
            for layer in self.layers]}  # fmt: skip

    def save(self, path: str) -> None:
        """Writes the file that `load` reads.

        Raises:
            OSError: it cannot be written.
        """
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.to_dict(), indent=1) + "\n")


def model_flops(name: str) -> int:
    """Floating-point operations of forward and backward of one sample of a built-in model."""
    if name not in MODELS:
        raise ValueError(f"no built-in model named {name!r}; there are {', '.join(MODELS)}")
    return 3 * sum(layer.forward_flops for layer in MODELS[name]())


def _layer(table: Any, where: str) -> TrainingLayer:
    reader = JsonTable(table, where)
    name, tensors = reader.part("name", where), reader.part("tensors", [])
    layer = TrainingLayer(reader.number("forward_s", least=0), reader.number("backward_s", least=0),
                          tuple(_counts(tensors, where)), str(name))  # fmt: skip
    reader.end()
    return layer


def _counts(tensors: Any, where: str) -> List[int]:
    if not isinstance(tensors, list):
        raise ValueError(f"{where}: 'tensors' must be a list of elements per tensor, not {tensors!r}")
    elements = JsonTable({str(index): count for index, count in enumerate(tensors)}, f"{where}, tensors")
    return [elements.whole(str(index), 1, _MOST_ELEMENTS) for index in range(len(tensors))]
