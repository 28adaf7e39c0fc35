"""Two folders of images scored: every figure against its own definition, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import skimage.metrics
import torch
from PIL import Image
from torch import Tensor

from palette.metrics import kernel, manifold
from palette.metrics.folders import Shard, score_folders
from palette.metrics.networks import Features, Identity
from palette.metrics.random_network import RandomDistance, RandomNetwork
from palette.metrics.reading import read_picture
from palette.metrics.scorer import Networks, Scorer
from palette.metrics.scores import STAND_IN, Scores, side_by_side
from palette.metrics.structural import ms_ssim
from palette.metrics.summary import summarise

SIZE = (24, 32)


class Means:
    """A feature network of six numbers, which also classifies."""

    identity = Identity("channel means and deviations", "12" * 32)
    dim, classes = 6, 3

    def __call__(self, pictures: Tensor, *, classify: bool = False) -> Features:
        values = pictures.double().flatten(2) / 255
        features = torch.cat([values.mean(2), values.std(2)], 1)
        return Features(features, (9 * features[:, :3]).softmax(1) if classify else None)


class Brightest:
    identity = Identity("the brightest channel", "34" * 32)
    classes = 3

    def __call__(self, pictures: Tensor) -> Tensor:
        return pictures.double().mean((2, 3)).softmax(1)


class Distance:
    identity = Identity("mean difference", "56" * 32)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return (first.double() - second.double()).abs().mean((1, 2, 3))


def _networks() -> Networks:
    return Networks(Means(), Distance(), Brightest())


def _write(folder: Path, names: Iterable[str], seed: int, size: tuple[int, int] = SIZE) -> Path:
    """Blurred random pictures."""
    draw = np.random.default_rng(seed)
    for name in names:
        small = draw.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return folder


def _read(folder: Path) -> Tensor:
    return torch.stack([read_picture(str(path)) for path in sorted(folder.rglob("*.png"))])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Samples and truth: 12 images of one size, two of another."""
    for seed, side in enumerate(("samples", "truth")):
        _write(tmp_path / side, [f"{n:02d}" for n in range(12)], seed)
    return tmp_path / "samples", tmp_path / "truth"


def test_every_score_is_what_its_name_says(folders: tuple[Path, Path], tmp_path: Path) -> None:
    samples, truth = folders
    masks = tmp_path / "masks"
    hole = np.zeros((12, *SIZE), dtype=bool)
    for number in range(12):
        hole[number, 3 : 4 + number, 5:20] = True
        masks.mkdir(exist_ok=True)
        Image.fromarray(hole[number].astype(np.uint8) * 255).save(masks / f"{number:02d}.png")
    labels = {f"{number:02d}": number % 3 for number in range(12)}
    scores = score_folders(
        samples, truth, masks=masks, labels=labels, networks=_networks(), batch_size=5
    )
    a, b = _read(samples), _read(truth)
    x, y = Means()(a, classify=True), Means()(b)
    v, w = x.values.numpy(), y.values.numpy()
    root = scipy.linalg.sqrtm(np.cov(v, rowvar=False) @ np.cov(w, rowvar=False)).real
    covariances = np.cov(v, rowvar=False) + np.cov(w, rowvar=False) - 2 * root
    difference = np.abs(a.numpy().astype(float) - b.numpy().astype(float))
    inside = np.broadcast_to(hole[:, None], difference.shape)
    both = manifold.precision_recall(x.values, y.values)
    assert x.probabilities is not None
    psnr = skimage.metrics.peak_signal_noise_ratio
    expected = {
        "fid": ((v.mean(0) - w.mean(0)) ** 2).sum() + np.trace(covariances),
        "kid": kernel.kernel_distance(x.values, y.values).mean,
        "precision": both.precision,
        "recall": both.recall,
        "ca": 100 * np.mean(Brightest()(a).argmax(1).numpy() == np.arange(12) % 3),
        "pd": np.linalg.norm(v - w, axis=1).mean(),
        "pd_squared": (np.linalg.norm(v - w, axis=1) ** 2).mean(),
        "lpips": difference.mean(),
        "psnr": np.mean([psnr(p.numpy(), q.numpy()) for p, q in zip(a, b, strict=True)]),
        "psnr_pooled": 10 * np.log10(255**2 / (difference**2).mean()),
        "mae": difference.mean(),
        "mae_hole": difference[inside].mean(),
        "mae_known": difference[~inside].mean(),
    }
    for key, value in expected.items():
        assert scores[key].value == pytest.approx(float(value), rel=1e-8), key
        assert scores[key].images == 12
    assert scores["fid"].uses == str(Means.identity)
    assert scores["lpips"].uses == str(Distance.identity)
    assert scores["ca"].uses == str(Brightest.identity)
    assert set(scores.scores) == {*expected, "is", "ssim"}
    assert set(scores.absent) == {"diversity_ms_ssim", "diversity_lpips"}
    assert scores.names[3] == "03"
    assert scores.per_image["mae"][3] == pytest.approx(difference[3].mean())


