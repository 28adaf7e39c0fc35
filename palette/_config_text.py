"""A config's text as flat (key, value, place) entries, before any option is known.

A config may come out of a downloaded checkpoint, so its text is treated as data and nothing else:
no tags, no aliases (a few lines of them unfold into gigabytes), and no ``${...}``, which could read
the environment of whoever opens the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MAX_BYTES = 256 * 1024  # a real config has two or three thousand


class ConfigError(ValueError):
    """A mistake in a config file, an override or the arguments of a run. Always one line."""


def read_text(path: Path) -> str:
    """The text of a config file; ConfigError when there is none."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        return raw.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}") from None


def entries(text: str, origin: str) -> Iterator[tuple[str, Any, str]]:
    """(full key, plain value, where it stands) of every option written in the text."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{origin}: larger than {MAX_BYTES} bytes; not a config")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_reason(error, origin)) from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested too deeply for a config") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{origin}:1: expected sections such as 'train:' with options below")
    places: dict[str, str] = {}
    _survey(root, origin, "", places, seen=set())
    for section, body in _plain(text, origin).items():
        if not isinstance(body, dict):
            yield str(section), body, places.get(str(section), origin)
            continue
        for name, value in body.items():
            key = f"{section}.{name}"
            yield key, value, places.get(key, origin)


def _survey(
    node: yaml.Node, origin: str, path: str, places: dict[str, str], *, seen: set[int]
) -> None:
    """Note the line of every key; refuse repeated keys, aliases, interpolations, deep nesting."""
    where = f"{origin}:{node.start_mark.line + 1}"
    key = path or "the config"
    if id(node) in seen:
        raise ConfigError(f"{where}: {key}: YAML aliases are not used in configs")
    seen.add(id(node))
    if path.count(".") > 2:
        raise ConfigError(f"{where}: {key}: nested too deeply; options are section.option")
    if isinstance(node, yaml.ScalarNode):
        _refuse_interpolation(node.value, key, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, element in enumerate(node.value):
            _survey(element, origin, f"{path}.{index}", places, seen=seen)
    else:
        for name_node, value in node.value:
            place = f"{origin}:{name_node.start_mark.line + 1}"
            if not isinstance(name_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: {key}: a name was expected before ':'")
            _refuse_interpolation(name_node.value, key, place)
            name = f"{path}.{name_node.value}".lstrip(".")
            if name_node.value == "<<":
                raise ConfigError(f"{place}: {key}: YAML merge keys are not used in configs")
            if name in places:
                raise ConfigError(f"{place}: {name} is given twice")
            places[name] = place
            _survey(value, origin, name, places, seen=seen)


def _refuse_interpolation(text: str, key: str, where: str) -> None:
    if "${" in text:
        raise ConfigError(f"{where}: {key}: '${{...}}' is never resolved here; write the value")


def _yaml_reason(error: yaml.YAMLError, origin: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{origin}{f':{mark.line + 1}' if mark else ''}: broken YAML: {problem}"


def _plain(text: str, origin: str) -> dict[Any, Any]:
    """YAML text as plain Python values, numbers read as OmegaConf reads them (1e-4 is one)."""
    try:
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_reason(error, origin)) from None
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: {str(error).splitlines()[0]}") from None
    return values if isinstance(values, dict) else {}


def override(item: str) -> tuple[str, Any, str]:
    """(full key, plain value, where) of one ``section.option=value``."""
    where = f"--set {' '.join(item.split())}"
    key, separator, written = item.partition("=")
    if not separator or "\n" in item:
        raise ConfigError(f"{where}: expected section.option=value")
    _refuse_interpolation(item, key, where)
    try:
        value = _plain(f"value: {written}", where).get("value")
    except ConfigError:
        raise ConfigError(f"{where}: the value is broken YAML; quote it") from None
    return key.strip(), value, where
