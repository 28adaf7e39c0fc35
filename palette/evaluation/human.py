"""Two-choice trials: a page that shows truth and sample for a moment and asks which is real.

As in the paper (appendix C.1): both pictures for 3 or 5 seconds, then the question; the fool rate
is the share of trials in which the sample was taken for the photograph. The paper leaves open how
many trials a rater had; SR3, by the same authors and with the same question, had 50.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from palette import _html as page
from palette._album import Album
from palette._html import Html
from palette.data.order import permute
from palette.data.paths import printable
from palette.evaluation.results import Results
from palette.ops.philox import words

PAGE = "human.html"
QUESTION = "Which image would you guess is from a camera?"
PAPER = (
    ("colorization", "PixColor", "29.90"),
    ("colorization", "ColTran", "36.55"),
    ("colorization", "Regression", "39.45"),
    ("colorization", "Palette", "47.80"),
    ("uncropping, right half", "InfinityGAN", "15"),
    ("uncropping, right half", "Boundless", "25"),
    ("uncropping, right half", "Palette", "40"),
)
"""Task, method and fool rate [%] of the paper (table 1, section 5.4)."""

_STREAM = 0x2AFC  # of the draws for side and sample; the key is the seed of the page


def write(folder: Path, *, seed: int = 0, seconds: float = 3.0, trials: int = 50) -> Path:
    """Write ``human.html`` into an evaluation folder; it needs no other file and no network.

    Which inputs come, in which order, which sample of each and on which side are functions of the
    seed alone. The answers stay in the page until the rater downloads them as JSON.

    Args:
        folder: as :class:`palette.evaluation.results.Results` reads it, with truth and samples.
        seed: another one gives another rater another order; 64 bits.
        seconds: how long both pictures are seen; 3 or 5 in the paper.
        trials: at most so many inputs are shown.

    Returns:
        The path of the page.

    Raises:
        ValueError: an argument is out of range; there is no sample with its truth; the two differ
            in size or cannot be read.
    """
    check(seed, seconds)
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    results = Results(folder)
    numbers = [n for n in results.samples if results.picture("truth", n).is_file()]
    if not numbers:
        raise ValueError(f"{printable(folder)}: no sample has its truth beside it in truth/")
    chosen = _trials(results, numbers, seed, trials)
    content = {"seed": str(seed), "seconds": seconds, "question": QUESTION, "trials": chosen}
    return page.write_page(
        folder / PAGE,
        "Which one is the photograph?",
        *_parts(len(chosen), seconds),
        page.embedded_json("data", content),
        script=_SCRIPT,
        style=_STYLE,
    )


def check(seed: int, seconds: float) -> None:
    """Raise ValueError for arguments of :func:`write` that are out of range."""
    if not 0 < seconds <= 3600:
        raise ValueError(f"seconds must lie in (0, 3600], got {seconds}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must have at most 64 bits, got {seed}")


def _trials(results: Results, numbers: list[str], seed: int, most: int) -> list[dict[str, Any]]:
    count = min(most, len(numbers))
    key = (seed + 2**63) % 2**64 - 2**63
    order = permute(key, 0, np.arange(count), len(numbers)).tolist()
    draws = words(torch.tensor([key]), 2 * len(numbers), stream=_STREAM)[0].tolist()
    album = Album(2 * count)
    found = []
    for place in order:
        number = numbers[place]
        copies = list(results.samples[number].items())
        side, draw = draws[2 * place] >> 31, draws[2 * place + 1]
        copy, path = copies[draw * len(copies) >> 32]
        pair = album.pair(results.picture("truth", number), path)
        left, right = pair if side == 0 else pair[::-1]
        found.append(
            {
                "name": results.name(number),
                "number": number,
                "sample": copy,
                "photograph": ("left", "right")[side],
                "left": left.uri,
                "right": right.uri,
            }
        )
    return found


def _parts(count: int, seconds: float) -> list[Html]:
    """What the page consists of; the script shows one part at a time."""
    span = page.digits(float(seconds))
    introduction = page.tag(
        "section",
        page.tag("h1", "Which one is the photograph?"),
        page.tag(
            "p",
            f"You will see {count} pairs of pictures, each for {span} seconds. One of the two is a "
            "photograph, the other was made by a model. Then both disappear and you are asked: "
            f"“{QUESTION}”",
        ),
        page.tag("p", "Answer with the buttons or with the arrow keys ← and →."),
        page.tag("p", _button("start", "Start", main=True)),
        id="introduction",
    )
    look = page.tag(
        "section",
        page.tag("p", class_="soft progress"),
        page.tag("div", *(_picture(side) for side in ("left", "right")), class_="pair"),
        id="look",
        hidden=True,
    )
    ask = page.tag(
        "section",
        page.tag("p", class_="soft progress"),
        page.tag("h2", QUESTION),
        page.tag("p", _button("choose-left", "← Left"), " ", _button("choose-right", "Right →")),
        page.tag("p", _button("stop", "Stop here and show the result"), class_="stop"),
        id="ask",
        hidden=True,
    )
    return [introduction, look, ask, _result()]


def _result() -> Html:
    return page.tag(
        "section",
        page.tag("h1", "Fool rate: ", page.tag("span", id="rate")),
        page.tag("p", id="summary"),
        page.tag("p", _button("download", "Download the answers", main=True)),
        page.tag("h2", "In the paper"),
        page.table(("task", "method", "fool rate [%]"), PAPER),
        page.tag(
            "p",
            "Palette (Saharia et al., SIGGRAPH 2022): pictures of 256x256 seen for 3 or 5 seconds, "
            "the same question. At 50 % nobody can tell samples from photographs.",
            class_="soft",
        ),
        id="result",
        hidden=True,
    )


def _button(name: str, text: str, *, main: bool = False) -> Html:
    return page.tag("button", text, id=name, type="button", class_="main" if main else None)


def _picture(side: str) -> Html:
    return Html(f'<img id="{side}" alt="{side} picture">')


_STYLE = """
main { max-width: 52rem; min-height: 100vh; }
h2 { border: 0; }
.pair { display: flex; gap: 4%; }
.pair img { width: 48%; aspect-ratio: 1; object-fit: contain; border-radius: 3px; }
.stop { margin-top: 4rem; } .stop button { font-size: .85rem; padding: .25rem .8rem; }
#ask button:not(#stop) { min-width: 8rem; padding: 1rem; }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (name) => document.getElementById(name);
const answers = [];
let asked = 0;

