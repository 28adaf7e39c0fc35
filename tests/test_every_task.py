"""Every task from a config to a picture: a model of seconds, a foreign image of another size."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import palette
from palette.build import build_datasets, build_network
from palette.cli import main
from palette.config import Config
from palette.data.dataset import Batch, collate
from palette.data.order import Draws
from palette.data.photos import Photos
from palette.diffusion import objective
from palette.pipeline import Pipeline

TINY = """
model: {channels: 32, channel_mults: [1], res_blocks: 1, attention_resolutions: [], prediction: v}
data: {image_size: 16, batch_size: 8, validation: 16, flip: false}
train: {precision: float32, steps: 100, lr: 4e-3, warmup: 5, ema_decay: 0.9, sample_every: 0}
sample: {steps: 4}
"""
WIDTH, HEIGHT = 45, 28  # of the foreign image: neither square nor a multiple of anything


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Callable[..., Path]:
    """Train the tiny model through the command line, once for each set of options."""
    torch.set_num_threads(1)
    runs: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in runs:
            folder = tmp_path_factory.mktemp("task")
            (folder / "tiny.yaml").write_text(TINY)
            options = ["--set", *overrides, f"run.dir={folder / 'run'}"]
            assert main(["train", "-c", str(folder / "tiny.yaml"), *options, "--debug"]) == 0
            runs[overrides] = folder / "run"
        return runs[overrides]

    return run


@pytest.fixture
def photo(tmp_path) -> Path:
    """A smooth picture of an odd size."""
    x, y = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
    pixels = np.stack((200 * x + 20, 160 * y + 40, 120 - 80 * x * y), axis=2)
    Image.fromarray(pixels.round().astype(np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def held_out(config: Config) -> Batch:
    """Sixteen crops never trained on."""
    _, dataset = build_datasets(config)
    return collate(dataset.__getitems__([(0, index) for index in range(16)]))


def errors(model: Pipeline) -> tuple[float, float]:
    """Mean absolute error of samples of held-out crops, before and after training, in [0, 2]."""
    batch = held_out(model.config)
    torch.manual_seed(0)
    untrained = Pipeline(
        build_network(model.config), model.config, device="cpu", precision="float32"
    )
    mask = batch.get("mask")
    hole = torch.ones_like(batch["target"]) if mask is None else mask.expand_as(batch["target"])
    found = []
    for each in (untrained, model):
        drawn = each.sampler(solver="dpmpp_2m").sample(  # no noise that hides what was learned
            batch["condition"],
            seeds=batch["seed"],
            known=None if mask is None else batch["target"],
            mask=mask,
            label=batch.get("label"),
            level=batch.get("level"),
        )
        assert drawn.abs().max() <= 1
        found.append(((drawn - batch["target"]).abs() * hole).sum() / hole.sum())
    return found[0].item(), found[1].item()


def sampled(run: Path, folder: Path, *arguments: str) -> Image.Image:
    """The one picture that ``palette sample`` writes."""
    assert main(["sample", str(run), *arguments, "--output", str(folder), "--debug"]) == 0
    (written,) = folder.iterdir()
    with Image.open(written) as picture:
        return picture.convert("RGB")


def check_learning(run: Path) -> None:
    before, after = errors(palette.load(run))
    assert after < 0.7 * before


@pytest.mark.parametrize("mode", ["--seed=1", "--native", "--tiled"])
def test_inpaint(train, photo, tmp_path, mode):
    run = train("task.name=inpaint", "task.mask=center")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[9:20, 12:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ("--input", str(photo), mode, "--mask", str(tmp_path / "mask.png"))
    before, after = (
        np.asarray(Image.open(photo)),
        np.asarray(sampled(run, tmp_path / "o", *arguments)),
    )
    assert after.shape == before.shape
    assert (after[mask == 0] == before[mask == 0]).all()
    assert (after[mask > 0] != before[mask > 0]).any()
    check_learning(run)


UNCROPPING = {  # arguments, and the rectangle of the result in pixels of the picture
    "": (0, 0, 0, 0),
    "--side right": (0, 0, 2 * WIDTH, HEIGHT),
    "--side top --by 0.5": (0, -HEIGHT // 2, WIDTH, HEIGHT),
    "--rectangle -7 3 50 31": (-7, 3, 50, 31),
    "--panorama 131": (-43, 0, 88, HEIGHT),
    "--mask one_direction": (0, 0, WIDTH, HEIGHT),
}


@pytest.mark.parametrize("arguments", UNCROPPING)
def test_uncrop(train, photo, tmp_path, arguments):
    run = train("task.name=uncrop")
    left, top, right, bottom = UNCROPPING[arguments] or ()
    if not arguments:  # half of the area is new, on all four sides
        rows, columns = round(0.2071 * HEIGHT), round(0.2071 * WIDTH)
        left, top, right, bottom = -columns, -rows, WIDTH + columns, HEIGHT + rows
    out = sampled(run, tmp_path / "o", "--input", str(photo), *arguments.split())
    assert out.size == (right - left, bottom - top)
    after, before = np.asarray(out), np.asarray(Image.open(photo))
    there = after[max(-top, 0) : HEIGHT - top, max(-left, 0) : WIDTH - left]
    known = before[max(top, 0) : bottom, max(left, 0) : right]
    assert there.shape == known.shape
    same = (there == known).all(axis=2)
    assert same.mean() < 0.7 if "mask" in arguments else same.all()
    check_learning(run)


@pytest.mark.parametrize("mode", ["--seed=1", "--native", "--tiled"])
def test_colorize(train, photo, tmp_path, mode):
    run = train("task.name=colorize")
    grey = Image.open(photo).convert("L")
    grey.save(tmp_path / "grey.png")
    out = sampled(run, tmp_path / "out", mode, "--input", str(tmp_path / "grey.png"))
    assert out.size == (WIDTH, HEIGHT)
    difference = np.asarray(out.convert("L"), float) - np.asarray(grey, float)
    assert np.abs(difference).mean() < 2  # colours out of range are clipped
    check_learning(run)


def test_restore_jpeg(train, photo, tmp_path):
    run = train("task.name=restore_jpeg")
    Image.open(photo).save(tmp_path / "bad.jpg", quality=8)
    out = sampled(run, tmp_path / "out", "--input", str(tmp_path / "bad.jpg"))
    assert out.size == (WIDTH, HEIGHT)
    check_learning(run)


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Two classes of pictures, warm and cold."""
    root = tmp_path_factory.mktemp("classes")
    for name, channel in (("cold", 2), ("warm", 0)):
        (root / name).mkdir()
        for number in range(8):
            pixels = np.full((20, 24, 3), 20 + number, np.uint8)
            pixels[..., channel] = 220
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_generate(train, tmp_path):
    run = train("task.name=generate", "train.sample_every=100", "data.validation=16")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1].keys() >= {"validation_loss"}
    assert "validation_mae" not in lines[-1]
    out = sampled(run, tmp_path / "out", "--size", "20", "27")
    assert out.size == (27, 20)
    model = palette.load(run)
    batch, schedule = held_out(model.config), model.schedule
    half = torch.full((16,), 0.5)
    denoising = [  # a sample is no copy of any picture, so its distance to one says little
        objective.loss(network, schedule, batch, batch["seed"], prediction="v", gamma=half).total
        for network in (build_network(model.config), model.network)
    ]
    assert denoising[1] < 0.4 * denoising[0]
    both = palette.load(run).generate(2, seed=5)
    assert [picture.size for picture in both] == [(16, 16)] * 2
    again = np.asarray(palette.load(run).generate(seed=6), float)
    assert np.abs(np.asarray(both[1], float) - again).max() <= 1


