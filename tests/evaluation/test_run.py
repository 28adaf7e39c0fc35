"""An evaluation from the command line: what it leaves, and that it can be killed and shared out."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from palette.cli import main
from palette.data.sources import Classes, Folder, Pairs
from palette.data.split import First, Remainder
from palette.evaluation import contents, layout
from palette.evaluation import run as evaluation
from palette.evaluation.plan import Request
from palette.evaluation.progress import Bars
from palette.evaluation.scoring import Scoring
from palette.files import write_png
from palette.metrics.scorer import Networks
from palette.training.distributed import World

ROOT = Path(__file__).parents[2]


def results(folder: Path) -> dict[str, Any]:
    """What was found, without the names of folders."""
    found = json.loads((folder / "scores.json").read_text())
    return {key: found[key] for key in ("scores", "absent", "per_image", "paper")}


def pictures(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))
    }


def evaluate(run: Path, output: Path, *more: str) -> int:
    return main(["evaluate", str(run), "--output", str(output), "--debug", *more])


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory) -> Path:
    """An evaluation that nobody disturbed: 7 inputs, 3 samples each."""
    output = tmp_path_factory.mktemp("straight")
    assert main(_command(run, output)) == 0
    return output


def test_it_leaves_what_it_promises(run, straight):
    names = json.loads((straight / "names.json").read_text())
    plan = json.loads((straight / "evaluation.json").read_text())
    found = results(straight)
    numbers = [f"{number:05d}" for number in range(7)]
    assert list(names) == numbers
    assert names["00000"].startswith("astronaut")
    for folder in ("inputs", "truth", "masks"):
        assert sorted(path.stem for path in (straight / folder).iterdir()) == numbers
    samples = sorted(path.stem for path in (straight / "samples").iterdir())
    assert samples == [f"{number}_{copy}" for number in numbers for copy in range(3)]
    assert plan["task"] == "inpaint"
    assert plan["weights"] == "ema"
    assert plan["images"] == 7
    assert plan["steps"] == 2
    assert "random" in plan["scoring"]["feature network"]
    assert set(found["per_image"]["psnr"]) == set(samples)
    assert set(found["per_image"]["diversity_ms_ssim"]) == set(numbers)
    assert found["scores"]["fid_random"]["images"] == 21
    assert found["scores"]["mae_known"]["value"] == 0
    assert found["paper"]["table"] == "T9"
    assert found["paper"]["rows"][2]["values"]["fid"] == 6.4
    differences = {entry["what"]: entry for entry in found["paper"]["differences"]}
    assert differences["images"] == {"what": "images", "here": "7", "paper": "10000"}
    assert {"data", "feature network", "image size", "steps"} <= differences.keys()
    assert "NOT Inception" in (straight / "scores.txt").read_text()


def test_a_sample_is_a_function_of_its_seed(run, straight, tmp_path):
    plan = json.loads((straight / "evaluation.json").read_text())
    assert evaluate(run, tmp_path, "--limit", "5") == 0  # in other batches, without copies
    name = "samples/00004_0.png"
    with Image.open(straight / name) as first, Image.open(tmp_path / name) as second:
        record = json.loads(first.info["palette"])
        alike, again = np.asarray(first).astype(int), np.asarray(second).astype(int)
    assert record["seed"] == 4
    assert record["weights"] == plan["digest"]
    assert abs(alike - again).max() <= 1
    with Image.open(straight / "samples" / "00004_1.png") as image:
        assert json.loads(image.info["palette"])["seed"] == 4 + (1 << 32)
        other = np.asarray(image).astype(int)
    assert abs(alike - other).max() > 20
    with (
        Image.open(straight / "truth" / "00004.png") as truth,
        Image.open(straight / "masks" / "00004.png") as mask,
    ):
        known = np.asarray(mask) == 0
        assert known.sum() == 256 - 64
        assert (np.asarray(truth)[known] == alike[known]).all()


def test_killed_and_called_again_gives_the_same_scores(run, straight, tmp_path):
    output = tmp_path / "killed"
    script = f"from palette.cli import main; main({_command(run, output)!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    while process.poll() is None and not list(output.glob("samples/0000[1-9]_*.png")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # whatever it got done: some of it is damaged, some lost, some half written
    first = output / "samples" / "00000_1.png"
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 8
    first.write_bytes(content)
    (output / "truth" / "00000.png").unlink()
    (output / "samples" / f".tmp-{process.pid}-00006_2.png").write_bytes(b"half")
    (output / "scores.json").unlink(missing_ok=True)
    assert main(_command(run, output)) == 0
    assert pictures(output) == pictures(straight)
    assert results(output) == results(straight)
    assert not list(output.rglob(".tmp-*"))


@pytest.mark.parametrize("written", [0, 6, 30])
def test_stopped_between_two_pictures(run, straight, tmp_path, monkeypatch, capsys, written):
    def stop(path, image, record, number=itertools.count()):  # noqa: B008 - it counts the calls
        if next(number) == written:
            raise KeyboardInterrupt
        write_png(path, image, record)

    with monkeypatch.context() as patched:
        patched.setattr(layout, "write_png", stop)
        assert main(_command(run, tmp_path)) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert len(pictures(tmp_path)) == written
    assert main(_command(run, tmp_path)) == 0
    assert pictures(tmp_path) == pictures(straight)
    assert results(tmp_path) == results(straight)


def test_what_is_finished_is_left_alone(run, straight):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*.png")}
    found = results(straight)
    assert main(_command(run, straight)) == 0
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*.png")} == before
    assert results(straight) == found


def test_two_processes_equal_one(run, straight, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "--standalone", "-m", "palette", *_command(run, tmp_path / "two")],
        env=environment,
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    one, two = results(straight), results(tmp_path / "two")
    assert pictures(tmp_path / "two") == pictures(straight)
    assert two["per_image"] == one["per_image"]
    assert two["scores"].keys() == one["scores"].keys()
    for key, score in one["scores"].items():  # sums of a process each are rounded on their own
        assert math.isclose(score["value"], two["scores"][key]["value"], rel_tol=1e-9), key


def test_raw_weights_are_another_evaluation(run, straight, tmp_path, capsys):
    assert main([*_command(run, straight), "--weights", "raw"]) == 2
    message = capsys.readouterr().err
    assert "holds another evaluation (digest: " in message
    assert message.count("\n") == 1
    assert evaluate(run, tmp_path, "--weights", "raw", "--limit", "2") == 0
    assert results(tmp_path)["scores"]["psnr"]["images"] == 2
    assert main([*_command(run, tmp_path / "x"), "--weights", "mean"]) == 1
    assert (
        "lists no ema-mean.safetensors, but config.yaml, ema-0.5.safetensors"
        in capsys.readouterr().err
    )


def test_other_noise_levels_are_another_evaluation(run, straight, capsys):
    same = ["--set", "sample.end=0.02", "run.dir=elsewhere"]  # of sample.grid=published alone
    assert main([*_command(run, straight), *same]) == 0
    assert main([*_command(run, straight), "--set", "schedule.end=0.02"]) == 2
    assert "holds another evaluation (levels: " in capsys.readouterr().err


def test_what_the_pictures_are_their_contents_say(run, tmp_path, capsys):
    folder, moved, mask = tmp_path / "pictures", tmp_path / "moved", tmp_path / "mask.png"
    for seed, name in enumerate("ab"):
        _noise(folder / f"{name}.png", seed)
    _noise(mask, 2)

    def again(path: Path) -> int:
        data = ["data.source=folder", f"data.path={path}", "data.validation=0"]
        given = ["evaluate", str(run), "--output", str(tmp_path / "out"), "--set", *data]
        return main([*given, f"task.mask={mask}"])

    assert again(folder) == 0
    before = pictures(tmp_path / "out")
    folder.rename(moved)
    assert again(moved) == 0
    assert pictures(tmp_path / "out") == before
    _noise(moved / "b.png", 3)
    assert again(moved) == 2
    assert "holds another evaluation (data.pictures: " in capsys.readouterr().err
    _noise(moved / "b.png", 1)
    assert again(moved) == 0
    _noise(mask, 4)
    assert again(moved) == 2
    assert "holds another evaluation (data.masks: " in capsys.readouterr().err


def test_conditions_and_labels_are_part_of_what_a_picture_is(tmp_path):
    for folder in ("color", "gray", "gray2"):
        _noise(tmp_path / folder / "a.png", len(folder))
    color, gray, other = (str(tmp_path / name) for name in ("color", "gray", "gray2"))
    _noise(tmp_path / "classes" / "cat" / "a.png", 0)
    _noise(tmp_path / "classes" / "dog" / "a.png", 0)
    classes = Classes(tmp_path / "classes")
    sources = [
        Folder(color),
        Pairs(color, conditions=gray),
        Pairs(color, conditions=other),
        Pairs(gray, conditions=color),
        First(classes, 1),
        Remainder(classes, 1),
    ]
    alone = World(0, 1, torch.device("cpu"))
    found = [contents.pictures(source, 1, alone, Bars(active=False)) for source in sources]
    assert len(set(found)) == len(sources)


def test_several_weights_stand_side_by_side(run, tmp_path, capsys):
    assert evaluate(run, tmp_path, "--weights", "ema,raw,0.5,swa", "--limit", "2") == 0
    for name in ("ema", "raw", "0.5", "swa"):
        assert results(tmp_path / name)["scores"]["psnr"]["images"] == 2
        assert (tmp_path / name / "index.html").exists()
    table = capsys.readouterr().out.splitlines()
    assert ["metric", "ema", "raw", "0.5", "swa"] in [line.split() for line in table]


def test_without_output_it_goes_to_the_run_that_was_named(run, tmp_path, monkeypatch, capsys):
    renamed = tmp_path / "renamed"
    shutil.copytree(run / "checkpoints", renamed / "checkpoints")
    newest = sorted((renamed / "checkpoints").iterdir())[-1]
    export = tmp_path / "model.safetensors"
    assert main(["convert", str(run), str(export)]) == 0
    monkeypatch.chdir(tmp_path)
    expected = {
        str(renamed): renamed,
        str(newest): renamed,
        "renamed": Path("renamed"),
        str(export): run,  # in no run: what its config says
    }
    for given, folder in expected.items():
        capsys.readouterr()
        assert main(["evaluate", given, "--dry-run"]) == 0
        assert f"output: {folder / 'evaluation' / 'ema'}\n" in capsys.readouterr().out


def test_the_folder_of_a_run_is_where_it_goes_by_itself(run, capsys):
    assert main(["evaluate", str(run), "--limit", "1", "--human"]) == 0
    page, trial = map(Path, capsys.readouterr().out.split()[-2:])
    assert page == run / "evaluation" / "ema" / "index.html"
    assert "Beside the paper" in page.read_text()
    assert trial.read_text().count("data:image/png") >= 2
    assert (page.parent / "samples" / "00000_0.png").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("held_out", [0, 2])
def test_classes_by_folder_are_numbered_over_all_data(run, classifier, tmp_path, capsys, held_out):
    names = ("data/emu/1", "data/ant/2", "data/emu/3", "data/cat/4")
    for seed, name in enumerate(names):
        _noise(tmp_path / f"{name}.png", seed)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{name}.png\n" for name in names))
    data = ["data.source=list", f"data.path={listed}", f"data.validation={held_out}"]
    data += ["data.validation_pictures=2"] if held_out else ["data.limit=4"]
    arguments = ["evaluate", str(run), "--labels", "folders", "--limit", "1", "--set", *data]
    arguments += ["--output", str(tmp_path / "out")]
    emu = classifier(2, 3)  # of ant, cat, emu; the two that are held out are emus
    assert main([*arguments, "--classifier", emu]) == 0
    assert results(tmp_path / "out")["scores"]["ca"]["value"] == 100
    assert main([*arguments, "--classifier", classifier(2, 1000)]) == 2
    message = capsys.readouterr().err
    assert "lie in 3 folders, the classifier has 1000 classes" in message
    assert message.count("\n") == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_scoring_lacks_is_said_before_anything_is_drawn(run, classifier, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("someone 1\n")
    given = {
        "no such folder": ["--reference", str(tmp_path / "no")],
        "no class of 7 inputs": [
            *("--classifier", classifier(0, 2)),
            *("--labels", str(tmp_path / "labels.txt")),
        ],
    }
    for words, more in given.items():
        output = tmp_path / words
        assert main(["evaluate", str(run), "--output", str(output), *more]) == 2
        assert words in capsys.readouterr().err
        assert not list(output.rglob("*.png"))


def test_a_table_whose_pictures_the_paper_does_not_list(run, tmp_path):
    _noise(tmp_path / "a.png", 0)
    (tmp_path / "list.txt").write_text("a.png\n")
    data = ["data.source=list", f"data.path={tmp_path / 'list.txt'}", "data.validation=0"]
    config, split = evaluation.read_config(str(run), None, data)
    request = Request(str(run), config, split, table="uncrop-top50")
    alone = World(0, 1, torch.device("cpu"))
    evaluation.evaluate(request, tmp_path / "out", Scoring(Networks()), alone)
    found = results(tmp_path / "out")["paper"]
    differences = {entry["what"]: entry["here"] for entry in found["differences"]}
    assert found["table"] == "T10"
    assert differences["data"] == "list list.txt"
    assert "images" not in differences  # 0: it does not say how many


def test_pictures_that_are_missing_or_damaged_are_named(run, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    data = ["--set", "data.source=folder", f"data.path={folder}", "data.validation=0"]
    arguments = ["evaluate", str(run), "--output", str(tmp_path / "out"), *data]
    assert main(arguments) == 2
    assert "pictures: no image in this folder" in capsys.readouterr().err
    for name in ("a", "b", "c"):
        noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[:200])
    assert main([*arguments, "--batch-size", "1"]) == 1
    message = capsys.readouterr().err
    assert "b.png" in message
    assert message.count("\n") == 1
    (folder / "b.png").write_bytes(whole)
    assert main([*arguments, "--batch-size", "1"]) == 0
    assert list(json.loads((tmp_path / "out" / "names.json").read_text()).values()) == [
        "a.png",
        "b.png",
        "c.png",
    ]


def _noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def _command(run: Path, output: Path) -> list[str]:
    several = ["--samples-per-input", "3", "--batch-size", "4"]
    return ["evaluate", str(run), "--output", str(output), *several]