def test_scores_do_not_depend_on_batches_or_processes(
    folders: tuple[Path, Path], in_processes: Callable[..., list[Any]]
) -> None:
    samples, truth = folders
    whole = score_folders(samples, truth, networks=_networks())

    def work(rank: int, gather: Callable[[Any], list[Any]]) -> Scores:
        return score_folders(samples, truth, networks=_networks(), shard=Shard(rank, 3, gather))

    others = [score_folders(samples, truth, networks=_networks(), batch_size=n) for n in (1, 7)]
    others += in_processes(3, work)
    for other in others:
        assert other.per_image == whole.per_image
        assert other.protocol == whole.protocol
        for key, score in whole.scores.items():
            if key in ("fid", "is"):  # sums whose order is that of the processes
                assert other[key].value == pytest.approx(score.value, rel=1e-9)
            else:
                assert other[key] == score, key


def test_several_samples_of_an_input(tmp_path: Path) -> None:
    names = [f"{name}_{copy}" for name in ("a", "b", "deep/c") for copy in (0, 1, 2, 10)]
    samples = _write(tmp_path / "samples", names, 1, (40, 44))
    truth = _write(tmp_path / "truth", ["a", "b", "deep/c"], 2, (40, 44))
    scores = score_folders(samples, truth, networks=_networks(), batch_size=3)
    groups = [
        torch.stack([read_picture(str(samples / f"{name}_{copy}.png")) for copy in (0, 1, 2, 10)])
        for name in ("a", "b", "deep/c")
    ]
    similar = [ms_ssim(group[:1].expand_as(group[1:]), group[1:]).mean() for group in groups]
    between = [Distance()(group[:-1], group[1:]).mean() for group in groups]
    assert scores["diversity_ms_ssim"].value == pytest.approx(float(np.mean(similar)), rel=1e-12)
    assert scores["diversity_ms_ssim"].uses == "MS-SSIM, 2 scales"
    assert scores["diversity_lpips"].value == pytest.approx(float(np.mean(between)), rel=1e-12)
    assert scores["diversity_lpips"].images == 3
    assert scores["psnr"].images == 12
    assert scores.protocol["samples"] == 12
    assert scores.protocol["reference images"] == 3  # each truth counts once


def test_the_built_in_network_is_named_everywhere(folders: tuple[Path, Path]) -> None:
    scores = score_folders(*folders)
    named = ("fid", "kid", "precision", "recall", "pd", "pd_squared", "lpips")
    assert {f"{key}_random" for key in named} <= set(scores.scores)
    assert not set(named) & set(scores.scores)
    for key in named:
        score = scores[f"{key}_random"]
        assert "random network" in score.title
        assert "NOT Inception" in score.uses
    assert "12 images for 480 features" in scores["fid_random"].note
    assert scores.table().startswith(STAND_IN)
    assert json.loads(scores.to_json())["warning"] == STAND_IN
    assert "the feature network knows no classes" in scores.absent["is"]
    real = score_folders(*folders, networks=_networks())
    assert STAND_IN not in real.table()
    assert "warning" not in json.loads(real.to_json())
    assert "fid_random" in side_by_side({"one": scores, "two": scores})
    mixed = Networks(Means(), RandomDistance())
    assert "lpips_random" in score_folders(*folders, networks=mixed).scores


def test_scores_of_different_networks_are_not_put_side_by_side(
    folders: tuple[Path, Path],
) -> None:
    class Other(Means):
        identity = Identity("channel means and deviations", "99" * 32)

    scores = score_folders(*folders, networks=_networks())
    other = score_folders(*folders, networks=Networks(Other(), Distance()))
    with pytest.raises(ValueError, match=r"fid cannot be compared: 'raw' used .*\[1212.* used"):
        side_by_side({"raw": scores, "ema": other})
    table = side_by_side({"raw": scores, "ema": scores})
    assert table.splitlines()[0].split() == ["metric", "raw", "ema"]