def test_generate_of_a_class(train, classes, tmp_path):
    data = ("data.source=classes", f"data.path={classes}", "data.validation=2")
    run = train("task.name=generate", "model.num_classes=2", *data)
    for label, (high, low) in enumerate(((2, 0), (0, 2))):
        arguments = ("--label", str(label), "--guidance", "1.5")
        mean = np.asarray(sampled(run, tmp_path / str(label), *arguments)).mean((0, 1))
        assert mean[high] > mean[low] + 100
    assert sampled(run, tmp_path / "any").size == (16, 16)
    torch.manual_seed(0)
    model = palette.load(run)
    began = build_network(model.config).label_emb.weight
    assert (model.network.label_emb.weight != began).any(dim=1).all()  # "no label" was trained too
    with pytest.raises(ValueError, match="found 2; the model has classes 0 to 1"):
        palette.load(run).generate(label=2)


@pytest.mark.parametrize("factor", [2.0, 3.5])
def test_upscale(train, photo, tmp_path, factor):
    run = train("task.name=upscale", "task.factor=2")
    arguments = ("--factor", str(factor), "--augmentation", "0.2")
    out = sampled(run, tmp_path / "out", "--input", str(photo), *arguments)
    assert out.size == (round(WIDTH * factor), round(HEIGHT * factor))
    plain = Image.open(photo).resize(out.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(out, float) - np.asarray(plain, float)).mean() < 60
    check_learning(run)


