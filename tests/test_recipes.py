"""The recipes of configs/: each says what it is, can be built, and trains."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from palette import config as configs
from palette.cli import main
from palette.evaluation.presets import PRESETS
from palette.training.cost import Cost, describe_cost, measure, meta_network
from palette.training.run import train
from palette.upstream import to_config

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
PAPER = {
    "paper_colorization": "colorize-5k",
    "paper_inpainting": "inpaint-places-center",
    "paper_uncropping": "uncrop-places",
    "paper_jpeg": "jpeg-5",
    "paper_generalist": "multitask-jpeg-generalist",
}
PUBLISHED = {
    "inpainting_celebahq": ("datasets/celebahq/flist/train.flist", 256, 3),
    "inpainting_places2": ("datasets/place365/flist/train.flist", 256, 3),
    "uncropping_places2": ("datasets/place365/flist/train.flist", 256, 3),
    "colorization_mirflickr25k": ("datasets/mirflickr25k/images", 224, 4),
}
LISTED = ("datasets/celebahq", "datasets/place365", "datasets/mirflickr25k")
COUNTED_IN_EPOCHS = ("save_every", "sample_every")
SHRUNKEN = (
    "model.channels=32",
    "model.channel_mults=[1,2]",
    "model.res_blocks=1",
    "model.attention_resolutions=[8]",
    "model.head_channels=32",
    "data.source=photos",
    "data.path=''",
    "data.names=''",
    "data.image_size=16",
    "data.batch_size=4",
    "data.workers=0",
    "data.validation=0",
    "data.samples_per_epoch=8",
    "train.steps=1",
    "train.log_every=1",
    "train.sample_every=0",
    "summary.crops=0",
)

SMALLER = (  # of a published recipe: what it trains on, and how, stays
    "model.channels=32",
    "model.channel_mults=[1,2]",
    "model.res_blocks=1",
    "data.image_size=16",
    "data.workers=0",
    "train.steps=3",
    "train.log_every=1",
    "train.sample_every=0",
    "run.tensorboard=false",
)


def recipe(name: str) -> Path:
    return next(path for path in RECIPES if path.stem == name)


@pytest.fixture(scope="module")
def cost() -> Callable[[configs.Config], Cost]:
    """Counts each network once, however many recipes train it."""
    counted: dict[str, Cost] = {}

    def count(config: configs.Config) -> Cost:
        generates = config.task.name == "generate"
        key = f"{config.model} {config.data.image_size} {generates}"
        if key not in counted:
            counted[key] = measure(config, torch.float32)
        return counted[key]

    return count


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_what_it_costs(path, cost):
    header = path.read_text().partition("\nrun:")[0]
    for word in ("# Reproduces: ", "# Costs: ", "# Expected: "):
        assert header.count(word) == 1
    config = configs.load(path)
    network = meta_network(config)
    assert all(value.is_meta for value in network.parameters())
    said = " ".join(line.removeprefix("#").strip() for line in header.splitlines())
    if "--dry-run" in said:
        assert f"{sum(value.numel() for value in network.parameters()):,} parameters" in said
        text = describe_cost(config, cost(config), torch.float32)
        assert text.splitlines()[0].removeprefix("compute: ") in said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shrunken_copy_trains_a_step(path, tmp_path, capsys):
    # Twice the accumulated passes, as the batch must be a multiple of them.
    batches = [f"data.batch_size={2 * configs.load(path).train.accumulate}"]
    train(configs.load(path, [*SHRUNKEN, *batches, f"run.dir={tmp_path / 'run'}"]))
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    assert math.isfinite(first["loss"])


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_is_the_training_of_its_preset(name):
    preset = PRESETS[PAPER[name]]
    told = configs.load(recipe(name))
    expected = configs.from_sections({}, overrides=preset.training)
    scored = configs.from_sections({}, overrides=preset.evaluation)
    assert told == replace(expected, sample=scored.sample)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_of_the_published_code_is_its_published_config(name):
    path, size, batch = PUBLISHED[name]
    told = configs.load(recipe(name))
    expected = configs.from_sections(to_config(_published(name, path, size, batch)))
    expected.data.validation_pictures = 2  # a count in the published code is one of pictures
    for option in COUNTED_IN_EPOCHS:
        setattr(expected.train, option, getattr(told.train, option))
    assert told == expected


@pytest.fixture
def published_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pictures where the published configs look for theirs, in the working directory."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    numbers = np.random.default_rng(0)
    images = Path("datasets/mirflickr25k/images")
    for folder in (images / "color", images / "gray", *(Path(f"{name}/flist") for name in LISTED)):
        folder.mkdir(parents=True)
    for index in range(12):
        picture = Image.fromarray(numbers.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        picture.save(images / "color" / f"{index:05d}.png")
        picture.convert("L").save(images / "gray" / f"{index:05d}.png")
    paths = "".join(f"{images}/color/{index:05d}.png\n" for index in range(12))
    for name in LISTED:
        Path(f"{name}/flist/train.flist").write_text(paths)
    numbers_alone = "".join(f"{index}\n" for index in range(12))
    Path("datasets/mirflickr25k/flist/train.flist").write_text(numbers_alone)


@pytest.mark.usefixtures("published_data")
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_and_its_recipe_have_the_same_first_losses(name):
    published = Path(f"{name}.json")
    published.write_text(json.dumps(_published(name, *PUBLISHED[name])))
    losses = []
    for file in (published, recipe(name)):
        run = Path(f"run{file.suffix}")
        sets = [*SMALLER, f"run.dir={run}"]
        assert main(["train", "-c", str(file), "--debug", "--set", *sets]) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
    assert len(set(losses[0])) == 3
    assert losses[0] == losses[1]


def test_a_dry_run_tells_layers_parameters_compute_and_memory(capsys):
    known = {  # as counted by the authors of the networks, or of their spread by others
        "paper_colorization": ("552,814,083 parameters", "middle_block.1: 8x8", "2.24 TFLOP"),
        "inpainting_celebahq": ("62,641,347 parameters", "middle_block.1: 32x32", "413 GFLOP"),
    }
    for name, facts in known.items():
        assert main(["train", "-c", str(recipe(name)), "--dry-run"]) == 0
        shown = capsys.readouterr().out
        for fact in (*facts, "memory: ", "image_size: 256"):
            assert fact in shown, fact


def _published(name: str, path: str, size: int, batch: int) -> dict[str, object]:
    """The published JSON config at its full size."""
    network = {"inner_channel": 64, "channel_mults": [1, 2, 4, 8], "res_blocks": 2}
    train, unused = Path(path), Path("unused")
    found = _module().build(name, train, unused, Path("experiments"), **network, image_size=size)
    dataset = found["datasets"]["train"]
    del dataset["which_dataset"]["args"]["image_size"]
    if name.startswith("colorization"):
        dataset["which_dataset"]["args"]["data_flist"] = "datasets/mirflickr25k/flist/train.flist"
    dataset["dataloader"]["args"] |= {"batch_size": batch, "num_workers": 4}
    test = found["model"]["which_networks"][0]["args"]["beta_schedule"]["test"]
    test |= {"n_timestep": 1000, "linear_start": 1e-4, "linear_end": 0.09}
    found["train"]["log_iter"] = 1e4
    return found


def _module() -> ModuleType:
    path = Path(__file__).parent / "upstream" / "published_configs.py"
    spec = importlib.util.spec_from_file_location("published_configs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
