"""Checkpoints: every damaged bit found, nothing of a stranger executed."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import re
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from palette import _sealed
from palette import checkpoint as checkpoints
from palette import config as configs
from palette.checkpoint import CheckpointError

ASSETS = Path(__file__).parent / "assets" / "checkpoints"
PACKAGE = Path(__file__).parent.parent / "palette"
FILES = ("model.safetensors", "ema.safetensors", "trainer.pt", "config.yaml", "meta.json")


def state(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    conv = torch.randn(4, 3, 3, 3, generator=draw).to(memory_format=torch.channels_last)
    return {
        "conv.weight": conv,
        "half": torch.randn(5, generator=draw).bfloat16(),
        "count": torch.tensor(step),
    }


def save(run: Path, step: int) -> Path:
    return checkpoints.save(
        run,
        step,
        model=state(step),
        ema=state(step + 1000),
        trainer={"step": step, "window": [0.1, 1e-300], "optimizer": {"m": state(step)["half"]}},
        config_yaml="run:\n  dir: runs/x\n",
        meta={"samples": 4 * step},
    )


def reason(path: Path, load: Callable[[Path], Any] = checkpoints.load) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step_00000007"
    assert sorted(entry.name for entry in path.iterdir()) == sorted(FILES)
    for found in (checkpoints.load(path), checkpoints.load(tmp_path), checkpoints.latest(tmp_path)):
        assert found.step == 7
        assert found.meta["samples"] == 28
        assert found.config == "run:\n  dir: runs/x\n"
        assert found.trainer["window"] == [0.1, 1e-300]
        for name, tensor in state(7).items():
            assert torch.equal(found.model[name], tensor)
            assert found.model[name].dtype == tensor.dtype
        assert torch.equal(found.ema["half"], state(1007)["half"])
    only = checkpoints.load(path, ("ema",))
    assert only.model == {}
    assert only.trainer == {}
    digest = subprocess.run(
        ["sha256sum", path / "ema.safetensors"], capture_output=True, text=True, check=True
    )
    assert only.digest == checkpoints.load(path, ()).digest == digest.stdout[:12]


@pytest.mark.parametrize("version", sorted(path.name for path in ASSETS.iterdir()))
def test_checkpoints_of_every_release(version: str) -> None:
    """What an earlier version wrote with ``save`` and ``export`` is what this one reads."""
    for path in (ASSETS / version / "run", ASSETS / version / "model.safetensors"):
        found = checkpoints.load(path)
        assert (found.step, found.skipped) == (7, ())
        assert configs.from_yaml(found.config).model.channels == 64
        for name, tensor in state(1007).items():
            assert torch.equal(found.ema[name], tensor)
    assert torch.equal(checkpoints.latest(ASSETS / version / "run").model["half"], state(7)["half"])


def test_open_model(tmp_path: Path) -> None:
    save(tmp_path, 7)
    ema, raw = checkpoints.open_model(tmp_path), checkpoints.open_model(tmp_path, "raw")
    assert torch.equal(ema.state["half"], state(1007)["half"])
    assert torch.equal(raw.state["half"], state(7)["half"])
    assert len(ema.digest) == len(raw.digest) == 12
    assert ema.digest != raw.digest
    with pytest.raises(CheckpointError, match=r"holds no checkpoint|lists no ema-swa.safetensors"):
        checkpoints.open_model(tmp_path, "swa")


def test_further_averages_have_names(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    packed = {name: tensor.contiguous() for name, tensor in state(3).items()}
    checkpoints.save_file(packed, path / "ema-swa.safetensors")
    meta = _sealed.read(path / "meta.json")
    meta["files"]["ema-swa.safetensors"] = _sealed.facts_of(path / "ema-swa.safetensors")
    (path / "meta.json").write_bytes(
        _sealed.seal({key: value for key, value in meta.items() if key != "sha256"})
    )
    found = checkpoints.open_model(path, "swa")
    assert torch.equal(found.state["half"], state(3)["half"])
    assert found.digest == meta["files"]["ema-swa.safetensors"]["sha256"][:12]
    with pytest.raises(CheckpointError, match=r"no ema-0\.9\.safetensors, but .*ema-swa"):
        checkpoints.open_model(path, "0.9")


def test_nothing_to_load(tmp_path: Path) -> None:
    assert "no such checkpoint" in reason(tmp_path / "none")
    assert "meta.json: not a checkpoint" in reason(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "holds no checkpoint" in reason(tmp_path)


def test_500_bit_flips_are_all_found(tmp_path: Path) -> None:
    path, draw = save(tmp_path, 1), random.Random(0)
    sizes = {name: (path / name).stat().st_size for name in FILES}
    silent = []
    for index in range(500):
        name = FILES[index % len(FILES)]
        offset, bit = draw.randrange(sizes[name]), draw.randrange(8)
        raw = bytearray((path / name).read_bytes())
        raw[offset] ^= 1 << bit
        (path / name).write_bytes(raw)
        try:
            checkpoints.load(path)
            message = ""
        except CheckpointError as error:
            message = str(error)
        if name not in message or len(message.splitlines()) != 1:
            silent.append((name, offset, bit, message))
        raw[offset] ^= 1 << bit
        (path / name).write_bytes(raw)
    assert silent == []
    checkpoints.load(path)


def test_damaged_checkpoints_are_passed_over_and_named(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    draw = random.Random(1)

    def truncate(path: Path) -> None:
        raw = path.read_bytes()
        path.write_bytes(raw[: draw.randrange(len(raw))])

    def nul(path: Path) -> None:
        path.write_bytes(bytes(path.stat().st_size))

    def swap(path: Path) -> None:
        other = path.with_name(FILES[(FILES.index(path.name) + 1) % len(FILES)])
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)

    damages: list[Callable[[Path], object]] = [truncate] * 10
    damages += [nul, swap, Path.unlink, lambda path: path.write_bytes(b"")]
    damages += [lambda path: path.write_bytes(path.read_bytes() + b"\0")]
    for name in FILES:
        for damage in damages:
            bad = save(tmp_path, 2)
            damage(bad / name)
            found = checkpoints.latest(tmp_path)
            assert found.path == good
            assert len(found.skipped) == 1
            assert found.skipped[0].startswith(f"{bad}/")
            assert reason(bad)
    (good / "model.safetensors").unlink()
    assert "no checkpoint can be loaded" in reason(tmp_path)


def test_crafted_meta_stays_inside_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    facts = {"size": 1, "sha256": "0"}
    for meta in (
        {"format": 1, "step": 1},
        {"format": 1, "step": 1, "files": {"../../secret": facts}},
        {"format": 1, "step": 1, "files": {"/etc/passwd": facts}},
        {"format": 1, "step": 1, "files": {"model.safetensors": 3}},
        {"format": 1, "step": "1", "files": {}},
        {"format": 99, "step": 1, "files": {}},
        {"format": 1, "step": 1, "files": {}},
    ):
        (path / "meta.json").write_bytes(_sealed.seal(meta))
        assert "meta.json" in reason(path)
    (path / "meta.json").write_text("[" * 100_000)
    assert "meta.json: damaged" in reason(path)


def test_export_and_its_bit_flips(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    checkpoints.export(path, state(3), "run: {}\n", {"step": 3})
    found = checkpoints.open_model(path)
    assert (found.config, found.step) == ("run: {}\n", 3)
    assert torch.equal(found.state["conv.weight"], state(3)["conv.weight"])
    assert "holds no raw weights" in reason(path, lambda p: checkpoints.open_model(p, "raw"))
    raw, draw, silent = path.read_bytes(), random.Random(3), []
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    offsets = [draw.randrange(header) for _ in range(150)]
    offsets += [draw.randrange(header, len(raw)) for _ in range(150)]
    for offset in offsets:
        bad = bytearray(raw)
        bad[offset] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        with contextlib.suppress(CheckpointError):
            after = checkpoints.load(path)
            # Only bits that mean nothing may change, such as one of the header's padding.
            same = all(torch.equal(after.ema[name], tensor) for name, tensor in state(3).items())
            if not same or after.config != "run: {}\n" or after.ema.keys() != state(3).keys():
                silent.append(offset)
    assert silent == []


def test_strange_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    torch_free = {"w": torch.zeros(3)}
    checkpoints.save_file(torch_free, path)
    assert "no palette config in its metadata" in reason(path)
    raw = path.read_bytes()
    header = b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,999]}}'
    for bad in (
        b"",
        raw[:-1],
        raw + b"\0",
        struct.pack("<Q", 2**62) + raw[8:],
        struct.pack("<Q", len(header)) + header + bytes(12),
        b"\0" * 100,
        b"PK\x03\x04" + bytes(50),
    ):
        path.write_bytes(bad)
        assert "not a readable safetensors file" in reason(path)


class Bomb:
    """Runs a command when unpickled without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Evaluated(Bomb):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').system({self.command!r})",)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_malicious_pickles_run_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path, refused = tmp_path / "bad.pth", []
    for kind in (Bomb, Evaluated):
        bomb = kind(f"touch {marker}")
        values = (bomb, {"state": {0: {"exp_avg": bomb}}}, [torch.zeros(2), (bomb,)])
        for value in values:
            for new_format in (True, False):
                torch.save(value, path, _use_new_zipfile_serialization=new_format)
                refused.append(reason(path, checkpoints.load_torch))
            for protocol in range(6):
                path.write_bytes(pickle.dumps(value, protocol))
                refused.append(reason(path, checkpoints.load_torch))
    assert len(refused) == 48
    named = [text for text in refused if re.search("refers to (posix.system|eval),", text)]
    assert len(named) >= 24
    assert all("weights_only" not in text for text in refused)
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            raw = pickle.dumps(Bomb(f"touch {marker}"), 2)
            facts = tarfile.TarInfo(name)
            facts.size = len(raw)
            archive.addfile(facts, io.BytesIO(raw))
    assert reason(path, checkpoints.load_torch)
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(scripted, path)
    assert "TorchScript" in reason(path, checkpoints.load_torch)
    assert not marker.exists()


