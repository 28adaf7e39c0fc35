from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from palette.evaluation import page
from palette.evaluation.results import Results


def text_of(path: Path) -> str:
    return re.sub(r'src="[^"]*"', "", path.read_text(encoding="utf-8"))


def test_the_page_says_everything_about_the_evaluation(evaluated: Path) -> None:
    text = text_of(page.write(evaluated))
    for fact in ("runs/x", "0123abcd", "dpmpp_2m", "palette evaluate &#x27;a b&#x27;", "photo_3"):
        assert fact in text
    assert "random-conv-1 (built in, fixed random weights, NOT Inception" in text
    assert "They are not FID" in text
    assert text.count('class="badge">random network') >= 8
    assert "ImageNet ctest10k" in text
    assert "10000" in text
    assert "not comparable" in text
    assert text.count("<h3>best: ") == text.count("<h3>worst: ") == 5  # PD, LPIPS, PSNR, SSIM, MAE


def test_nothing_in_a_name_becomes_markup(evaluated: Path) -> None:
    text = page.write(evaluated).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;img src=&quot;https" in text
    assert text.count("https:") == text.count("&quot;https:")


def test_best_and_worst_are_of_different_inputs_in_order(evaluated: Path) -> None:
    results = Results(evaluated)
    score = next(score for score in results.scores() if score.key == "mae")
    ranked = results.ranked(score)
    assert len(ranked) == sum(len(samples) for samples in results.samples.values())
    assert [one.value for one in ranked] == sorted(one.value for one in ranked)
    best, worst = page._extremes(results, [score])[score]
    assert best[0] == ranked[0]
    assert worst[0] == ranked[-1]
    assert len({one.number for one in (*best, *worst)}) == 6


def test_the_most_and_the_least_diverse_inputs_are_shown(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated, tmp_path / "more")
    for copy in range(3):
        sample = tmp_path / "more" / "samples" / "00000_0.png"
        shutil.copy(sample, sample.with_name(f"00006_{copy}.png"))
    scores = json.loads((evaluated / "scores.json").read_text())
    values = {f"{number:05d}": 0.5 + number / 100 for number in (3, 6, 0, 5, 1, 4, 2)}
    scores["per_image"]["diversity_ms_ssim"] = values
    (tmp_path / "more" / "scores.json").write_text(json.dumps(scores))
    results = Results(tmp_path / "more")
    strips = page._strips(results, results.scores())
    assert list(strips) == ["00000", "00001", "00002", "00004", "00005", "00006"]
    assert strips["00001"].startswith("most diverse, MS-SSIM of")
    assert strips["00006"].startswith("least diverse")
    assert strips["00006"].endswith("0.56")


def test_whatever_is_optional_may_be_missing(evaluated: Path, tmp_path: Path) -> None:
    for kind in ("samples", "truth"):
        shutil.copytree(evaluated / kind, tmp_path / kind)
    (tmp_path / "truth" / "00001.png").unlink()
    (tmp_path / "truth" / "00002.png").write_bytes(b"no picture")
    text = text_of(page.write(tmp_path))
    assert "nothing was scored" in text
    assert "00001.png: missing" in text
    assert "00002.png: not readable" in text
    assert "Settings" not in text


@pytest.mark.parametrize(
    "scores",
    [
        {"scores": {"fid": {"value": "nan"}, "x": 3, "psnr": {"value": "inf", "images": None}}},
        {"scores": [], "paper": {"rows": {"a": 1}}, "per_image": {"fid": 5}},
        {"paper": None, "absent": {"is": None}, "protocol": {"a": {"b": [1, None]}}},
    ],
)
def test_scores_of_another_form_do_not_stop_it(
    scores: dict[str, Any], evaluated: Path, tmp_path: Path
) -> None:
    shutil.copytree(evaluated / "samples", tmp_path / "samples")
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    page.write(tmp_path)


def test_a_folder_without_evaluation_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no evaluation; wanted is a folder .* samples/NNNNN_K"):
        page.write(tmp_path)
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ValueError, match=r"scores\.json: damaged"):
        page.write(tmp_path)


def test_large_pictures_keep_the_page_within_its_bound(tmp_path: Path) -> None:
    for kind in ("samples", "truth", "inputs"):
        (tmp_path / kind).mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (600, 700, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png", compress_level=1)
    for number in range(10):
        for copy in range(8):
            shutil.copy(tmp_path / "picture.png", tmp_path / "samples" / f"{number:05d}_{copy}.png")
        for kind in ("truth", "inputs"):
            shutil.copy(tmp_path / "picture.png", tmp_path / kind / f"{number:05d}.png")
    path = page.write(tmp_path)
    assert 8 * 2**20 < path.stat().st_size < 16 * 2**20 + 100_000
    assert "84 of 84 are shown at a side of at most 256 pixels" in text_of(path)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_in_a_browser(evaluated: Path, browser_page: Any, width: int, dark: bool) -> None:
    browser_page.open(page.write(evaluated), width=width, dark=dark)
    assert browser_page.problems == []
    assert browser_page.asked_for_nothing_else()
    pictures = "[...document.images]"
    assert browser_page.evaluate(f"{pictures}.length") > 100
    assert browser_page.evaluate(f"{pictures}.every((one) => one.naturalWidth === 40)")
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= width
    shot = browser_page.screenshot()
    assert len(shot.getcolors(2**24)) > 1000
    corner = sum(shot.getpixel((2, 2))) / 3
    assert corner < 60 if dark else corner > 240
