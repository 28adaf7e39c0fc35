"""Finished models of strangers: any header, and still a model or one CheckpointError."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palette import checkpoint as checkpoints
from palette import config as configs
from palette import pipeline
from palette.build import build_network
from palette.checkpoint import CheckpointError
from palette.config import Config, ConfigError

OPTIONS = """
model: {channels: 32, channel_mults: [1], res_blocks: 1, attention_resolutions: []}
data: {image_size: 8}
"""
CONFIG = configs.from_yaml(OPTIONS)
OUTCOMES = {"opened": 0, "refused": 0}

numbers = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**64, 2**70, -(2**63)])
)
values = st.one_of(
    st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=5), st.lists(numbers)
)
dtypes = st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E5M2", "X"])
changes = st.one_of(
    st.tuples(st.just("dtype"), st.one_of(dtypes, values)),
    st.tuples(st.just("shape"), st.one_of(st.lists(numbers, max_size=5), values)),
    st.tuples(st.just("data_offsets"), st.one_of(st.tuples(numbers, numbers), values)),
    st.tuples(st.just("take another's place"), st.none()),
    st.tuples(st.just("leave"), st.none()),
    st.tuples(st.just("name"), st.text(max_size=9)),
    st.tuples(st.just("twice"), st.none()),
    st.tuples(st.just("config"), st.text(max_size=30)),
    st.tuples(st.just("meta"), values),
    st.tuples(st.just("bytes"), st.binary(max_size=40)),
    st.tuples(st.just("length"), numbers),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Where the fuzzed file goes, and the bytes of an honest one."""
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    weights = build_network(CONFIG).state_dict()
    checkpoints.export(path, weights, configs.to_yaml(CONFIG), {"step": 1})
    return path, path.read_bytes()


def changed(raw: bytes, change: tuple[str, Any], which: int) -> bytes:
    """The file with one change in its header."""
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    names = sorted(set(header) - {"__metadata__"})
    name, other = names[which % len(names)], names[(which + 1) % len(names)]
    what, value = change
    facts = header["__metadata__"]
    twice = ""
    if what in ("dtype", "shape", "data_offsets"):
        header[name][what] = value
    elif what == "take another's place":
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif what == "leave":
        del header[name]
    elif what == "name":
        header[value] = header.pop(name)
    elif what == "twice":
        twice = f'{{"{name}": {json.dumps(header[other])},'
    elif what == "config":
        facts["palette.config"] = value
    elif what == "meta":
        facts["palette.meta"] = json.dumps(value)
    text = json.dumps(header)
    text = twice + text[1:] if twice else text
    encoded = text.encode("utf-8", "surrogatepass")
    if what == "bytes":
        at = which % len(encoded)
        encoded = encoded[:at] + value + encoded[at + len(value) :]
    length = value % 2**64 if what == "length" else len(encoded)
    return struct.pack("<Q", length) + encoded + data


def sealed_again(path: Path) -> None:
    """As a stranger would: with the SHA-256 that belongs to what the file now holds."""
    try:
        tensors, metadata = checkpoints.load_safetensors(path)
        metadata.pop("palette.sha256", None)
        metadata["palette.sha256"] = checkpoints._digest(tensors, metadata)
        checkpoints.save_file(tensors, path, metadata=metadata)
    except Exception:
        return  # what cannot even be read stays as it is


@given(change=changes, which=st.integers(0, 10_000), seal=st.booleans())
def test_any_header(
    model: tuple[Path, bytes], change: tuple[str, Any], which: int, seal: bool
) -> None:
    path, raw = model
    path.write_bytes(changed(raw, change, which))
    if seal:
        sealed_again(path)
    message = "opened"
    try:
        pipeline.load(path, device="cpu")
    except (CheckpointError, ConfigError) as error:
        message = str(error)
    OUTCOMES["opened" if message == "opened" else "refused"] += 1
    assert len(message.splitlines()) == 1


def test_the_honest_file_opens(model: tuple[Path, bytes]) -> None:
    path, raw = model
    path.write_bytes(raw)
    assert pipeline.load(path, device="cpu").config.model.channels == 32
    print(OUTCOMES)


@pytest.mark.parametrize("kind", ["unet", "sr3"])
def test_what_a_small_file_describes_takes_no_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = f"{{kind: {kind}, channels: 128, attention_resolutions: []}}"
    options = f"model: {described}\ntask: {{augmentation: 0}}"
    path = checkpoints.export(tmp_path / "m.safetensors", {"a": torch.ones(1)}, options, {})
    built = []

    def build(config: Config) -> torch.nn.Module:
        built.append(build_network(config))
        return built[-1]

    monkeypatch.setattr(pipeline, "build_network", build)
    with pytest.raises(CheckpointError, match=r"does not fit its config: .*Missing key"):
        pipeline.load(path, device="cpu")
    assert {weight.device.type for each in built for weight in each.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("option", "value"),
    [("channels", 20000), ("channel_mults", [1] * 5000), ("res_blocks", 10**9)],
)
def test_a_network_beyond_all_measure_is_refused(option: str, value: Any, tmp_path: Path) -> None:
    options = f"model: {{{option}: {value}}}"
    path = checkpoints.export(tmp_path / "m.safetensors", {"a": torch.ones(1)}, options, {})
    with pytest.raises(ConfigError, match=f"model.{option} must be .* (at most|or fewer)"):
        pipeline.load(path, device="cpu")