def test_hostile_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"

    def archive(*names: str, compression: int = zipfile.ZIP_STORED, size: int = 10) -> None:
        with zipfile.ZipFile(path, "w", compression) as file:
            for name in names:
                file.writestr(name, bytes(size))

    for name in ("../x", "a/../../x", "/etc/x", "C:\\x", "a\\..\\x", "\\x"):
        archive("a/data.pkl", name)
        assert "leaves the archive" in reason(path, checkpoints.load_torch)
    archive("a/data.pkl", "a/data/0", compression=zipfile.ZIP_DEFLATED, size=50_000_000)
    assert path.stat().st_size < 200_000
    assert "is compressed" in reason(path, checkpoints.load_torch)
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive("a/data.pkl", "a/data.pkl")
    assert "same name" in reason(path, checkpoints.load_torch)
    archive("a/data.pkl", "a/data/0")
    raw = path.read_bytes()
    at = raw.rindex(b"PK\x01\x02")  # the size fields of the last entry of the directory
    huge = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(raw[: at + 20] + huge + raw[at + 28 :])
    assert "entries claim" in reason(path, checkpoints.load_torch)
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_torch_files(tmp_path: Path) -> None:
    path, draw = tmp_path / "a.pth", random.Random(4)
    torch.save({"w": torch.randn(400), "name": "x"}, path)
    raw = path.read_bytes()
    value = checkpoints.load_torch(path)
    assert value["name"] == "x"
    for _ in range(50):
        path.write_bytes(raw[: draw.randrange(len(raw))])
        reason(path, checkpoints.load_torch)
    begin = raw.index(b"data/0") + 64
    for _ in range(50):  # in the tensor's data, which torch.load itself does not check
        bad = bytearray(raw)
        bad[begin + draw.randrange(1000)] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        assert "does not match its CRC-32" in reason(path, checkpoints.load_torch)
    for junk in (b"", b"hello", bytes(1000), b"\x80\x02", b"PK\x03\x04", b"\x80\x02]" * 3000):
        path.write_bytes(junk)
        reason(path, checkpoints.load_torch)
    torch.save({"w": torch.randn(400)}, path)
    assert "the limit is 100" in reason(path, lambda p: checkpoints.load_torch(p, max_bytes=100))
    assert "not a regular file" in reason(tmp_path, checkpoints.load_torch)
    assert "No such file" in reason(tmp_path / "none", checkpoints.load_torch)


