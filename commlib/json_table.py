"""Reading a small JSON file that people write: every value is checked, and no key is overlooked.

This file knows keys, numbers and words; it does not know what they mean.
"""
from __future__ import annotations

import json
import math
from typing import Any, Callable, Dict, List, Tuple, TypeVar

Made = TypeVar("Made")


def load(path: str, from_table: Callable[[Any], Made]) -> Made:
    """What `from_table` makes of a file's JSON.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or from_table refuses it; the text names the file.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        return from_table(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class JsonTable:
    """Takes values out of a table and refuses what is wrong, missing or, at the `end`, left over.

    Args:
        table: as json.loads gives it.
        where: what it is, for the texts of errors.

    Raises:
        ValueError: by every method, with a text that says what is wrong with which key.

    Example:
        >>> reader = JsonTable({"latency_us": 20}, "a link")
        >>> reader.number("latency_us", least=0)
        20.0
        >>> reader.end()
    """

    def __init__(self, table: Any, where: str):
        if not isinstance(table, dict):
            raise ValueError(f"{where} must be an object such as {{\"key\": value}}, not {table!r}")
        self._left: Dict[str, Any] = dict(table)
        self._known: List[str] = []
        self._where = where

    def part(self, key: str, default: Any = None) -> Any:
        """A value as it is; without a default it must be there."""
        self._known.append(key)
        value = self._left.pop(key, default)
        if value is None:
            raise ValueError(f"{self._where} lacks {key!r}: see docs/simulate.md")
        return value

    def number(self, key: str, default: Any = None, least: float = -math.inf, above: float = -math.inf) -> float:
        """A finite number, at least `least` and more than `above`."""
        value = self.part(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
                least <= value < math.inf and value > above):  # fmt: skip
            limit = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
            raise ValueError(f"{self._where}: {key!r} must be a number {limit}, not {value!r}")
        return float(value)

    def whole(self, key: str, least: int, most: int, default: Any = None) -> int:
        """A whole number between two others."""
        value = self.part(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{self._where}: {key!r} must be a whole number from {least} to {most}, not {value!r}")
        return value

    def word(self, key: str, words: Tuple[str, ...], default: Any = None) -> str:
        """One of some words."""
        value = self.part(key, default)
        if value not in words:
            raise ValueError(f"{self._where}: {key!r} must be {' or '.join(map(repr, words))}, not {value!r}")
        return value

    def end(self) -> None:
        """Nothing is left that was not asked for: a key that is not read would be ignored in silence."""
        if self._left:
            raise ValueError(f"{self._where}: no such key as {', '.join(map(repr, sorted(self._left)))}; "
                             f"there are {', '.join(self._known)}")  # fmt: skip
