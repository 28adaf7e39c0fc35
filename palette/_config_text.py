"""A config's text as flat (key, value, place) entries, before any option is known.

A config may come out of a downloaded checkpoint, so its text is treated as data and nothing else:
no tags, no aliases (a few lines of them unfold into gigabytes), and no ``${...}``, which could read
the environment of whoever opens the file.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MAX_BYTES = 256 * 1024  # a real config has two or three thousand
# What YAML, which reads 007 and yes as values of its own, still says of an override that is text.
_QUOTED_OR_NULL = re.compile(r"""['"\[{]|(~|null|Null|NULL)?$""")


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


def entries(text: str, origin: str, texts: Container[str]) -> Iterator[tuple[str, Any, str]]:
    """(full key, plain value, where it stands) of every option written in the text.

    Options of ``texts`` are not interpreted: 007 is a folder of that name and no number.
    """
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
    written: dict[str, tuple[str, yaml.Node]] = {}
    _survey(root, origin, "", written, seen=set())
    for section, body in _plain(text, origin).items():
        below = isinstance(body, dict)
        values = {f"{section}.{name}": body[name] for name in body} if below else {section: body}
        for key, value in values.items():
            place, node = written.get(str(key), (origin, root))
            literal = key in texts and value is not None and isinstance(node, yaml.ScalarNode)
            yield str(key), node.value if literal else value, place


def _survey(
    node: yaml.Node,
    origin: str,
    path: str,
    written: dict[str, tuple[str, yaml.Node]],
    *,
    seen: set[int],
) -> None:
    """Note line and value of every key; refuse repeated keys, aliases, interpolations, nesting."""
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
            _survey(element, origin, f"{path}.{index}", written, seen=seen)
    else:
        for name_node, value in node.value:
            place = f"{origin}:{name_node.start_mark.line + 1}"
            if not isinstance(name_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: {key}: a name was expected before ':'")
            _refuse_interpolation(name_node.value, key, place)
            name = f"{path}.{name_node.value}".lstrip(".")
            if name_node.value == "<<":
                raise ConfigError(f"{place}: {key}: YAML merge keys are not used in configs")
            if name in written:
                raise ConfigError(f"{place}: {name} is given twice")
            written[name] = place, value
            _survey(value, origin, name, written, seen=seen)


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


def override(item: str, texts: Container[str]) -> tuple[str, Any, str]:
    """(full key, plain value, where) of one ``section.option=value``; ``texts`` as of entries."""
    where = f"--set {' '.join(item.split())}"
    key, separator, written = (part.strip() for part in item.partition("="))
    if not separator or "\n" in item:
        raise ConfigError(f"{where}: expected section.option=value")
    if item != item.encode(errors="ignore").decode():
        raise ConfigError(f"{where}: not UTF-8 text, so no checkpoint could keep it")
    _refuse_interpolation(item, key, where)
    if key in texts and not _QUOTED_OR_NULL.match(written):
        return key, written, where
    try:
        value = _plain(f"value: {written}", where).get("value")
    except ConfigError:
        raise ConfigError(f"{where}: the value is broken YAML; quote it") from None
    return key, value, where
