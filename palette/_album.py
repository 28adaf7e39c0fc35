"""Pictures inside a page, as data URIs, all of them together within a bound."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image as PILImage

from palette._html import Html, escape, tag
from palette.data import images

_SMALL = 96  # pixels; a side below is shown magnified, pixel by pixel
_LEAST = 16  # pixels; nothing is shrunk below this


class Embedded(NamedTuple):
    """A picture as it stands in the page."""

    uri: str
    width: int
    height: int


class Album:
    """Embeds pictures, each within its share of the budget.

    A picture stays as it is, as PNG, where it is small enough for its share and at most ``side``
    pixels; otherwise it is shrunk to ``side``, then written as JPEG, then shrunk further.

    Args:
        count: how many pictures the page will show.
        budget: bytes of all of them, as they stand in the page.
        side: longest side of a picture in the page, in pixels.
    """

    def __init__(self, count: int, *, budget: int = 16 * 2**20, side: int = 256) -> None:
        self.share = budget // max(count, 1)
        self.budget, self.side = budget, side
        self.shown = self.changed = self.bytes = 0

    def figure(self, path: Path, caption: str, *, alt: str = "") -> Html:
        """One picture with a caption; a remark in its place where it is missing or unreadable."""
        text = tag("figcaption", caption) if caption else Html("")
        try:
            found = self.embed(path)
        except images.UnreadableImage:
            problem = "not readable" if path.exists() else "missing"
            return tag("figure", tag("div", f"{path.name}: {problem}", class_="absent"), text)
        return tag("figure", _image(found, alt or caption), text)

    def embed(self, path: Path) -> Embedded:
        """A picture as data URI of at most this album's share. Raises UnreadableImage."""
        picture = images.read(path)
        whole = _shrunk(picture, self.side)
        data, kind = _encoded(whole, "PNG"), "png"
        side = max(whole.size)
        while len(data) > self._room() and (kind == "png" or side > _LEAST):
            if kind == "jpeg":
                side = max(side * 3 // 4, _LEAST)
                whole = _shrunk(picture, side)
            kind, data = "jpeg", _encoded(whole, "JPEG")
        return self._noted(data, kind, whole.size, kind == "jpeg" or whole.size != picture.size)

    def pair(self, first: Path, second: Path) -> tuple[Embedded, Embedded]:
        """Two pictures of one size, treated alike: nothing but what they show tells them apart.

        Both are PNG at the same size, within the share of two.

        Raises:
            UnreadableImage: one cannot be read.
            ValueError: they have different sizes.
        """
        both = [images.read(path).convert("RGB") for path in (first, second)]
        if both[0].size != both[1].size:
            sizes = " and ".join("x".join(map(str, picture.size)) for picture in both)
            raise ValueError(f"{first} and {second}: wanted are two of one size, found {sizes}")
        side = min(self.side, max(both[0].size))
        data = [_encoded(_shrunk(picture, side), "PNG") for picture in both]
        while sum(map(len, data)) > 2 * self._room() and side > _LEAST:
            side = max(side * 3 // 4, _LEAST)
            data = [_encoded(_shrunk(picture, side), "PNG") for picture in both]
        size = _shrunk(both[0], side).size
        left, right = (self._noted(one, "png", size, size != both[0].size) for one in data)
        return left, right

    def remark(self) -> str:
        """What a reader must know about the pictures of the page."""
        size = f"{self.bytes / 2**20:.1f} MiB of pictures (at most {self.budget // 2**20})"
        if not self.changed:
            return f"{size}, all of them pixel by pixel as in their files."
        return (
            f"{size}; {self.changed} of {self.shown} are shown at a side of at most {self.side} "
            "pixels or as JPEG to keep the page small: look at the files for every pixel."
        )

    def _noted(self, data: bytes, kind: str, size: tuple[int, int], changed: bool) -> Embedded:
        uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        self.shown += 1
        self.changed += changed
        self.bytes += len(uri)
        return Embedded(uri, *size)

    def _room(self) -> int:
        return self.share * 3 // 4 - 64  # base64 makes four bytes of three


def _image(found: Embedded, alt: str) -> Html:
    small = ' class="small"' if max(found.width, found.height) < _SMALL else ""
    return Html(
        f'<img src="{found.uri}" width="{found.width}" height="{found.height}" '
        f'alt="{escape(alt)}"{small}>'
    )


def _shrunk(picture: PILImage.Image, side: int) -> PILImage.Image:
    if max(picture.size) <= side:
        return picture
    factor = side / max(picture.size)
    width, height = (max(1, round(length * factor)) for length in picture.size)
    return picture.resize((width, height), PILImage.Resampling.LANCZOS)


def _encoded(picture: PILImage.Image, kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "PNG":
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=90, subsampling=0)
    return file.getvalue()