def test_equal_images(tmp_path: Path) -> None:
    truth = _write(tmp_path / "truth", "abcdef", 1)
    copies = _write(tmp_path / "copies", "abcdef", 1)
    scores = score_folders(copies, truth)
    assert scores["psnr"].value == float("inf")
    assert scores["psnr"].note == "6 images are equal"
    assert scores["ssim"].value == 1
    assert scores["fid_random"].value < 1e-9
    assert (scores["precision_random"].value, scores["recall_random"].value) == (1, 1)
    text = scores.to_json(per_image=True)
    content = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert content["scores"]["psnr"]["value"] == "inf"
    assert content["per_image"]["psnr"]["c"] == "inf"


def test_one_image_and_tiny_images(tmp_path: Path) -> None:
    one = _write(tmp_path / "one", "a", 1, (8, 9))
    other = _write(tmp_path / "other", "a", 2, (8, 9))
    scores = score_folders(one, other, networks=_networks())
    difference = Means()(_read(one)).values - Means()(_read(other)).values
    assert scores["fid"].value == pytest.approx(float(difference.square().sum()), rel=1e-9)
    assert scores.absent["kid"] == "it wants two images on each side"
    assert scores.absent["precision"] == "it wants more than 3 images on each side"
    assert scores.absent["ssim"] == "some images have a side below 11 pixels"
    with pytest.raises(KeyError, match="some images have a side below 11 pixels"):
        scores["ssim"]
    with pytest.raises(KeyError, match="nonsense: there are fid, "):
        scores["nonsense"]


def test_unpaired_folders_and_a_reference(folders: tuple[Path, Path], tmp_path: Path) -> None:
    samples, truth = folders
    reference = _write(tmp_path / "reference", [f"r{n}" for n in range(30)], 5)
    apart = score_folders(samples, reference, paired=False, networks=_networks())
    assert apart.protocol["reference images"] == 30
    assert set(apart.scores) == {"fid", "kid", "is", "precision", "recall"}
    assert "no truth was given" in apart.absent["psnr"]
    both = score_folders(samples, truth, reference=reference, networks=_networks())
    for key in ("fid", "kid", "precision", "recall"):
        assert both[key].value == apart[key].value
    assert both["fid"].value != score_folders(samples, truth, networks=_networks())["fid"].value
    with pytest.raises(ValueError, match="masks and labels: need paired=True"):
        score_folders(samples, reference, paired=False, labels={})


