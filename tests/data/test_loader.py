"""The loader: the same batches from any number of workers, and bad pictures counted."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import struct
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from palette.config import ConfigError
from palette.data import tasks
from palette.data.dataset import Batch, Batches, TaskDataset, UnreadableImages
from palette.data.loader import Loader
from palette.data.order import Draws
from palette.data.photos import Photos
from palette.data.sources import Folder


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., TaskDataset]:
    """A dataset over so many pictures, of which some are damaged."""

    def make(count: int, damaged: int = 0) -> TaskDataset:
        for number in range(count):
            path = tmp_path / f"{number:04d} ö\n.png"
            if number < damaged:
                path.write_bytes(b"")
            else:
                Image.new("L", (9, 9), number % 256).save(path)
        return TaskDataset(Folder(tmp_path), tasks.make_task("inpaint"), 8, 0)

    return make


def _photos() -> TaskDataset:
    source = Photos(image_size=(16, 16), samples=30)
    return TaskDataset(source, tasks.make_task("inpaint"), 16, 0, flip=True)


def _same(first: Batch, second: Batch) -> bool:
    return all(
        torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        for key, value in first.items()
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers: int) -> None:
    straight, parallel = (
        list(islice(Loader(_photos(), Batches(30, 4), workers=count), 10)) for count in (0, workers)
    )
    assert all(map(_same, straight, parallel))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_continues_in_the_middle_of_an_epoch(workers: int) -> None:
    straight = list(islice(Loader(_photos(), Batches(30, 4)), 12))
    resumed = list(islice(Loader(_photos(), Batches(30, 4, start=28), workers=workers), 5))
    assert all(map(_same, straight[7:], resumed))


def test_ranks_together_load_what_one_would() -> None:
    alone = list(islice(Loader(_photos(), Batches(30, 4)), 3))
    ranks = [
        list(islice(Loader(_photos(), Batches(30, 2, rank=rank, world=2)), 3)) for rank in (0, 1)
    ]
    for batch, first, second in zip(alone, *ranks, strict=True):
        for key in ("target", "condition", "mask", "seed"):
            assert torch.equal(batch[key], torch.cat((first[key], second[key])))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    next(iter(Loader(_photos(), Batches(30, 4))))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_few_bad_pictures_are_skipped_counted_and_named(
    dataset: Callable[..., TaskDataset], workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = Loader(dataset(300, damaged=3), Batches(300, 8, stop=300), workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    assert sum(len(batch["name"]) for batch in batches) == 300
    assert len(loader.skipped) == 3
    assert all("empty file" in reason for reason in loader.skipped.values())
    assert len(caplog.messages) == 3
    assert all(message.isprintable() for message in caplog.messages)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_pictures_stop_the_run_with_a_list(
    dataset: Callable[..., TaskDataset], workers: int
) -> None:
    loader = Loader(dataset(300, damaged=4), Batches(300, 8), workers=workers)
    with pytest.raises(UnreadableImages, match="4 images cannot be read, above 1%") as caught:
        list(islice(loader, 80))
    message = str(caught.value)
    assert "\n" not in message
    assert all(f"{number:04d} " in message for number in range(4))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_are_one_line(workers: int) -> None:
    def refuse(image: torch.Tensor, seed: int, draws: Draws) -> tasks.Entry:
        raise ConfigError("task.name: refuses: everything")

    source = Photos(image_size=(16, 16), samples=30)
    loader = Loader(TaskDataset(source, refuse, 16, 0), Batches(30, 4), workers=workers)
    with pytest.raises(ConfigError, match=r"^task\.name: refuses: everything$"):
        next(iter(loader))


def _with_masks(folder: Path, count: int, damaged: int, pictures: int = 30) -> TaskDataset:
    """Every mask is another row; the first ones cannot be read."""
    folder.mkdir()
    for number in range(count):
        mask = Image.new("L", (16, 16))
        mask.paste(255, (0, number % 16, 16, number % 16 + 1))
        mask.save(folder / f"{number}.png")
    for number in range(damaged):
        (folder / f"{number}.png").write_bytes(b"")
    source = Photos(image_size=(16, 16), samples=pictures)
    return TaskDataset(source, tasks.make_task("inpaint", mask=str(folder)), 16, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_masks_are_drawn_again_and_named(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = _with_masks(tmp_path / "masks", 16, damaged=2)
    loader = Loader(dataset, Batches(30, 5, stop=60), workers=workers)
    batches = list(loader)
    assert sorted(loader.skipped) == [f"{tmp_path}/masks/{n}.png: empty file" for n in (0, 1)]
    assert sorted(caplog.messages) == [f"skipped {reason}" for reason in sorted(loader.skipped)]
    rows = torch.cat([batch["mask"] for batch in batches])[:, 0, :, 0]
    assert rows.sum(dim=1).tolist() == [1] * 60
    assert (rows.sum(dim=0) > 0).tolist() == [False] * 2 + [True] * 14


def test_a_few_damaged_masks_of_many_stop_no_run(tmp_path: Path) -> None:
    """However few the pictures are that they are laid over."""
    loader = Loader(_with_masks(tmp_path / "masks", 800, damaged=4), Batches(30, 30, stop=3000))
    assert len(list(loader)) == 100
    assert len(loader.skipped) >= 3


@pytest.mark.parametrize(("damaged", "words"), [(4, "images cannot be read"), (16, "none of 1")])
def test_many_damaged_masks_stop_a_run(tmp_path: Path, damaged: int, words: str) -> None:
    loader = Loader(_with_masks(tmp_path / "masks", 16, damaged), Batches(30, 4), workers=1)
    with pytest.raises(UnreadableImages, match=words) as caught:
        list(islice(loader, 80))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("count", [1, 40])
def test_only_bad_pictures_stop_the_run_at_once(
    dataset: Callable[..., TaskDataset], workers: int, count: int
) -> None:
    loader = Loader(dataset(count, damaged=count), Batches(count, 4), workers=workers)
    with pytest.raises(UnreadableImages, match="images tried can be read") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)
    assert "0000" in str(caught.value) or count > 1


def test_a_very_bad_large_source_is_stopped_long_before_its_end(tmp_path: Path) -> None:
    """One in seven of a million cannot be read: no need to wait for ten thousand."""

    class Million(Folder):
        def __len__(self) -> int:
            return 10**6

        def load(self, index: int, draws: Any) -> Image.Image:
            return super().load(0 if index % 7 else 1, draws)

    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"")

    class Named(Million):
        def name(self, index: int) -> str:
            return str(index)

    data = TaskDataset(Named(tmp_path), tasks.make_task("colorize"), 8, 0)
    with pytest.raises(UnreadableImages, match="above 1%"):
        list(islice(Loader(data, Batches(len(data), 10)), 50))


def test_long_lists_are_cut(dataset: Callable[..., TaskDataset]) -> None:
    loader = Loader(dataset(300, damaged=60), Batches(300, 150))
    with pytest.raises(UnreadableImages, match=r"and \d+ more$"):
        list(islice(loader, 5))


def test_negative_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        Loader(_photos(), Batches(30, 4), workers=-1)


@pytest.fixture
def strange(tmp_path: Path) -> TaskDataset:
    """Five hundred files: five that are no pictures, and every kind of odd one that is."""
    for number in range(488):
        Image.new("L", (9, 9), number % 256).save(tmp_path / f"{number:04d}.png")
    for mode in ("CMYK", "RGBA", "P", "1"):
        kind = "tif" if mode == "CMYK" else "png"
        Image.new(mode, (12, 10)).save(tmp_path / f"mode {mode}.{kind}")
    for size in ((1, 1), (50_000, 1), (1, 2000)):
        Image.new("RGB", size).save(tmp_path / f"{size[0]} by {size[1]}.png")
    for name in ("日本 ö", "line\nbreak", "-rf", "a..b"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "very.long.JPEG")
    whole = (tmp_path / "0000.png").read_bytes()
    (tmp_path / "bad cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad empty.jpg").write_bytes(b"")
    (tmp_path / "bad text.webp").write_text("no picture")
    (tmp_path / "bad bomb.bmp").write_bytes(
        b"BM" + struct.pack("<IIIIiiHHI", 99, 0, 54, 40, 30_000, 30_000, 1, 24, 0) + bytes(65)
    )
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    return TaskDataset(Folder(tmp_path), tasks.make_task("inpaint"), 8, 0)


def test_every_bad_file_is_counted_and_the_ranks_agree(strange: TaskDataset) -> None:
    length = len(strange)
    ranks: list[Loader] = []
    batches: list[list[Batch]] = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        order = Batches(length, 20 // world, rank=rank, world=world, stop=length // 20 * 20)
        ranks.append(Loader(strange, order))
        batches.append(list(ranks[-1]))
    planted = [name for name in ranks[0].skipped if name.startswith(("bad", "gone"))]
    assert len(ranks[0].skipped) == len(planted) == 5
    assert ranks[0].skipped == ranks[1].skipped | ranks[2].skipped
    for alone, first, second in zip(*batches, strict=True):
        assert alone["name"] == first["name"] + second["name"]
        assert torch.equal(alone["target"], torch.cat((first["target"], second["target"])))


def test_workers_leave_signals_to_the_parent() -> None:
    """torchrun sends SIGTERM to whole groups: the parent still needs a batch to end its step."""
    loader = iter(Loader(_photos(), Batches(30, 4), workers=2))
    next(loader)
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(8):
        next(loader)
