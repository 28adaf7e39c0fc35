"""Samples a minute from JPEG files to batches, how long a training waits for them, and the memory
that a long list takes.

    pytest benchmarks/bench_data.py

Pictures of 500 x 375 are decoded, cropped, resized to 64 x 64 and masked, from a folder and from
shards, by one process and by two workers. "images a minute" is in extra_info and printed, and so
is the share of time that training a small network (configs/tasks.yaml, a level deeper, at 64 x 64)
waits for its batches.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from palette import config as configs
from palette.data import masks, tasks
from palette.data.dataset import Batches, TaskDataset
from palette.data.loader import Loader
from palette.data.order import Draws
from palette.data.paths import read_list
from palette.data.photos import Photos
from palette.data.prepare import Settings, prepare
from palette.data.shards import Shards
from palette.data.sources import Folder
from palette.training.run import train

FILES, SAMPLES, SIZE = 400, 4000, 64
LONG = 10_000_000
STEPS, BATCH = 30, 16
RECIPE = Path(__file__).parents[1] / "configs" / "tasks.yaml"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of JPEG files, crops of the photographs that every install has."""
    folder = tmp_path_factory.mktemp("pictures")
    photos = Photos(image_size=(375, 500), samples=FILES)
    for index in range(FILES):
        crop = photos.load(index, Draws(index, stream=6))
        picture = crop.resize((500, 375), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:05d}.jpg", quality=90)
    return folder


def _inpaint(image, seed, draws, noise=None):  # type: ignore[no-untyped-def]
    return tasks.inpaint(image, seed, draws, mask=masks.center, noise=noise)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_samples(benchmark, capsys, tmp_path, pictures, kind, workers) -> None:
    size = (SIZE, SIZE)
    if kind == "folder":
        source = Folder(pictures, image_size=size)
    else:
        prepare(pictures, tmp_path, Settings())
        source = Shards(tmp_path, image_size=size)
    dataset = TaskDataset(source, _inpaint, SIZE, 0, flip=True)
    loader = Loader(dataset, Batches(len(dataset), 64, stop=SAMPLES), workers=workers)

    def read() -> int:
        return sum(len(batch["name"]) for batch in loader)

    start = time.perf_counter()
    assert benchmark.pedantic(read, rounds=3) == SAMPLES
    seconds = benchmark.stats.stats.median if benchmark.stats else time.perf_counter() - start
    benchmark.extra_info["images a minute"] = round(60 * SAMPLES / seconds)
    with capsys.disabled():
        found = benchmark.extra_info["images a minute"]
        print(f"\n{kind}, {workers} workers: {found} images a minute")


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_waiting_for_data(benchmark, capsys, tmp_path, pictures, kind, workers) -> None:
    where = pictures
    if kind == "shards":
        where = tmp_path / "shards"
        prepare(pictures, where, Settings())
    config = configs.load(
        RECIPE,
        [
            f"run.dir={tmp_path / 'run'}",
            "run.tensorboard=false",
            "model.channel_mults=[1,2,2]",
            f"data.source={kind}",
            f"data.path={where}",
            f"data.image_size={SIZE}",
            f"data.batch_size={BATCH}",
            f"data.workers={workers}",
            "data.validation=0",
            "data.fit=largest",
            f"train.steps={STEPS}",
            f"train.log_every={STEPS // 3}",
        ],
    )
    benchmark.pedantic(train, args=(config,), rounds=1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    share = sum(line["data_wait"] for line in lines[1:]) / len(lines[1:])  # workers have started
    speed = sum(line["samples_per_second"] for line in lines[1:]) / len(lines[1:])
    benchmark.extra_info["share of time waited for data"] = round(share, 4)
    benchmark.extra_info["samples a second"] = round(speed, 1)
    with capsys.disabled():
        print(f"\n{kind}, {workers} workers: {share:.1%} of the time waits for data; {speed:.1f}/s")


def test_memory_of_a_long_list(benchmark, capsys, tmp_path) -> None:
    listing = tmp_path / "long.txt"
    with listing.open("w") as file:
        for index in range(LONG):
            file.write(f"train/n{index % 1000:08d}/n{index % 1000:08d}_{index}.JPEG\n")
    found = benchmark.pedantic(read_list, args=(listing,), rounds=1)
    assert len(found) == LONG
    each = found.nbytes / LONG
    with capsys.disabled():
        print(f"\n{LONG} paths: {each:.1f} bytes each")
    assert each < 100
