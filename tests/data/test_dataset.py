"""Samples, batches and their order: the same from any point, on any number of ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from palette import ops
from palette.data import tasks
from palette.data.dataset import Batches, Fit, Key, TaskDataset, UnreadableImages, collate
from palette.data.images import to_tensor
from palette.data.order import Draws, sample_seed
from palette.data.photos import Photos
from palette.data.sources import Folder, Labelled


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder of so many pictures, each of one grey, some of them damaged."""

    def make(count: int, damaged: tuple[int, ...] = (), size: tuple[int, int] = (24, 16)) -> Path:
        for number in range(count):
            path = tmp_path / f"{number:04d}.png"
            if number in damaged:
                path.write_bytes(b"\x89PNG damaged")
            else:
                Image.new("RGB", size, (number % 256,) * 3).save(path)
        return tmp_path

    return make


def _photos(**options: Any) -> TaskDataset:
    source = Photos(image_size=(16, 16), samples=40)
    return TaskDataset(source, tasks.make_task("inpaint"), 16, 3, **options)


def _equal(first: tasks.Entry, second: tasks.Entry) -> bool:
    assert first.keys() == second.keys()
    return all(
        torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        for key, value in first.items()
    )


def test_an_entry_is_complete() -> None:
    dataset = _photos()
    entry = dataset[2, 5]
    assert set(entry) == {"target", "condition", "mask", "name", "seed", "skipped"}
    assert entry["target"].shape == (3, 16, 16)
    assert entry["target"].dtype == torch.float32
    assert entry["target"].abs().max() <= 1
    assert entry["skipped"] == []
    index = int(entry["name"].rsplit("-", 1)[1])
    assert entry["seed"] == sample_seed(3, 2, index)
    hole = entry["mask"].expand(3, -1, -1) == 1
    noise = ops.noise(torch.tensor([entry["seed"]]), 0, (3, 16, 16), stream=1)[0]
    assert torch.equal(entry["condition"][hole], noise[hole])


def test_samples_alone_and_together_are_the_same() -> None:
    dataset = _photos(flip=True)
    keys = [(0, 3), (1, 0), (0, 39), (1, 3), (0, 3)]
    for key, entry in zip(keys, dataset.__getitems__(keys), strict=True):
        assert _equal(entry, dataset[key])


def test_every_epoch_has_every_picture_once_with_other_draws(folder: Callable[..., Path]) -> None:
    dataset = TaskDataset(Folder(folder(12)), tasks.make_task("inpaint"), 16, 0)
    epochs = [[dataset[epoch, position] for position in range(12)] for epoch in range(3)]
    orders = [[entry["name"] for entry in epoch] for epoch in epochs]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1
    seeds = {entry["seed"] for epoch in epochs for entry in epoch}
    assert len(seeds) == 36


def test_another_run_seed_is_another_run() -> None:
    source, task = Photos(image_size=(16, 16)), tasks.make_task("inpaint")
    first, second = (TaskDataset(source, task, 16, seed)[0, 0] for seed in (0, 1))
    assert first["seed"] != second["seed"]
    assert not torch.equal(first["target"], second["target"])


def test_without_shuffling_the_order_is_the_source_s(folder: Callable[..., Path]) -> None:
    dataset = TaskDataset(Folder(folder(5)), tasks.make_task("colorize"), 16, 0, shuffle=False)
    assert [dataset[0, position]["name"] for position in range(5)] == [
        f"{number:04d}.png" for number in range(5)
    ]


def test_a_dataset_travels_to_another_process() -> None:
    dataset = _photos(flip=True)
    before = dataset[0, 0]
    assert _equal(pickle.loads(pickle.dumps(dataset))[0, 0], before)


