"""Parts of a source: the first pictures, those to train on and those held out."""

from __future__ import annotations

from palette.data.order import Draws
from palette.data.photos import Photos
from palette.data.sources import Given, Source, open_source


class HeldOut:
    """``count`` pictures of a source, spread evenly over it, for ``samples`` validation samples.

    With more samples than pictures, pictures come again (with other crops).
    """

    def __init__(self, source: Source, count: int, samples: int) -> None:
        self._source, self._count, self._samples = source, count, samples

    def __len__(self) -> int:
        return self._samples

    def load(self, index: int, draws: Draws) -> Given:
        return self._source.load(self._index(index), draws)

    def name(self, index: int) -> str:
        name, again = self._source.name(self._index(index)), index // self._count
        return f"{name}-{again}" if again else name

    def _index(self, index: int) -> int:
        return index % self._count * (len(self._source) // self._count)


class Remainder:
    """The pictures of a source that :class:`HeldOut` with the same ``count`` leaves."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, count

    def __len__(self) -> int:
        return len(self._source) - self._count

    def load(self, index: int, draws: Draws) -> Given:
        return self._source.load(self._index(index), draws)

    def name(self, index: int) -> str:
        return self._source.name(self._index(index))

    def _index(self, index: int) -> int:
        between = len(self._source) // self._count - 1  # pictures after each one held out
        return index + 1 + min(index // between, self._count - 1)


class First:
    """The first ``count`` pictures of a source."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, count

    def __len__(self) -> int:
        return min(self._count, len(self._source))

    def load(self, index: int, draws: Draws) -> Given:
        return self._source.load(index, draws)

    def name(self, index: int) -> str:
        return self._source.name(index)


def hold_out(
    source: Source, samples: int, pictures: int | None = None
) -> tuple[Source, Source | None]:
    """Training and validation sources with no picture in common, always the same ones.

    ``pictures`` are held out, by default a tenth, but no more than ``samples``; fewer pictures
    than samples come several times, with other crops. ``samples`` 0 holds nothing out. Raises
    ValueError when there is only one picture, or more than half are to be held out.
    """
    if samples == 0:
        return source, None
    if len(source) < 2:
        raise ValueError("validation: one picture cannot be held out of one; 0 holds out none")
    count = pictures or min(samples, max(1, len(source) // 10))
    if 2 * count > len(source):
        raise ValueError(
            f"validation: {count} of {len(source)} pictures cannot be held out, at most half"
        )
    return Remainder(source, count), HeldOut(source, count, samples)


def open_split(
    name: str,
    path: str,
    *,
    image_size: tuple[int, int],
    detail: int = 2,
    samples: int = 4096,
    validation: int = 0,
    pictures: int | None = None,
    limit: int | None = None,
    conditions: str = "",
    names: str = "",
    classes: int | None = None,
) -> tuple[Source, Source | None]:
    """Training and validation sources of the kind ``name``, the second with ``validation`` samples.

    ``samples`` is the length of an epoch where the source itself has none (photos). ``detail`` is
    how many times ``image_size`` pictures should at least have on each side. ``limit`` takes the
    first so many pictures only, ``pictures`` of them are held out (see :func:`hold_out`), and
    ``conditions`` and ``names`` are those of ``sources.Pairs``, ``classes`` that of
    ``shards.Shards``. Raises ValueError.
    """
    if name == "photos":
        held = Photos("validation", image_size=image_size, samples=validation or 1)
        return Photos(image_size=image_size, samples=samples), held if validation else None
    source = open_source(
        name,
        path,
        image_size=image_size,
        detail=detail,
        conditions=conditions,
        names=names,
        classes=classes,
    )
    return hold_out(source if limit is None else First(source, limit), validation, pictures)
