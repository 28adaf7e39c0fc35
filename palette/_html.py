"""Pages that are one file each: no script, font, picture or style from anywhere else.

Every page carries a content security policy that forbids requests, so what a file name or a setting
brings with it can neither run nor call home.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from palette import _durable


class Html(str):
    """Text that is markup already."""


def escape(value: object) -> Html:
    """Anything as text of a page; :class:`Html` stays as it is."""
    if isinstance(value, Html):
        return value
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return Html(html.escape("".join(c if c.isprintable() or c == "\n" else " " for c in text)))


def join(parts: Iterable[object], between: str = "\n") -> Html:
    """Parts one after the other, each escaped unless it is markup."""
    return Html(between.join(escape(part) for part in parts))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element; ``class_`` is the attribute class, ``aria_label`` aria-label; None is none."""
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    given = "".join(
        f" {key}" if value is True else f' {key}="{escape(value)}"'
        for key, value in named.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{given}>{join(content, '')}</{name}>")


def section(title: str, *content: object) -> Html:
    """A part of a page below a heading; nothing where there is no content."""
    if not any(content):
        return Html("")
    return tag("section", tag("h2", title), *content)


def table(header: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: int = 0) -> Html:
    """A table that scrolls sideways where the screen is narrow.

    Args:
        header: titles of the columns.
        rows: cells.
        numbers: how many columns after the first are set as numbers, aligned to the right.
    """

    def line(kind: str, cells: Sequence[object]) -> Html:
        return tag(
            "tr",
            *(
                tag(kind, cell, class_="number" if 0 < place <= numbers else None)
                for place, cell in enumerate(cells)
            ),
        )

    head = tag("thead", line("th", header))
    body = tag("tbody", *(line("td", row) for row in rows))
    return tag("div", tag("table", head, body), class_="wide", tabindex="0")


def settings(values: Mapping[str, Any]) -> Html:
    """Names and values, nested ones by their full key."""
    flat = _flat(values)
    if not flat:
        return Html("")
    return tag(
        "dl",
        *(Html(tag("dt", name) + tag("dd", _shown(value))) for name, value in flat.items()),
    )


def notes(lines: Iterable[object]) -> Html:
    """A list of remarks; nothing where there are none."""
    items = [tag("li", line) for line in lines]
    return tag("ul", *items) if items else Html("")


def folded(title: str, *content: object) -> Html:
    """Content that opens on a click; nothing where there is none."""
    if not any(content):
        return Html("")
    return tag("details", tag("summary", title), *content)


def digits(value: object) -> str:
    """A number in a few digits; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def embedded_json(name: str, content: object) -> Html:
    """Data that a script of the page reads: nothing in it can end the element it stands in."""
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    return Html(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def write_page(path: Path, title: str, *content: object, script: str = "", style: str = "") -> Path:
    """Write a page; the file appears only when it is whole.

    Args:
        path: of the file.
        title: of the page.
        content: sections.
        script: of our own, run once the page is there.
        style: of this page, after that of all pages.
    """
    text = _PAGE.format(
        title=escape(title),
        style=_STYLE + style,
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        + ("; script-src 'unsafe-inline'" if script else ""),
        content=join(content),
        script=f"<script>{script}</script>" if script else "",
    )
    _durable.write_text(path, text)
    return path


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(item) for item in value) or "none"
    if value is None or value == "":
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{content}
</main>
{script}
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1d2126; --soft: #5c646e; --line: #dcdfe3; --shade: #f2f3f1;
  --accent: #2458a6; --second: #b0492f; --faint: #a9b4c4; --warn: #fff3d6; --warn-ink: #6b4a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --ink: #e4e6e8; --soft: #9aa2ab; --line: #33383e; --shade: #1f2226;
    --accent: #82b1f5; --second: #ee9478; --faint: #56606d; --warn: #3a2f14; --warn-ink: #f3d48b;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; font-weight: 650; margin: 0 0 .35rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; font-weight: 650; margin: 2.75rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; font-weight: 600; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
ul { margin: .5rem 0; padding-left: 1.2rem; max-width: 46rem; overflow-wrap: anywhere; }
.soft, figcaption, dt, footer, summary { color: var(--soft); }
.soft { font-size: .92rem; }
code, pre { font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--shade); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: .75rem 0; }
.warning { background: var(--warn); color: var(--warn-ink); border-radius: 6px;
  padding: .75rem 1rem; margin: 1.25rem 0; max-width: none; }
.badge { display: inline-block; background: var(--warn); color: var(--warn-ink); font-size: .78rem;
  border-radius: 4px; padding: 0 .4rem; margin-left: .35rem; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1.1rem .35rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .85rem; white-space: nowrap; }
td:last-child { max-width: 22rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: .75rem 0;
  font-size: .93rem; }
dt { unicode-bidi: isolate; } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .75rem 0; } summary { cursor: pointer; }
.rows { display: grid; gap: 1.25rem; grid-template-columns: minmax(0, 1fr); }
.row { display: flex; gap: .5rem; overflow-x: auto; padding-bottom: .25rem; }
.cards { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.card { min-width: 0; }
.card .row { margin-bottom: .2rem; }
[hidden] { display: none !important; }
button { font: inherit; padding: .55rem 1.4rem; border-radius: 6px; cursor: pointer;
  border: 1px solid var(--line); background: var(--shade); color: var(--ink); }
button.main { background: var(--accent); border-color: var(--accent); color: var(--paper); }
button:focus-visible, summary:focus-visible { outline: 3px solid var(--faint); }
figure { margin: 0; flex: 0 0 auto; width: var(--side, 9rem); }
.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); }
.card figure { flex: 1 1 0; max-width: 11rem; min-width: 0; width: auto; }
figure img, .absent { display: block; width: 100%; height: auto; border-radius: 3px;
  background: var(--shade); }
.small { image-rendering: pixelated; }
.absent { aspect-ratio: 1; color: var(--soft); font-size: .8rem; padding: .5rem;
  overflow-wrap: anywhere; }
figcaption { font-size: .8rem; line-height: 1.35; margin-top: .2rem; overflow-wrap: anywhere;
  unicode-bidi: isolate; }
.name { font-size: .88rem; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 0 0 .25rem; }
.sheets { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); }
.sheets figure { width: auto; }
.final figure { width: fit-content; max-width: 100%; margin-bottom: 1rem; }
.final img { max-width: 100%; width: auto; }
.charts { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
.chart svg { width: 100%; height: auto; display: block; overflow: visible; }
.chart h3 { margin: 0 0 .25rem; }
.chart text { fill: var(--soft); font-size: 11px; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .82rem; color: var(--soft); }
.key i { display: inline-block; width: 1.1rem; height: 0; border-top: 2.5px solid;
  vertical-align: middle; margin-right: .35rem; }
footer { margin-top: 3rem; padding-top: .75rem; border-top: 1px solid var(--line);
  font-size: .85rem; }
@media (max-width: 40rem) {
  main { padding: 1.25rem .9rem 3rem; } h1 { font-size: 1.4rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin: 0 0 .5rem; }
  figure { width: var(--side, 7rem); }
}
@media print { .wide, .row { overflow: visible; } .row { flex-wrap: wrap; } }
"""