function show(name) {
  for (const part of ["introduction", "look", "ask", "result"]) {
    element(part).hidden = part !== name;
  }
  const text = `${answers.length + 1} of ${data.trials.length}`;
  for (const line of document.querySelectorAll(".progress")) line.textContent = text;
}

async function look() {
  const trial = data.trials[answers.length];
  const pictures = [element("left"), element("right")];
  pictures[0].src = trial.left;
  pictures[1].src = trial.right;
  await Promise.all(pictures.map((picture) => picture.decode()));
  for (const picture of pictures) {
    picture.classList.toggle("small", picture.naturalWidth < 96);
  }
  show("look");
  // the time runs from the moment they are on the screen
  requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(ask, 1000 * data.seconds)));
}

function ask() {
  for (const side of ["left", "right"]) element(side).removeAttribute("src");
  asked = performance.now();
  show("ask");
}

function answer(side) {
  if (element("ask").hidden) return;
  const { name, number, sample, photograph } = data.trials[answers.length];
  const milliseconds = Math.round(performance.now() - asked);
  const fooled = side !== photograph;
  answers.push({ name, number, sample, photograph, answer: side, fooled, milliseconds });
  element("ask").hidden = true;
  if (answers.length < data.trials.length) look();
  else finish();
}

function outcome() {
  const count = answers.length;
  const fooled = answers.filter((one) => one.fooled).length;
  const rate = fooled / count;
  const error = Math.sqrt(rate * (1 - rate) / count);
  // Wilson's interval at 95 %, which makes sense at 0 and at 1 too
  const z = 1.959964, scale = 1 + z * z / count;
  const middle = (rate + z * z / (2 * count)) / scale;
  const reach = z * Math.hypot(error, z / (2 * count)) / scale;
  return { trials: count, fooled, fool_rate: rate, standard_error: error,
    interval_95: [Math.max(0, middle - reach), Math.min(1, middle + reach)] };
}

function finish() {
  if (!answers.length) return;
  const found = outcome();
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  element("rate").textContent = `${percent(found.fool_rate)} ± ${percent(found.standard_error)}`;
  element("summary").textContent =
    `The sample was taken for the photograph in ${found.fooled} of ${found.trials} trials; ` +
    `binomial standard error, 95 % interval ${found.interval_95.map(percent).join(" to ")}.`;
  show("result");
}

function download() {
  const { seed, seconds, question } = data;
  const text = JSON.stringify({ seed, seconds, question, ...outcome(), answers }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `human-seed-${seed}.json`;
  link.click();
}

element("start").addEventListener("click", look);
element("choose-left").addEventListener("click", () => answer("left"));
element("choose-right").addEventListener("click", () => answer("right"));
element("stop").addEventListener("click", finish);
element("download").addEventListener("click", download);
document.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") answer("left");
  if (event.key === "ArrowRight") answer("right");
});
"""