def test_a_cascade(train, tmp_path):
    first = train("task.name=generate", "train.sample_every=100", "data.validation=16")
    second = train("task.name=upscale", "task.factor=2")
    out = sampled(first, tmp_path, "--then", str(second), str(second), "--augmentation", "0.1")
    assert out.size == (64, 64)
    with Image.open(tmp_path / "000000.png") as picture:
        record = json.loads(picture.text["palette"])
    assert [each["model"] for each in record["then"]] == [str(second)] * 2


def test_mixture(train, photo, tmp_path):
    parts = "task.tasks=[colorize, inpaint, upscale]"
    run = train("task.name=mixture", parts, "task.factor=2", "train.steps=130")
    for task, size in (("colorize", (WIDTH, HEIGHT)), ("upscale", (2 * WIDTH, 2 * HEIGHT))):
        arguments = ("--input", str(photo), "--task", task)
        assert sampled(run, tmp_path / task, *arguments).size == size
    check_learning(run)
    filled = palette.load(run).inpaint(photo, "left")
    known = (slice(None), slice(WIDTH // 2, None))
    assert (np.asarray(filled)[known] == np.asarray(Image.open(photo))[known]).all()


def test_paired(train, photo, tmp_path):
    source = Photos(image_size=(24, 24), samples=24)
    for index in range(len(source)):
        picture = source.load(index, Draws(index))
        for folder, pixels in (("color", picture), ("gray", ImageOps.invert(picture))):
            (tmp_path / folder).mkdir(exist_ok=True)
            pixels.save(tmp_path / folder / f"{index}.png")
    run = train("task.name=paired", "data.source=pairs", f"data.path={tmp_path}")
    out = sampled(run, tmp_path / "out", "--input", str(photo))
    assert out.size == (WIDTH, HEIGHT)
    check_learning(run)
    negative = 255 - np.asarray(Image.open(photo), float)
    assert np.abs(np.asarray(out) - negative).mean() < 60


def shards(path: Path, *members: tuple[str, bytes]) -> str:
    """An archive of these members in the folder of ``path``, which a config can name."""
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return f"data.path={path.parent}"


def test_bad_data_is_one_line(classes, photo, tmp_path, capsys):
    (tmp_path / "none" / "empty").mkdir(parents=True)
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    (tmp_path / "none" / "full").mkdir()
    for folder in ("a", "b", "none/full"):
        Image.new("L", (9, 9)).save(tmp_path / folder / "x.png")
    Image.new("L", (9, 9)).save(tmp_path / "a" / "y.png")
    (tmp_path / "names.txt").write_text("x.png\n../b/x.png\n")
    (tmp_path / "tiny.yaml").write_text(TINY)
    pairs = ["task.name=paired", "data.source=pairs", f"data.path={tmp_path / 'a'}"]
    partners = f"data.conditions={tmp_path / 'b'}"
    generate = ["task.name=generate", "data.source=classes"]
    cut = shards(tmp_path / "cut" / "x.tar", ("x.png", photo.read_bytes()))
    whole = (tmp_path / "cut" / "x.tar").read_bytes()
    (tmp_path / "cut" / "x.tar").write_bytes(whole[:700])
    outside = shards(tmp_path / "out" / "x.tar", ("../x.png", photo.read_bytes()))
    for options, words in (
        ([*generate, f"data.path={tmp_path / 'none'}", "model.num_classes=2"], "empty: no image"),
        ([*generate, f"data.path={classes}"], "has 2 classes, but model.num_classes is None"),
        (["task.name=generate", "model.num_classes=2"], "num_classes=2 needs labels"),
        ([*pairs, f"data.conditions={tmp_path / 'c'}"], "c: no x.png in it; pairs need both"),
        ([*pairs, partners], "b: no y.png in it; pairs need both"),
        ([*pairs, partners, f"data.names={tmp_path / 'names.txt'}"], "'../b/x.png' leads out of"),
        (["data.source=shards", cut], "x.tar: cut off or damaged: 'x.png' would take"),
        (["data.source=shards", outside], "out: no image in these archives"),
        (["task.mask=0,0,2,1"], "mask must be LEFT,TOP,RIGHT,BOTTOM"),
    ):
        sets = ["--set", *options, f"run.dir={tmp_path / 'run'}"]
        assert main(["train", "-c", str(tmp_path / "tiny.yaml"), *sets]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1


def test_broken_members_and_those_that_lead_out_are_named_once(photo, tmp_path, capsys, caplog):
    good = [(f"{number:02d}.png", photo.read_bytes()) for number in range(40)]
    bad = [("bad.png", b"\x89PNG, and no more"), ("../out.png", photo.read_bytes())]
    where = shards(tmp_path / "some" / "x.tar", *good, *bad)
    (tmp_path / "tiny.yaml").write_text(TINY)
    sets = ["task.mask=center", "data.source=shards", where, "data.validation=0", "train.steps=6"]
    command = ["train", "-c", str(tmp_path / "tiny.yaml"), "--set", f"run.dir={tmp_path / 'run'}"]
    assert main([*command, *sets]) == 0  # 48 samples of 41 pictures
    lines = [record.getMessage() for record in caplog.records]
    (left_out,) = (line for line in lines if "out.png" in line)
    assert left_out.endswith("left out 1; the first: ../out.png: its name leads out of the archive")
    (skipped,) = (line for line in lines if "bad.png" in line)
    assert skipped.startswith(f"skipped {tmp_path / 'some' / 'x.tar'}/bad.png: ")
    assert "\n" not in skipped
    assert "Traceback" not in capsys.readouterr().err


def test_a_mask_of_another_size_is_one_line(train, photo, tmp_path, capsys):
    run = train("task.name=inpaint", "task.mask=center")
    Image.new("L", (WIDTH, HEIGHT + 1), 255).save(tmp_path / "mask.png")
    arguments = ["--input", str(photo), "--mask", str(tmp_path / "mask.png")]
    assert main(["sample", str(run), *arguments, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"{WIDTH}x{HEIGHT + 1}" in message
    assert message.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_a_wish_that_makes_no_sense_is_one_line(train, photo, tmp_path, capsys):
    run = train("task.name=colorize")
    arguments = ["sample", str(run), "--input", str(photo), "--output", str(tmp_path / "results")]
    for wish, words in (
        (["--mask", "center"], "--mask: says nothing to the task colorize"),
        (["--task", "inpaint"], "does colorize"),
        (["--factor", "2"], "--factor: says nothing to the task colorize"),
        (["--label", "1"], "label: found 1; the model has no classes"),
        (["--then", str(run)], "trained to colorize, not to upscale"),
        (["--size", "9", "9"], "--size: says nothing to the task colorize"),
    ):
        assert main([*arguments, *wish]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
    with pytest.raises(ValueError, match="trained to colorize, not to inpaint"):
        palette.load(run).inpaint(photo, "center")
