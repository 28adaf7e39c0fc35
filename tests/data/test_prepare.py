"""Folders packed into shards: what is taken, what not, and the same bytes however it is run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from palette.cli import main
from palette.data import images
from palette.data.images import UnreadableImage
from palette.data.order import Draws
from palette.data.prepare import Settings, prepare
from palette.data.shards import Shards

SMALL = Settings(size=16, min_size=10, shard_bytes=None, shard_pictures=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty photographs of two classes, and of every kind of trouble one."""
    rng = np.random.default_rng(0)
    where = tmp_path / "in"
    for number in range(20):
        pixels = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        path = (
            where
            / ("ant" if number % 2 else "bee")
            / f"p.{number:02d}.{'jpg' if number < 10 else 'png'}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (where / "ant" / "again.png").write_bytes((where / "ant" / "p.11.png").read_bytes())
    (where / "ant" / "broken.jpg").write_bytes((where / "ant" / "p.01.jpg").read_bytes()[:300])
    (where / "bee" / "empty.png").write_bytes(b"")
    Image.new("RGB", (9, 40)).save(where / "bee" / "small.png")
    Image.new("RGB", (12, 13), (1, 2, 3)).save(where / "bee" / "kept.png")
    return where


def _contents(out: Path) -> dict[str, bytes]:
    """Every file that is to be the same; the journal, which is not for anyone else, is one."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_what_is_taken_and_what_not(folder: Path, tmp_path: Path) -> None:
    report = prepare(folder, tmp_path / "out", SMALL)
    assert (report["pictures"], report["kept"], report["resized"]) == (25, 21, 20)
    assert report["left_out"] == {"unreadable": 2, "too small": 1, "duplicate": 1}
    named = {each["name"]: each["reason"] for each in report["named"]}
    assert named["ant/p.11.png"] == "ant/p.11.png: came before"
    assert "damaged image" in named["ant/broken.jpg"]
    assert named["bee/empty.png"].endswith("empty.png: empty file")
    assert named["bee/small.png"].endswith("small.png: 9x40 pixels")
    assert [shard["pictures"] for shard in report["shards"]] == [4, 4, 4, 4, 4, 1]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    shards = Shards(tmp_path / "out", classes=2)
    assert len(shards) == 21
    assert sorted(set(shards.labels.tolist())) == [0, 1]
    sizes = [min(shards.load(index, Draws(0)).size) for index in range(21)]
    assert sorted(sizes) == [12, *[16] * 20]


def test_pictures_stay_what_they_are(folder: Path, tmp_path: Path) -> None:
    """Without a size each file is kept; with one, the aspect is, and the mean of the pixels."""
    out = tmp_path / "out"
    prepare(folder, out, Settings(keep_duplicates=True))
    with tarfile.open(out / "shard-000000.tar") as archive:
        kept = [archive.extractfile(each).read() for each in archive]  # type: ignore[union-attr]
    files = sorted(path.read_bytes() for path in folder.rglob("*.*") if "broken" not in path.name)
    assert sorted(kept) == [data for data in files if data]
    Image.linear_gradient("L").resize((90, 60)).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n")
    prepare(tmp_path / "list.txt", tmp_path / "one", Settings(size=20))
    image = Shards(tmp_path / "one").load(0, Draws(0))
    assert image.size == (30, 20)
    before = np.asarray(images.read(tmp_path / "a.png"), float)
    assert np.asarray(image, float).mean() == pytest.approx(before.mean(), abs=0.5)


def test_shards_end_before_their_size(folder: Path, tmp_path: Path) -> None:
    report = prepare(folder, tmp_path / "out", Settings(size=16, shard_bytes=8000))
    assert len(report["shards"]) > 2
    with_end = 10240  # tar fills its last record
    assert all(shard["bytes"] <= with_end for shard in report["shards"])


def test_any_number_of_processes_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "one", SMALL)
    prepare(folder, tmp_path / "three", SMALL, workers=3)
    assert _contents(tmp_path / "one") == _contents(tmp_path / "three")


@pytest.mark.parametrize("stop", [1, 6, 14, 24])
def test_stopped_anywhere_it_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    prepare(folder, tmp_path / "whole", SMALL)
    calls: list[object] = []
    read = images.read

    def stopping(*arguments: object, **options: object) -> Image.Image:
        calls.append(arguments)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return read(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "read", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "out", SMALL)
    prepare(folder, tmp_path / "out", SMALL)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")
    done = len(calls)
    prepare(folder, tmp_path / "out", SMALL)
    assert len(calls) == done, "nothing is left to do"


def test_lost_shards_and_half_lines_are_made_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(folder, out, SMALL)
    whole = _contents(out)
    (out / "shard-000002.tar").unlink()
    (out / "shard-000004.tar").write_bytes(b"short")
    with (out / ".prepare.jsonl").open("a") as file:
        file.write('{"shard": "sha')
    prepare(folder, out, SMALL)
    assert _contents(out) == whole


def test_killed_it_goes_on_and_leaves_no_process(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(400):
        Image.effect_noise((60, 40 + number), 80).save(folder / f"{number}.png")
    command = [sys.executable, "-m", "palette", "prepare", str(folder), str(out)]
    command += ["--size", "16", "--images-per-shard", "4", "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True)
    while not (out / "shard-000001.tar").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    for _ in range(1000):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("workers outlive the process that was killed")
    settings = Settings(size=16, shard_bytes=None, shard_pictures=4)
    prepare(folder, out, settings)
    prepare(folder, tmp_path / "whole", settings)
    assert _contents(out) == _contents(tmp_path / "whole")


def test_folders_that_hold_something_else(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(folder, out, SMALL)
    with pytest.raises(ValueError, match=r"out: holds shards made otherwise \(size\)"):
        prepare(folder, out, Settings(size=8, min_size=10, shard_bytes=None, shard_pictures=4))
    (folder / "ant" / "again.png").unlink()
    with pytest.raises(ValueError, match=r"made otherwise \(pictures, files\)"):
        prepare(folder, out, SMALL)
    (out / ".prepare.jsonl").write_text("{}}\n")
    with pytest.raises(ValueError, match=r"prepare\.jsonl: damaged"):
        prepare(folder, out, SMALL)
    (out / ".prepare.jsonl").unlink()
    with pytest.raises(ValueError, match=r"out: holds \.tar files already"):
        prepare(folder, out, SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file"):
        prepare(folder, tmp_path / "file", SMALL)


@pytest.mark.parametrize("ending", ["png", "bmp"])
def test_other_pictures_of_the_same_names(tmp_path: Path, ending: str) -> None:
    """Without compression they even have the same sizes. A copy is no other picture."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            pixels = rng.integers(0, 256 if name == "a" else 9, (12, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.{ending}")
    prepare(tmp_path / "a", tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match=r"out: holds shards made otherwise \(files\)"):
        prepare(tmp_path / "b", tmp_path / "out", SMALL)
    shutil.copytree(tmp_path / "a", tmp_path / "c", copy_function=shutil.copyfile)
    assert prepare(tmp_path / "c", tmp_path / "out", SMALL)["kept"] == 2


