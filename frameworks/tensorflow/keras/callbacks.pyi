"""The types of the callbacks; see ../__init__.pyi."""

from collections.abc import Callable
from typing import Any, Literal

import keras

from commlib.process_sets import ProcessSet

class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
    def __init__(self, root_rank: int, device: str = "", process_set: ProcessSet = ...) -> None: ...

class MetricAverageCallback(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
    def __init__(self, device: str = "", process_set: ProcessSet = ...) -> None: ...

class LearningRateScheduleCallback(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
    def __init__(self, initial_lr: float, multiplier: float | Callable[[float], float], start_epoch: int = 0,
                 end_epoch: int | None = None, staircase: bool = True, momentum_correction: bool = True,
                 steps_per_epoch: int | None = None) -> None: ...

class LearningRateWarmupCallback(LearningRateScheduleCallback):
    def __init__(self, initial_lr: float, warmup_epochs: int = 5, momentum_correction: bool = True,
                 steps_per_epoch: int | None = None, verbose: int = 0) -> None: ...

class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc, unused-ignore]
    def __init__(self, monitor: str = "val_loss", verbose: int = 0, mode: Literal["auto", "min", "max"] = "auto",
                 save_freq: str | int = "epoch", filepath: Any = None) -> None: ...
