from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from palette.cli import main
from palette.evaluation import human


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    assert found is not None
    return json.loads(found[1])


def picture(uri: str) -> Image.Image:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_every_trial_holds_truth_and_sample_pixel_by_pixel(evaluated: Path) -> None:
    found = data_of(human.write(evaluated))
    assert len(found["trials"]) == 6
    assert len({trial["number"] for trial in found["trials"]}) == 6
    for trial in found["trials"]:
        other = {"left": "right", "right": "left"}[trial["photograph"]]
        for side, file in (
            (trial["photograph"], f"truth/{trial['number']}.png"),
            (other, f"samples/{trial['number']}_{trial['sample']}.png"),
        ):
            with Image.open(evaluated / file) as original:
                assert np.array_equal(picture(trial[side]), original)


def test_order_sides_and_samples_follow_from_the_seed(evaluated: Path) -> None:
    def drawn(seed: int) -> list[tuple[str, str, int]]:
        trials = data_of(human.write(evaluated, seed=seed))["trials"]
        return [(one["number"], one["photograph"], one["sample"]) for one in trials]

    assert drawn(3) == drawn(3)
    several = [drawn(seed) for seed in (0, 1, 2, 3, -1, 2**64 - 2)]
    assert len({tuple(one) for one in several}) == len(several)
    first = [one[0] for one in several]
    assert len({one[0] for one in first}) > 1
    sides = [side for one in several for _, side, _ in one]
    assert 9 < sides.count("left") < 27  # 36 throws of a coin
    assert {copy for one in several for _, _, copy in one} == {0, 1, 2}


def test_fewer_trials_are_the_beginning_of_the_same_order(evaluated: Path) -> None:
    whole = data_of(human.write(evaluated, seed=5))["trials"]
    assert data_of(human.write(evaluated, seed=5, trials=4))["trials"] == whole[:4]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"seconds": 0.0}, "seconds must lie in"),
        ({"seconds": math.nan}, "seconds must lie in"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"seed": 2**64}, "at most 64 bits"),
    ],
)
def test_a_wrong_argument_is_named(
    evaluated: Path, arguments: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        human.write(evaluated, **arguments)


def test_a_folder_without_pairs_is_one_clear_line(evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated / "samples", tmp_path / "samples")
    with pytest.raises(ValueError, match="no sample has its truth"):
        human.write(tmp_path)
    (tmp_path / "truth").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "truth" / "00000.png")
    with pytest.raises(ValueError, match="wanted are two of one size, found 9x9 and 40x40"):
        human.write(tmp_path)


def test_the_command_writes_it(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--samples", f"{evaluated / 'samples'}", "--truth"]
    command += [f"{evaluated / 'truth'}", "--human"]
    assert main([*command, "--human-seconds", "-1"]) == 2
    assert "seconds must lie in (0, 3600], got -1.0" in capsys.readouterr().err
    assert main(command) == 2
    assert "--human: needs --output" in capsys.readouterr().err
    output = tmp_path / "out"
    more = ["--human-seconds", "5", "--human-seed", "3", "--output", f"{output}"]
    assert main([*command, *more]) == 0
    assert str(output / "human.html") in capsys.readouterr().out
    found = data_of(output / "human.html")
    expected = data_of(human.write(evaluated, seed=3, seconds=5.0))
    assert (found["seed"], found["seconds"], len(found["trials"])) == ("3", 5.0, 6)
    for key in ("number", "sample", "photograph", "left"):
        assert [one[key] for one in found["trials"]] == [one[key] for one in expected["trials"]]


def test_large_pairs_are_shrunk_alike(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (300, 600, 3)).astype(np.uint8)
    for name, image in (("truth/00000", pixels), ("samples/00000_0", pixels // 64 * 64)):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    trial = data_of(human.write(tmp_path))["trials"][0]
    assert picture(trial["left"]).size == picture(trial["right"]).size == (256, 128)


def test_one_round_in_a_browser(evaluated: Path, browser_page: Any, tmp_path: Path) -> None:
    path = human.write(evaluated, seed=1, seconds=2.5)
    trials = data_of(path)["trials"]
    browser_page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser_page.open(path, width=1100, height=800)

    def click(name: str) -> None:
        browser_page.evaluate(f"document.getElementById('{name}').click()")

    def text(selector: str) -> str:
        return browser_page.evaluate(f"document.querySelector('{selector}').textContent")

    visible = "document.getElementById('{}').checkVisibility()".format
    # the test says when the time is up
    browser_page.evaluate("window.setTimeout = (act, wait) => { window.timer = { act, wait }; }")
    click("start")
    shots = []
    for number, trial in enumerate(trials):
        browser_page.wait(f"window.timer && {visible('look')}")
        assert browser_page.evaluate("timer.wait") == 2500
        assert browser_page.evaluate(f"{visible('left')} && {visible('right')}")
        shots.append(browser_page.screenshot())
        early = "new KeyboardEvent('keydown', { key: 'ArrowLeft' })"
        browser_page.evaluate(f"document.dispatchEvent({early})")
        browser_page.evaluate("timer.act(), timer = null")
        assert browser_page.evaluate(visible("ask"))
        assert not browser_page.evaluate(visible("left"))
        assert not browser_page.evaluate("document.getElementById('left').hasAttribute('src')")
        assert text(".progress") == f"{number + 1} of {len(trials)}"
        # fooled in the first two trials only
        wrong = {"left": "right", "right": "left"}[trial["photograph"]]
        click(f"choose-{wrong if number < 2 else trial['photograph']}")
    browser_page.wait(visible("result"))
    assert text("#rate") == "33.3 % ± 19.2 %"  # sqrt(1/3 * 2/3 / 6)
    assert "in 2 of 6 trials" in text("#summary")
    shots.append(browser_page.screenshot())
    assert all(len(shot.getcolors(2**24)) > 100 for shot in shots)
    click("download")
    answers = tmp_path / "human-seed-1.json"
    end = time.monotonic() + 30
    while not answers.exists() and time.monotonic() < end:
        time.sleep(0.02)
    found = json.loads(answers.read_text())
    assert (found["trials"], found["fooled"], len(found["answers"])) == (6, 2, 6)
    assert found["fool_rate"] == pytest.approx(1 / 3)
    # scipy.stats.binomtest(2, 6).proportion_ci(method="wilson")
    assert found["interval_95"] == pytest.approx([0.0967714, 0.7000067], abs=1e-6)
    assert [one["fooled"] for one in found["answers"]] == [True, True, False, False, False, False]
    assert browser_page.problems == []
    assert browser_page.asked_for_nothing_else()
