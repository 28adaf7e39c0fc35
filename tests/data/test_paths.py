"""Folders and lists of paths, whatever the names are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from palette.data.paths import Paths, read_list, scan

NAMES = ["with space.jpg", "new\nline.png", "größe 図.webp", "'quote\".gif", "UPPER.JPEG", "-x.png"]


def _touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def _all(paths: Paths) -> list[str]:
    return [paths[index] for index in range(len(paths))]


def test_a_folder_is_searched_at_any_depth_in_order_of_names(tmp_path: Path) -> None:
    names = ["b.jpg", "a/2.png", "a/10.png", "a/deep/er/x.tif", "c/z.bmp", "a.jpg", *NAMES]
    for name in names:
        _touch(tmp_path / name)
    for name in ("notes.txt", "a/readme", ".hidden.jpg", "._a.jpg", ".git/x.jpg", "x.jpg.part"):
        _touch(tmp_path / name)
    found = _all(scan(tmp_path))
    assert sorted(found) == sorted(names)
    assert [name for name in found if name.startswith("a/")] == [
        "a/10.png",
        "a/2.png",
        "a/deep/er/x.tif",
    ]
    assert found == _all(scan(str(tmp_path)))
    assert all(os.path.exists(scan(tmp_path).path(index)) for index in range(len(found)))


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    _touch(tmp_path / "album.jpg" / "x.jpg")
    assert _all(scan(tmp_path)) == ["album.jpg/x.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    _touch(tmp_path / "images" / "sub" / "x.jpg")
    (tmp_path / "images" / "sub" / "up").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "images" / "gone.jpg").symlink_to("nowhere")
    _touch(tmp_path / "elsewhere" / "y.jpg")
    (tmp_path / "images" / "other").symlink_to(tmp_path / "elsewhere")
    assert sorted(_all(scan(tmp_path / "images"))) == [
        "gone.jpg",
        "other/y.jpg",
        "self.jpg",
        "sub/x.jpg",
    ]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    with open(raw, "wb"):
        pass
    paths = scan(tmp_path)
    assert os.fsencode(paths.path(0)) == raw
    assert paths.name(0).isprintable()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such folder"),
        ("file.jpg", "is a file"),
        ("empty", "no image in this folder"),
    ],
)
def test_a_useless_folder_gets_one_clear_line(tmp_path: Path, name: str, reason: str) -> None:
    _touch(tmp_path / "file.jpg")
    (tmp_path / "empty" / "still empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{name}: {reason}") as caught:
        scan(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_a_list_of_lines(tmp_path: Path, end: str, last: bool) -> None:
    names = ["a b.jpg", "sub/größe.png", "/absolute/x.jpg", "../beside.jpg", "x", " lead.jpg"]
    text = end.join(names) + (end if last else "")
    (tmp_path / "list.txt").write_bytes(text.encode())
    paths = read_list(tmp_path / "list.txt")
    assert _all(paths) == names
    assert paths.path(0) == str(tmp_path / "a b.jpg")
    assert paths.path(2) == "/absolute/x.jpg"


def test_empty_lines_and_a_byte_order_mark_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg\n\n\r\nb.jpg\n\n")
    assert _all(read_list(tmp_path / "list.txt")) == ["a.jpg", "b.jpg"]


def test_a_list_separated_by_nul_takes_every_name(tmp_path: Path) -> None:
    names = [*NAMES, "ends in return\r", "two\r\nlines.jpg"]
    for text in ("\0".join(names), "\0".join(names) + "\0", "\0\0".join(names)):
        (tmp_path / "list").write_bytes(text.encode())
        assert _all(read_list(tmp_path / "list")) == names


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\r\n", b"\0\0"])
def test_an_empty_list_gets_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"list\.txt: the list is empty"):
        read_list(tmp_path / "list.txt")


def test_a_missing_list_gets_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt: No such file"):
        read_list(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="Is a directory"):
        read_list(tmp_path)


@pytest.mark.parametrize(
    "path", ["/etc/x.jpg", "../../x.jpg", "a/../../x.jpg", "a\nb/x.jpg", NAMES[1]]
)
def test_names_stay_inside_and_on_one_line(path: str) -> None:
    name = Paths.of("/root", [path]).name(0)
    assert not os.path.isabs(name)
    assert ".." not in name.split("/")
    assert name.isprintable()


def test_numbers_outside_are_refused() -> None:
    paths = Paths.of("", ["a", "b"])
    for index in (-1, 2):
        with pytest.raises(IndexError, match=r"index must lie in 0\.\.1"):
            paths[index]


def test_a_long_list_takes_little_memory(tmp_path: Path) -> None:
    lines = [f"train/n{number % 1000:08d}/image_{number:010d}.jpeg" for number in range(100_000)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    paths = read_list(tmp_path / "list.txt")
    assert len(paths) == 100_000
    assert paths.nbytes / len(paths) <= len(lines[0]) + 10
    for number in np.random.default_rng(0).integers(0, 100_000, 20):
        assert paths[int(number)] == lines[number]