@pytest.mark.parametrize("fit", ["largest", "zoom", "center", "squash"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [24, (16, 40), (70, 8)])
def test_any_size_and_channel_count(
    tmp_path: Path, fit: Fit, channels: int, size: int | tuple[int, int]
) -> None:
    Image.radial_gradient("L").resize((90, 60)).save(tmp_path / "a.png")
    dataset = TaskDataset(
        Folder(tmp_path), tasks.make_task("inpaint"), size, 0, fit=fit, channels=channels
    )
    height, width = (size, size) if isinstance(size, int) else size
    for epoch in range(4):
        entry = dataset[epoch, 0]
        assert entry["target"].shape == entry["condition"].shape == (channels, height, width)
        assert entry["mask"].shape == (1, height, width)


def test_how_pictures_are_fitted(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(240, dtype=np.uint8)[None], 80, axis=0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")

    def spans(fit: Fit) -> list[tuple[float, float]]:
        dataset = TaskDataset(
            Folder(tmp_path), tasks.make_task("inpaint"), 20, 0, fit=fit, channels=1
        )
        rows = [dataset[epoch, 0]["target"][0, 0] * 127.5 + 127.5 for epoch in range(60)]
        return [(float(row[0]), float(row[-1])) for row in rows]

    assert {(round(a), round(b)) for a, b in spans("center")} == {(82, 158)}
    (squashed,) = {(round(a), round(b)) for a, b in spans("squash")}
    assert squashed[0] < 10
    assert squashed[1] > 230
    largest = spans("largest")
    assert min(a for a, _ in largest) < 15
    assert max(b for _, b in largest) > 225
    assert all(b - a == pytest.approx(76, abs=2) for a, b in largest)
    widths = [b - a for a, b in spans("zoom")]
    assert min(widths) < 25
    assert max(widths) > 60


def test_half_of_the_samples_are_mirrored(tmp_path: Path) -> None:
    picture = Image.fromarray(np.repeat(np.arange(16, dtype=np.uint8)[None] * 16, 16, axis=0))
    picture.save(tmp_path / "ramp.png")
    straight = to_tensor(picture, channels=1)
    task, source = tasks.make_task("inpaint"), Folder(tmp_path)
    mirrored = 0
    for flip in (False, True):
        dataset = TaskDataset(source, task, 16, 0, channels=1, flip=flip)
        for epoch in range(100):
            target = dataset[epoch, 0]["target"]
            assert torch.equal(target, straight) or torch.equal(target.flip(-1), straight)
            mirrored += int(torch.equal(target.flip(-1), straight))
        assert mirrored == 0 or flip
    assert 30 < mirrored < 70


def test_unreadable_pictures_are_replaced_by_others(folder: Callable[..., Path]) -> None:
    source = Folder(folder(30, damaged=(4, 11)))
    dataset = TaskDataset(source, tasks.make_task("inpaint"), 16, 0)
    entries = [dataset[0, position] for position in range(30)]
    skipped = [pair for entry in entries for pair in entry["skipped"]]
    assert sorted({name for name, _ in skipped}) == ["0004.png", "0011.png"]
    assert all(name in reason and "not an image" in reason for name, reason in skipped)
    assert len({entry["seed"] for entry in entries}) == 30
    for entry in entries:
        shade = int(entry["name"][:4])
        assert (entry["target"] * 127.5 + 127.5).round().unique().tolist() == [shade]
    again = TaskDataset(source, tasks.make_task("inpaint"), 16, 0)
    assert all(_equal(again[0, position], entries[position]) for position in (29, 3, 12))


@pytest.mark.parametrize("count", [2, 3, 10])
def test_one_readable_picture_is_found(folder: Callable[..., Path], count: int) -> None:
    source = Folder(folder(count, damaged=tuple(range(1, count))))
    dataset = TaskDataset(source, tasks.make_task("inpaint"), 16, 0)
    for epoch in range(5):
        for position in range(count):
            assert dataset[epoch, position]["name"] == "0000.png"


@pytest.mark.parametrize("count", [1, 3, 50])
def test_only_unreadable_pictures_give_one_clear_line(
    folder: Callable[..., Path], count: int
) -> None:
    dataset = TaskDataset(
        Folder(folder(count, damaged=tuple(range(count)))), tasks.make_task("inpaint"), 16, 0
    )
    with pytest.raises(
        UnreadableImages, match=r"none of \d+ images tried can be read; .*\.png"
    ) as caught:
        dataset[0, 0]
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def _keys(count: int, length: int = 10, **options: int) -> list[list[Key]]:
    return list(islice(Batches(length, 4, **options), count))


def test_batches_count_through_the_epochs() -> None:
    flat = [key for batch in _keys(6) for key in batch]
    assert flat == [(number // 10, number % 10) for number in range(24)]


def test_batches_continue_where_they_stopped() -> None:
    straight = _keys(10)
    for done in (1, 4, 7):
        assert _keys(10 - done, start=4 * done) == straight[done:]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_divide_the_same_sequence(world: int) -> None:
    ranks = [_keys(4, rank=rank, world=world) for rank in range(world)]
    together = [key for step in zip(*ranks, strict=True) for batch in step for key in batch]
    assert together == [key for batch in _keys(4 * world) for key in batch]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("stop", [1, 4, 10, 13])
def test_batches_up_to_an_end(world: int, stop: int) -> None:
    ranks = [list(Batches(10, 4, stop=stop, rank=rank, world=world)) for rank in range(world)]
    numbers = sorted(
        epoch * 10 + place for rank in ranks for batch in rank for epoch, place in batch
    )
    assert numbers == list(range(stop))
    assert all(batch for rank in ranks for batch in rank)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"world": 0}, "world must be at least 1, got 0"),
        ({"rank": 2, "world": 2}, r"rank must lie in 0\.\.1, got 2"),
    ],
)
def test_batches_that_make_no_sense(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(**{"length": 10, "batch_size": 4, **options})


def test_collate() -> None:
    entries = _photos().__getitems__([(0, 0), (0, 1), (0, 2)])
    entries[1]["skipped"] = [("a.png", "a.png: empty file")]
    batch = collate([{**entry, "label": 7} for entry in entries])
    assert batch["target"].shape == batch["condition"].shape == (3, 3, 16, 16)
    assert batch["mask"].shape == (3, 1, 16, 16)
    assert batch["seed"].dtype == batch["label"].dtype == torch.int64
    assert batch["seed"].tolist() == [entry["seed"] for entry in entries]
    assert batch["name"] == [entry["name"] for entry in entries]
    assert batch["skipped"] == [("a.png", "a.png: empty file")]
    with pytest.raises(ValueError, match=r"'x' has different shapes in one batch"):
        collate([{"x": torch.zeros(2)}, {"x": torch.zeros(3)}])


def test_own_sources_need_no_base_class() -> None:
    class Squares:
        def __len__(self) -> int:
            return 4

        def load(self, index: int, draws: Draws) -> Image.Image:
            return Image.new("L", (9 + draws.integer(0, 5), 11), index)

        def name(self, index: int) -> str:
            return str(index)

    entry = TaskDataset(Squares(), tasks.make_task("colorize"), 8, 0, shuffle=False)[0, 2]
    assert entry["target"].shape == (3, 8, 8)
    assert entry["name"] == "2"


def test_labels_come_with_their_pictures() -> None:
    class Shades:
        def __len__(self) -> int:
            return 6

        def load(self, index: int, draws: Draws) -> Labelled:
            return Labelled(Image.new("L", (9, 8), 40 * index), index)

        def name(self, index: int) -> str:
            return str(index)

    dataset = TaskDataset(Shades(), tasks.make_task("generate"), 8, 0)
    batch = collate(dataset.__getitems__([(0, place) for place in range(6)]))
    assert batch["label"].dtype == torch.int64
    assert batch["condition"].shape == (6, 0, 8, 8)
    shades = ((batch["target"][:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(batch["label"] * 40, shades)


def test_masks_fixed_for_each_picture_or_drawn_in_each_epoch(folder: Callable[..., Path]) -> None:
    source = Folder(folder(5))
    fixed, fresh = (
        TaskDataset(source, tasks.make_task("inpaint"), 16, 3, shuffle=False, fresh=fresh)
        for fresh in (False, True)
    )
    assert torch.equal(fixed[0, 2]["mask"], fixed[4, 2]["mask"])
    assert not torch.equal(fixed[0, 2]["mask"], fixed[0, 3]["mask"])
    assert not torch.equal(fixed[0, 2]["condition"], fixed[4, 2]["condition"])  # the noise is new
    assert not torch.equal(fresh[0, 2]["mask"], fresh[4, 2]["mask"])
    assert torch.equal(fixed[0, 2]["mask"], fresh[0, 2]["mask"])