def test_names_without_an_ending(tmp_path: Path) -> None:
    """A list may have them; in a shard a picture is found by its ending."""
    for name, kind in {"x": "PNG", "photo": "JPEG", "1.0": "WEBP", "y.PNG": "PNG"}.items():
        Image.effect_noise((30, 30), 50).save(tmp_path / name, kind)
    (tmp_path / "list.txt").write_text("x\nphoto\n1.0\ny.PNG\n")
    for size, endings in ((None, "png jpg webp png"), (16, "png jpg png png")):
        out = tmp_path / f"out {size}"
        assert prepare(tmp_path / "list.txt", out, Settings(size=size))["kept"] == 4
        assert len(Shards(out)) == 4
        with tarfile.open(out / "shard-000000.tar") as archive:
            assert [name.rsplit(".")[1] for name in archive.getnames()] == endings.split()


def test_what_others_hid_in_the_folder_stays(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".tmp-mine").mkdir(parents=True)
    (out / f".tmp-{os.getppid()}-report.json").write_bytes(b"being written")
    (out / f".tmp-{2**22 + 1}-report.json").write_bytes(b"left by one killed")
    prepare(folder, out, SMALL)
    left = sorted(path.name for path in out.glob(".tmp-*"))
    assert left == sorted((".tmp-mine", f".tmp-{os.getppid()}-report.json"))


def test_one_at_a_time(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = "from palette.data.packing import reserved; from pathlib import Path; import sys\n"
    program += "with reserved(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match="out: another palette prepare writes into it"):
            prepare(folder, out, SMALL)
        other.kill()
    assert prepare(folder, out, SMALL)["kept"] == 21


def test_nothing_to_take(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="no image in this folder"):
        prepare(tmp_path / "in", tmp_path / "out", SMALL)
    (tmp_path / "in" / "a.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableImage, match=r"none of 1 images can be used; the first: .*a\.png"):
        prepare(tmp_path / "in", tmp_path / "out", SMALL)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["prepare", str(folder), str(out), "--size", "16", "--min-size", "10"]
    assert main([*command, "--images-per-shard", "4", "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "25 images: 21 kept (20 resized), left out: 2 unreadable, 1 too small" in shown
    assert f"train with data.source=shards data.path={out}" in shown
    assert "duplicate: ant/p.11.png: came before" in shown
    prepare(folder, tmp_path / "other", SMALL)
    assert _contents(out) == _contents(tmp_path / "other")
    assert main([*command, "--shard-size", "1", "--workers", "1"]) == 2
    assert "holds shards made otherwise" in capsys.readouterr().err
