from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from palette import _html as page


def test_text_is_escaped_and_markup_is_not() -> None:
    assert page.escape("<a & \"b\" 'c'>") == "&lt;a &amp; &quot;b&quot; &#x27;c&#x27;&gt;"
    inner = page.tag("b", "1 < 2")
    assert page.tag("p", inner, " & more") == "<p><b>1 &lt; 2</b> &amp; more</p>"
    assert page.escape("a\udcff\u202e\x00\nb") == "a\\udcff  \nb"


def test_attributes() -> None:
    text = page.tag("p", class_='x" onload="y', aria_label="z", hidden=True, id=None, lang=False)
    assert text == '<p class="x&quot; onload=&quot;y" aria-label="z" hidden></p>'


def test_data_cannot_leave_its_element() -> None:
    content = {"name": "</script><script>alert(1)</script><!--"}
    text = page.embedded_json("data", content)
    assert text.count("<") == 2
    inside = re.fullmatch(r"<script [^>]*>(.*)</script>", text)
    assert inside is not None
    assert json.loads(inside[1]) == content


def test_settings_are_flat_and_readable() -> None:
    text = page.settings({"a": {"b": [1, None], "c": True}, "d": "", "e": []})
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text)
    assert found == [("a.b", "1, none"), ("a.c", "true"), ("d", "none"), ("e", "none")]
    assert page.settings({}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (12, "12"), (1e-9, "1e-09"), (True, "True"), ("x", "x"), (None, "None")],
)
def test_digits(value: object, text: str) -> None:
    assert page.digits(value) == text


def test_empty_parts_leave_no_heading() -> None:
    assert page.section("title", "", page.notes([])) == ""
    assert page.folded("title", "") == ""


def test_a_page_forbids_requests_and_appears_whole(tmp_path: Path) -> None:
    path = page.write_page(tmp_path / "x.html", "<title>", page.tag("p", "hello {there}"))
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in text
    assert "script-src" not in text
    assert "<title>&lt;title&gt;</title>" in text
    assert "hello {there}" in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.html"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        page.write_page(tmp_path / "taken", "y")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["taken", "x.html"]
