"""One page of an evaluation: pictures, scores, the paper's figures, and how all of it was made."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from palette import _html as page
from palette._album import Album
from palette._html import Html
from palette.evaluation.results import Ranked, Results, listed, part
from palette.metrics.scores import STAND_IN, Score

INPUTS = 10
"""Inputs shown in order of their numbers."""
EXTREMES = 3
"""Best and worst pictures shown of each metric."""
STRIPS, LENGTH = 6, 8
"""Inputs shown with several samples, and samples shown of each."""

_ARROW = {"higher": "↑", "lower": "↓", "neither": ""}
_OF_INPUTS = "diversity"  # such metrics belong to an input, not to a sample


def write(folder: Path) -> Path:
    """Write ``index.html`` into an evaluation folder; it needs no other file and no network.

    Args:
        folder: as :class:`palette.evaluation.results.Results` reads it.

    Returns:
        The path of the page.

    Raises:
        ValueError: the folder holds no evaluation, or a JSON file in it is damaged.
    """
    results = Results(folder)
    scores = results.scores()
    extremes = _extremes(results, scores)
    shown = list(results.samples)[:INPUTS]
    strips = _strips(results, scores)
    columns = 1 + sum(results.has(kind) for kind in ("inputs", "masks", "truth"))
    album = Album(
        len(shown) * columns
        + 3 * sum(len(best) + len(worst) for best, worst in extremes.values())
        + sum(1 + min(len(results.samples[number]), LENGTH) for number in strips)
    )
    sections = [
        _heading(results),
        _warning(results, scores),
        _scores(results, scores),
        _paper(results, scores),
        _samples(results, album, shown),
        _best_and_worst(results, album, extremes),
        _diversity(results, album, strips),
        _settings(results),
    ]
    foot = page.tag(
        "footer", f"This file holds everything it shows and asks for nothing else; {album.remark()}"
    )
    return page.write_page(folder / "index.html", _title(results), *sections, foot)


def _title(results: Results) -> str:
    task = results.settings.get("task")
    return f"Evaluation: {task}" if isinstance(task, str) else "Evaluation"


def _heading(results: Results) -> Html:
    drawn = sum(len(samples) for samples in results.samples.values())
    facts = [f"{len(results.samples)} inputs, {drawn} samples"] if results.samples else []
    for key in ("checkpoint", "solver", "steps", "seed"):
        if key in results.settings:
            facts.append(f"{key} {results.settings[key]}")
    return page.join(
        [page.tag("h1", _title(results)), page.tag("p", "\u00a0· ".join(facts), class_="soft")]
    )


def _warning(results: Results, scores: list[Score]) -> Html:
    if not any(map(_stand_in, scores)) and "warning" not in results.scored:
        return Html("")
    text = str(results.scored.get("warning") or STAND_IN)
    return page.tag(
        "p", page.tag("strong", "Built-in random network. "), text, class_="warning", role="note"
    )


def _stand_in(score: Score) -> bool:
    return score.key.endswith("_random")


def _scores(results: Results, scores: list[Score]) -> Html:
    uses = list(dict.fromkeys(score.uses for score in scores if score.uses))
    rows = []
    for score in scores:
        spread = "" if score.spread is None else f"± {page.digits(score.spread)}"
        value = f"{page.digits(score.value)} {_ARROW[score.better]}"
        mark = f"[{uses.index(score.uses) + 1}]" if score.uses else ""
        rows.append((_named(score), value, spread, score.images, mark, score.note))
    absent = [f"{key}: {why}" for key, why in part(results.scored, "absent").items()]
    if not rows:
        return page.section("Scores", page.tag("p", "No scores.json here: nothing was scored."))
    legend = "↑ higher is better, ↓ lower is better; ± one standard deviation over images or splits"
    return page.section(
        "Scores",
        page.table(("metric", "value", "", "images", "uses", ""), rows, numbers=4),
        page.tag("p", legend, class_="soft"),
        *(
            page.tag("p", f"[{number}] {text}", class_="soft")
            for number, text in enumerate(uses, 1)
        ),
        page.folded(f"Not computed ({len(absent)})", page.notes(absent)) if absent else "",
    )


def _named(score: Score) -> Html:
    """The title of a score, with a label where the built-in random network made it."""
    badge = page.tag("span", "random network", class_="badge") if _stand_in(score) else ""
    return page.join([score.title.removesuffix(" (random network)"), badge], " ")


def _paper(results: Results, scores: list[Score]) -> Html:
    """The paper's figures for this task, ours below them, and what differs between the two."""
    paper = part(results.scored, "paper")
    rows = [(str(row.get("method", "")), part(row, "values")) for row in listed(paper, "rows")]
    if not rows:
        return Html("")
    columns = list(dict.fromkeys(column for _, values in rows for column in values))
    lines = [
        (method, *(page.digits(values.get(column, "-")) for column in columns))
        for method, values in rows
    ]
    ours = [_ours(column, scores) for column in columns]
    lines.append((page.tag("strong", "this evaluation"), *ours))
    about = [paper.get("setting"), paper.get("data")]
    if isinstance(paper.get("table"), str):
        about.insert(0, f"table {paper['table'].removeprefix('T')}")
    what = ", ".join(str(fact) for fact in about if fact)
    differences = [
        (fact.get("what"), fact.get("here"), fact.get("paper"))
        for fact in listed(paper, "differences")
    ]
    return page.section(
        "Beside the paper",
        page.tag("p", f"Palette (Saharia et al., SIGGRAPH 2022): {what}"),
        page.table(("", *map(str.upper, columns)), lines, numbers=len(columns)),
        page.tag("p", paper["note"], class_="soft") if paper.get("note") else "",
        page.tag("h3", "What differs from the paper's protocol"),
        page.table(("", "here", "in the paper"), differences)
        if differences
        else page.tag("p", "Nothing that is known."),
    )


