"""Where the files in a tar archive lie, without taking anything out of it.

Read are the plain archives of POSIX (ustar, pax) and of GNU tar, as IEEE Std 1003.1-2017 ("pax")
and the GNU tar manual describe them. Headers are checked before a number in them is believed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from palette.data.paths import printable

_BLOCK = 512
_MAX_NAME_BYTES = 1 << 20  # of a header that holds nothing but a long name
_FILES, _FOLDER, _NO_CONTENTS = b"0\x007", b"5", b"12346"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class Member(NamedTuple):
    """An entry of an archive: its contents are ``size`` bytes at ``offset``.

    ``refused`` says why it cannot be used, or is empty.
    """

    name: str
    offset: int
    size: int
    refused: str = ""


def members(path: str | os.PathLike[str]) -> Iterator[Member]:
    """The files of an archive in their order; folders are left out.

    Links, devices and names that lead out of the archive come with a reason to refuse them.
    Raises ValueError, one line, when the archive is none, compressed, damaged or cut off.
    """
    where = printable(path)
    try:
        with open(path, "rb", buffering=0) as file:
            yield from _walk(file.fileno(), os.fstat(file.fileno()).st_size, where)
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}; a tar archive is wanted") from None


def _walk(file: int, end: int, where: str) -> Iterator[Member]:
    """Entries of an open archive of ``end`` bytes."""
    place = 0
    name, size = b"", -1  # what an extra header says of the entry after it
    while place < end:
        header = os.pread(file, _BLOCK, place)
        if not header.strip(b"\0"):
            return
        _check(header, place, where)
        kind, start = header[156:157], place + _BLOCK
        own = _number(header[124:136])
        length = 0 if kind in _NO_CONTENTS or kind == _FOLDER else own if size < 0 else size
        shown = _text(name or _name(header))
        if length < 0:
            raise ValueError(f"{where}: '{printable(shown)}' has no size that makes sense")
        if start + length > end:
            raise ValueError(
                f"{where}: cut off or damaged: '{printable(shown)}' would take {length} bytes at "
                f"{start}, the file ends at {end}"
            )
        place = start + -(-length // _BLOCK) * _BLOCK
        if kind in b"LKxg":
            if length > _MAX_NAME_BYTES:
                raise ValueError(f"{where}: a name of {length} bytes at byte {start}")
            extra = os.pread(file, length, start)
            if kind == b"L":
                name = extra.rstrip(b"\0")
            elif kind == b"x":
                name, size = _extended(extra, name, where)
            continue
        if kind == b"S":
            raise ValueError(f"{where}: '{printable(shown)}' is sparse; pack it without --sparse")
        if kind != _FOLDER and not shown.endswith("/"):
            yield Member(shown, start, length, _refusal(kind, shown))
        name, size = b"", -1


def _check(header: bytes, place: int, where: str) -> None:
    """A header must be whole and have its own sum."""
    if len(header) == _BLOCK:
        found = _number(header[148:156])
        blank = header[:148] + b" " * 8 + header[156:]
        if found == sum(blank) or found == sum(blank) - 256 * sum(byte > 127 for byte in blank):
            return  # the second is the sum of signed bytes, which some old packers wrote
    packer = _COMPRESSED.get(header[:2]) if place == 0 else None
    if packer:
        raise ValueError(f"{where}: compressed ({packer}); only plain tar can be read in any order")
    raise ValueError(f"{where}: no tar archive, or damaged: no header at byte {place}")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary form; -1 where it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits.isdigit() else -1
    except ValueError:  # 8 or 9
        return -1


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _extended(block: bytes, name: bytes, where: str) -> tuple[bytes, int]:
    """Name and size (-1: none) of a pax header: records "length key=value\\n"."""
    size = -1
    while block:
        digits, _, _ = block.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = block[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or not len(digits) < length <= len(block):
            raise ValueError(f"{where}: damaged: an extended header that cannot be read")
        if key.startswith(b"GNU.sparse"):
            raise ValueError(f"{where}: has a sparse file; pack it without --sparse")
        if key == b"path":
            name = value
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise ValueError(f"{where}: damaged: a size of '{printable(_text(value[:40]))}'")
            size = int(value)
        block = block[length:]
    return name, size


def _text(name: bytes) -> str:
    """The name with what a shell may have put before it ("./") taken away."""
    text = os.fsdecode(name)
    while text.startswith("./"):
        text = text[2:].lstrip("/")
    return text


def _refusal(kind: bytes, name: str) -> str:
    if kind in b"12":
        return "a link"
    if kind not in _FILES:
        return "a device or of another special kind"
    if "\0" in name or name.startswith("/") or ".." in name.split("/"):
        return "its name leads out of the archive"
    return ""