def test_values_that_claim_more_than_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path)
    assert "claims 4000000000000 bytes" in reason(path, checkpoints.load_torch)
    torch.save({"w": torch.empty(10**9, 10**3, device="meta")}, path)
    assert "not dense on the CPU" in reason(path, checkpoints.load_torch)
    torch.save([torch.eye(3).to_sparse()], path)
    assert "not dense on the CPU" in reason(path, checkpoints.load_torch)
    laughs: Any = [torch.zeros(1)]
    for _ in range(60):
        laughs = [laughs, laughs]
    torch.save(laughs, path)
    checkpoints.load_torch(path)
    endless: list[Any] = []
    endless.append(endless)
    torch.save(endless, path)
    checkpoints.load_torch(path)
    torch.save({"scalar": torch.zeros(1).expand(100), "view": torch.arange(9)[3:6]}, path)
    assert checkpoints.load_torch(path)["view"].tolist() == [3, 4, 5]


def test_only_one_file_unpickles() -> None:
    forbidden = re.compile(
        r"torch\.load\(|\bimport \w*pickle|pickle\.\w|weights_only=False|yaml\.load\("
        r"|allow_pickle=True|shell=True|(?<![\w.])(?:eval|exec)\("
    )
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = [line for line in path.read_text().splitlines() if forbidden.search(line)]
        code = [line for line in lines if "torch.load(" in line or "weights_only=False" in line]
        if path.name == "checkpoint.py":
            assert [line.strip() for line in code] == [
                'value = torch.load(path, map_location="cpu", weights_only=True)'
            ]
        elif path.name != "_archive.py":
            assert lines == [], path