def test_reference_statistics_are_computed_once(
    folders: tuple[Path, Path], tmp_path: Path, in_processes: Callable[..., list[Any]]
) -> None:
    samples, reference = folders
    seen: list[int] = []

    class Counting(Means):
        def __call__(self, pictures: Tensor, *, classify: bool = False) -> Features:
            seen.append(len(pictures))
            return super().__call__(pictures, classify=classify)

    networks = Networks(Counting(), Distance())
    given = {"networks": networks, "paired": False, "cache": tmp_path / "cache"}
    first = score_folders(samples, reference, **given)
    assert sum(seen) == 24
    again = score_folders(samples, reference, **given)
    assert sum(seen) == 36  # the samples alone
    assert again.scores == first.scores
    assert len(list((tmp_path / "cache").iterdir())) == 1

    def work(rank: int, gather: Callable[[Any], list[Any]]) -> Scores:
        return score_folders(samples, reference, **given, shard=Shard(rank, 2, gather))

    assert all(scores["kid"] == first["kid"] for scores in in_processes(2, work))
    assert sum(seen) == 48
    next(reference.iterdir()).unlink()
    assert score_folders(samples, reference, **given).protocol["reference images"] == 11
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_published_layout(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for seed, prefix in enumerate(("Out_", "GT_", "Process_")):
        _write(folder, [f"{prefix}{name}" for name in "ab"], seed)
    for name in "ab":
        Image.new("L", (SIZE[1], SIZE[0]), 255).save(folder / f"Mask_{name}.png")
    scores = score_folders(folder, folder, masks=folder, networks=_networks())
    plain = score_folders(
        _write(tmp_path / "out", "ab", 0), _write(tmp_path / "gt", "ab", 1), networks=_networks()
    )
    assert scores["psnr"] == plain["psnr"]
    assert scores["mae_hole"].value == plain["mae"].value
    assert scores.absent["mae_known"] == "the masks leave no pixel outside"
    with pytest.raises(ValueError, match="compared with itself; wanted are two folders"):
        score_folders(tmp_path / "out", tmp_path / "out" / ".")


def test_pictures_of_different_sizes(tmp_path: Path) -> None:
    for seed, side in enumerate(("samples", "truth")):
        _write(tmp_path / side, ["a", "c"], seed)
        _write(tmp_path / side, ["b"], seed, (50, 30))
    scores = score_folders(tmp_path / "samples", tmp_path / "truth", networks=_networks())
    assert scores["psnr"].images == 3
    resized = score_folders(
        tmp_path / "samples", tmp_path / "truth", networks=_networks(), size=(16, 16)
    )
    assert resized.protocol["pictures"] == "central crop, Lanczos to 16x16"
    _write(tmp_path / "samples", ["b"], 3, (30, 30))
    with pytest.raises(ValueError, match=r"samples/b\.png is 30x30, its truth .*b\.png 50x30"):
        score_folders(tmp_path / "samples", tmp_path / "truth", networks=_networks())


def test_progress_is_told(folders: tuple[Path, Path]) -> None:
    told: list[tuple[str, int, int]] = []
    score_folders(
        *folders,
        reference=folders[1],
        networks=_networks(),
        batch_size=8,
        progress=lambda *facts: told.append(facts),
    )
    assert told[:2] == [("samples", 1, 12), ("samples", 2, 12)]
    assert told[-3:] == [("samples", 12, 12), ("reference", 8, 12), ("reference", 12, 12)]


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: [p.unlink() for p in s.iterdir()], "no image in this folder or below"),
        (lambda s, t: (t / "07.png").unlink(), "samples: 1 of 12 images have no partner .* '07'"),
        (lambda s, t: (s / "07.png").unlink(), "truth: 1 of 12 images have no partner .* '07'"),
        (lambda s, t: s.rename(s.with_name("gone")), "no such folder"),
        (lambda s, t: _damage(s / "07.png"), r"07\.png: damaged image"),
        (lambda s, t: _damage(t / "07.png"), r"07\.png: damaged image"),
        (lambda s, t: Image.new("L", (9, 9)).save(t / "07.bmp"), "two images of one name"),
    ],
)
def test_mismatched_folders(
    folders: tuple[Path, Path], change: Callable[[Path, Path], object], message: str
) -> None:
    change(*folders)
    with pytest.raises(ValueError, match=message) as caught:
        score_folders(*folders, networks=_networks())
    assert "\n" not in str(caught.value)


def test_masks_and_labels_that_do_not_fit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    hole = tmp_path / "hole.png"
    Image.new("L", (SIZE[1], SIZE[0] + 1), 255).save(hole)
    with pytest.raises(ValueError, match=r"hole\.png: the mask is 25x32, its picture 24x32"):
        score_folders(*folders, masks=hole)
    masks = _write(tmp_path / "masks", ["00", "01"], 1)
    with pytest.raises(ValueError, match=r"truth: 10 of 12 .* in masks \(.*masks\), .* '02'"):
        score_folders(*folders, masks=masks)
    with pytest.raises(ValueError, match="in labels, the first is '01'"):
        score_folders(*folders, labels={"00": 1}, networks=_networks())
    wrong = dict.fromkeys((f"{n:02d}" for n in range(12)), 3)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, got 3"):
        score_folders(*folders, labels=wrong, networks=_networks())
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score_folders(*folders, batch_size=0)


def test_statistics_of_another_network_are_refused(folders: tuple[Path, Path]) -> None:
    networks = _networks()
    scorer = Scorer(networks)
    with pytest.raises(ValueError, match="no images were scored"):
        summarise(scorer.tally, networks)
    scorer.update(_read(folders[0]), torch.arange(12))
    other = Networks(RandomNetwork()).statistics()
    with pytest.raises(ValueError, match="statistics of different networks cannot be compared"):
        summarise(scorer.tally, networks, other)
    assert summarise(scorer.tally, networks).absent["fid"] == "no reference images were given"