def _ours(column: str, scores: list[Score]) -> Html | str:
    """Our figure in a column of the paper's; none where only a stand-in network has one."""
    found = {score.key: score for score in scores}
    if column in found:
        return page.digits(found[column].value)
    stand_in = f"{column}_random" in found
    return page.tag("span", "not comparable", class_="badge") if stand_in else "-"


def _samples(results: Results, album: Album, shown: list[str]) -> Html:
    if not shown:
        return Html("")
    rows = []
    for number in shown:
        copy, sample = next(iter(results.samples[number].items()))
        figures = [
            album.figure(results.picture(kind, number), caption)
            for kind, caption in (("inputs", "input"), ("masks", "mask"))
            if results.has(kind)
        ]
        figures.append(album.figure(sample, f"sample {copy}" if copy else "sample"))
        if results.has("truth"):
            figures.append(album.figure(results.picture("truth", number), "truth"))
        name = page.tag("p", results.name(number), class_="name")
        rows.append(page.tag("div", name, page.tag("div", *figures, class_="row"), class_="card"))
    some = f"The first {len(shown)} of {len(results.samples)} inputs, in order and not chosen."
    return page.section(
        "Samples beside input and truth",
        page.tag("p", some, class_="soft") if len(shown) < len(results.samples) else "",
        page.tag("div", *rows, class_="cards large"),
    )


def _extremes(
    results: Results, scores: list[Score]
) -> dict[Score, tuple[list[Ranked], list[Ranked]]]:
    """Best and worst pictures of each metric that belongs to single samples."""
    found = {}
    for score in scores:
        ranked = results.ranked(score)
        best, worst = _distinct(ranked), _distinct(ranked[::-1])
        if score.better == "neither" or score.key.startswith(_OF_INPUTS) or len(ranked) < 2:
            continue
        count = min(EXTREMES, max(len(best) // 2, 1))
        found[score] = (best[:count], worst[:count])
    return found


def _distinct(ranked: list[Ranked]) -> list[Ranked]:
    """The first of each input."""
    found: dict[str, Ranked] = {}
    for one in ranked:
        found.setdefault(one.number, one)
    return list(found.values())


def _best_and_worst(
    results: Results, album: Album, extremes: dict[Score, tuple[list[Ranked], list[Ranked]]]
) -> Html:
    parts: list[Html] = []
    for score, both in extremes.items():
        for kind, chosen in zip(("best", "worst"), both, strict=True):
            cards = [_card(results, album, one) for one in chosen]
            parts.append(page.tag("h3", f"{kind}: ", _named(score)))
            parts.append(page.tag("div", *cards, class_="cards"))
    return page.section("Best and worst", *parts)


def _card(results: Results, album: Album, one: Ranked) -> Html:
    paths = {
        "input": results.picture("inputs", one.number) if results.has("inputs") else None,
        "sample": results.samples[one.number][one.copy],
        "truth": results.picture("truth", one.number) if results.has("truth") else None,
    }
    figures = [album.figure(path, caption) for caption, path in paths.items() if path is not None]
    value = "∞" if math.isinf(one.value) else page.digits(one.value)
    name = page.tag("p", page.tag("strong", value), f"  {results.name(one.number)}", class_="name")
    return page.tag("div", name, page.tag("div", *figures, class_="row"), class_="card")


def _strips(results: Results, scores: list[Score]) -> dict[str, str]:
    """Inputs with several samples to what is remarkable about them: the most and least diverse."""
    several = [number for number, drawn in results.samples.items() if len(drawn) > 1]
    for score in scores:
        if not score.key.startswith(_OF_INPUTS):
            continue
        ranked = [one for one in results.ranked(score) if one.number in several]
        if len(ranked) > STRIPS:
            half = STRIPS // 2
            chosen = [*zip(["most diverse"] * half, ranked[:half], strict=True)]
            chosen += zip(["least diverse"] * half, ranked[-half:], strict=True)
            return {
                one.number: f"{words}, {score.title.partition(': ')[2]}: {page.digits(one.value)}"
                for words, one in chosen
            }
    return dict.fromkeys(several[:STRIPS], "")


def _diversity(results: Results, album: Album, strips: dict[str, str]) -> Html:
    rows = []
    for number, words in strips.items():
        figures = []
        if results.has("inputs"):
            figures.append(album.figure(results.picture("inputs", number), "input"))
        drawn = list(results.samples[number].items())[:LENGTH]
        figures += [album.figure(path, f"sample {copy}") for copy, path in drawn]
        name = page.tag("p", results.name(number), class_="name")
        note = page.tag("p", words, class_="soft") if words else ""
        row = page.tag("div", *figures, class_="row", tabindex="0")
        rows.append(page.tag("div", name, note, row))
    body = page.tag("div", *rows, class_="rows") if rows else ""
    return page.section("Several samples of one input", body)


def _settings(results: Results) -> Html:
    values = dict(results.settings)
    command = values.pop("command", None)
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    protocol = part(results.scored, "protocol")
    return page.join(
        [
            page.section("Settings", page.settings(values)),
            page.section("What was compared", page.settings(protocol)),
            page.section("The command", page.tag("pre", command) if command else ""),
        ]
    )
