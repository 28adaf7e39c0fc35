"""One option of a config: what is known of it, what it accepts, and how to say so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin


def option(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    empty: bool = False,
    pair: bool = False,
    longest: int | None = None,
    fixed: bool = False,
    known: Callable[[], list[str]] | None = None,
    paths: bool = False,
) -> Any:
    """One option. ``low``/``high`` are inclusive, ``above``/``below`` exclusive, and hold for each
    element of a list; ``empty`` allows an empty list, ``pair`` wants exactly two elements,
    ``longest`` so many at most; ``fixed`` options cannot change on resume; ``known`` lists the
    names that text may be, where ``paths`` adds any path."""
    facts: dict[str, Any] = {
        "doc": doc,
        "unit": unit,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
    }
    facts |= {"empty": empty, "pair": pair, "longest": longest, "fixed": fixed}
    facts |= {"known": known, "paths": paths}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


@dataclasses.dataclass(frozen=True)
class Option:
    """What is known of one option: the row behind ``--help-config`` and behind every check."""

    key: str
    type: Any
    field: dataclasses.Field[Any]

    @property
    def default(self) -> Any:
        if self.field.default_factory is not dataclasses.MISSING:
            return self.field.default_factory()
        return self.field.default

    def wants(self) -> str:
        """What a right value is, in words: ``an integer, at least 1``."""
        facts = self.field.metadata
        if facts["known"] is not None:
            path = ", or a path" if facts["paths"] else ""
            return f"one of {', '.join(facts['known']())}{path}"
        size = "two" if facts["pair"] else facts["longest"] and f"{facts['longest']} or fewer"
        words = [_type_words(self.type) + (f" ({size})" if size else "")]
        for name, text in (("low", "at least"), ("above", "above"), ("high", "at most")):
            if facts[name] is not None:
                words.append(f"{text} {facts[name]}")
        if facts["below"] is not None:
            words.append(f"below {facts['below']}")
        return ", ".join(words)

    def accepts(self, value: Any) -> bool:
        """Whether a value of the right type is also in range."""
        facts = self.field.metadata
        if isinstance(value, (list, tuple)):
            size_ok = len(value) == 2 if facts["pair"] else (len(value) > 0 or facts["empty"])
            short = facts["longest"] is None or len(value) <= facts["longest"]
            return size_ok and short and all(self.accepts(element) for element in value)
        if facts["known"] is not None:
            is_path = facts["paths"] and any(mark in value for mark in "/.,")
            return is_path or value in facts["known"]()
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        low, high, above, below = (facts[name] for name in ("low", "high", "above", "below"))
        return (
            math.isfinite(value)
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
        )


def _type_words(kind: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    names |= {type(None): "null"}
    if kind in names:
        return names[kind]
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else str(arguments[0])
    if get_origin(kind) is list:
        return f"a list of {'integers' if arguments[0] is int else 'numbers'}"
    return " or ".join(_type_words(argument) for argument in arguments)
