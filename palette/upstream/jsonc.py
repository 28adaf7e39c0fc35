"""JSON with ``//`` comments, and typed access to it that names the key at fault."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from palette.config import ConfigError

_STRING_OR_COMMENT = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*')
_LARGEST = 2**20  # bytes; the published configs have 7000
_REQUIRED = object()


def read_json_config(path: str | Path) -> dict[str, Any]:
    """Read a JSON file whose lines may end in ``//`` comments; ``//`` inside a text stays.

    Raises:
        ConfigError: the file is missing or unreadable, or holds no JSON object; with the line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    if len(raw) > _LARGEST:
        raise ConfigError(f"{path}: larger than {_LARGEST} bytes; not a config")
    return parse_json_config(text, origin=str(path))


def parse_json_config(text: str, *, origin: str = "config") -> dict[str, Any]:
    """JSON text with ``//`` comments as a dict; ConfigError as ``read_json_config``."""
    plain = _STRING_OR_COMMENT.sub(lambda m: m[0] if m[0].startswith('"') else "", text)
    try:
        value = json.loads(plain, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin}:{error.lineno}: broken JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{origin}: broken JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{origin}: expected an object {{...}}, found a {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is an int or a float, and finite: 1e999 of a JSON text is not."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and abs(value) <= sys.float_info.max


class Reader:
    """Typed access to nested dicts and lists by full key, such as ``model.which_losses.0``.

    Every method raises ConfigError with the full key when the value has another type, is out of
    range, or is missing and has no default. A null counts as missing, as in the published code.
    """

    def __init__(self, root: Mapping[str, Any], where: str = "") -> None:
        self._root = root
        self._where = where

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as it is."""
        value: Any = self._root
        for part in key.split("."):
            if isinstance(value, Mapping):
                value = value.get(part)
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                value = None
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"{self.full(key)}: missing")
        return default

    def number(
        self, key: str, default: Any = _REQUIRED, *, low: float | None = None
    ) -> int | float:
        """An int or a float, as it was written."""
        value = self.get(key, default)
        if not _is_number(value):
            self._refuse(key, "a number", value)
        if low is not None and value < low:
            self._refuse(key, f"at least {low}", value)
        return value

    def integer(self, key: str, default: Any = _REQUIRED, *, low: float | None = None) -> int:
        """A whole number; 1e8 is one."""
        value = self.number(key, default, low=low)
        if value != int(value):
            self._refuse(key, "a whole number", value)
        return int(value)

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            self._refuse(key, "a text", value)
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self._refuse(key, "true or false", value)
        return value

    def numbers(self, key: str, default: Any = _REQUIRED) -> list[int | float]:
        value = self.get(key, default)
        if not (isinstance(value, list) and all(map(_is_number, value))):
            self._refuse(key, "a list of numbers", value)
        return list(value)

    def inside(self, key: str) -> Reader:
        """The object under a key."""
        value = self.get(key)
        if not isinstance(value, Mapping):
            self._refuse(key, "an object", value)
        return Reader(value, self.full(key))

    def named(self, key: str) -> tuple[str, Reader]:
        """Name and arguments of an object: "name", or {"name": "name" or [module, "name"]}."""
        value = self.get(key)
        name: Any = value.get("name") if isinstance(value, Mapping) else value
        arguments: Any = value.get("args") or {} if isinstance(value, Mapping) else {}
        if isinstance(name, list) and len(name) == 2:
            name = name[1]
        if not isinstance(name, str):
            self._refuse(f"{key}.name", "a name or [module, name]", name)
        if not isinstance(arguments, Mapping):
            self._refuse(f"{key}.args", "an object", arguments)
        return name, Reader(arguments, self.full(f"{key}.args"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._root)

    def full(self, key: str) -> str:
        """The key from the top of the file."""
        return f"{self._where}.{key}".lstrip(".")

    def _refuse(self, key: str, wanted: str, value: Any) -> NoReturn:
        raise ConfigError(f"{self.full(key)}: must be {wanted}; got {repr(value)[:60]}")
