"""Archives of every make are read as Python's own tarfile reads them; hostile ones are refused."""

from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
from pathlib import Path

import pytest

from palette.data.tar import members

LONG = "deep/" * 60 + "é" * 20 + ".jpg"


def _pack(path: Path, *entries: tuple[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in entries:
            facts = tarfile.TarInfo(name)
            facts.size = len(data)
            archive.addfile(facts, io.BytesIO(data))
    return path


def _sealed(header: bytearray) -> bytes:
    """A header with its sum put right."""
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_lie_where_tarfile_finds_them(tmp_path: Path, kind: int) -> None:
    entries = [("a.jpg", b"x" * 700), (LONG, b"y" * 512), ("empty.cls", b""), ("p" * 150, b"z")]
    path = _pack(tmp_path / "a.tar", *entries, kind=kind)
    content = path.read_bytes()
    found = [(each.name, content[each.offset : each.offset + each.size]) for each in members(path)]
    assert found == entries
    with tarfile.open(path) as archive:
        assert [each.offset for each in members(path)] == [i.offset_data for i in archive]


def test_ustar_prefixes_folders_and_dots(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        folder = tarfile.TarInfo("./folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in ("./folder/a.jpg", "d" * 120 + "/" + "b" * 90):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert [each.name for each in members(path)] == ["folder/a.jpg", "d" * 120 + "/" + "b" * 90]
    assert not any(each.refused for each in members(path))


def test_large_sizes_in_binary(tmp_path: Path) -> None:
    path = _pack(tmp_path / "a.tar", ("a.jpg", b"x" * 600))
    content = bytearray(path.read_bytes())
    content[124:136] = b"\x80" + (600).to_bytes(11, "big")
    path.write_bytes(_sealed(content[:512]) + content[512:])
    assert next(members(path)).size == 600


def test_sums_of_signed_bytes(tmp_path: Path) -> None:
    path = _pack(tmp_path / "a.tar", ("é.jpg", b"x"), kind=tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[148:156] = b" " * 8
    signed = sum(byte - 256 * (byte > 127) for byte in content[:512])
    content[148:156] = f"{signed:06o}\0 ".encode()
    path.write_bytes(content)
    assert [each.name for each in members(path)] == ["é.jpg"]


def test_links_devices_and_names_that_lead_out_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            facts = tarfile.TarInfo("odd.jpg")
            facts.type, facts.linkname = kind, "/etc/passwd"
            archive.addfile(facts)
        for name in ("../out.jpg", "/root.jpg", "a/../../b.jpg"):
            archive.addfile(tarfile.TarInfo(name))
        archive.addfile(tarfile.TarInfo("good..jpg"))
    reasons = [each.refused for each in members(path)]
    assert reasons[:4] == ["a link"] * 2 + ["a device or of another special kind"] * 2
    assert reasons[4:] == ["its name leads out of the archive"] * 3 + [""]


def test_sizes_that_lie(tmp_path: Path) -> None:
    path = _pack(tmp_path / "a.tar", ("a.jpg", b"x" * 600))
    content = bytearray(path.read_bytes())
    for field, message in (
        (b"77777777777\0", r"a\.tar: cut off or damaged: 'a\.jpg' would take 8589934591 bytes"),
        (b"\xff" * 12, r"'a\.jpg' has no size that makes sense"),
        (b"99999999999\0", r"'a\.jpg' has no size that makes sense"),
    ):
        content[124:136] = field
        path.write_bytes(_sealed(content[:512]) + content[512:])
        with pytest.raises(ValueError, match=message):
            list(members(path))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"0 path=a\n", "an extended header that cannot be read"),
        (b"1 path=a\n", "an extended header that cannot be read"),
        (b"999 path=a\n", "an extended header that cannot be read"),
        (b"nonsense", "an extended header that cannot be read"),
        (b"12 size=-99\n", "a size of '-99'"),
        (b"15 size=999999\n", "would take 999999 bytes"),
        (b"22 GNU.sparse.major=1\n", "sparse"),
    ],
)
def test_damaged_extended_headers(tmp_path: Path, record: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    facts = tarfile.TarInfo("a.jpg")
    facts.size = len(record)
    header = bytearray(facts.tobuf())
    header[156:157] = b"x"
    plain = tarfile.TarInfo("a.jpg").tobuf()
    path.write_bytes(_sealed(header) + record.ljust(512, b"\0") + plain)
    with pytest.raises(ValueError, match=message):
        list(members(path))


def test_cut_off_at_every_block(tmp_path: Path) -> None:
    """Cut within a file or a header it is refused; between two it has fewer members."""
    path = _pack(tmp_path / "a.tar", ("a.jpg", b"x" * 600), ("b.jpg", b"y" * 600))
    content = path.read_bytes()
    short = tmp_path / "short.tar"
    for length in (1, 511, 512, 1000, 1111, 1600, 2048, 2100):
        short.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"short\.tar: (cut off|no tar archive)"):
            list(members(short))
    short.write_bytes(content[:1536])
    assert [each.name for each in members(short)] == ["a.jpg"]


def test_flipped_bytes_never_do_harm(tmp_path: Path) -> None:
    path = _pack(tmp_path / "a.tar", (LONG, b"x" * 600), ("b.jpg", b"y" * 60))
    content = path.read_bytes()
    size = len(content)
    for place in range(0, 2600, 7):
        broken = bytearray(content)
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        with contextlib.suppress(ValueError):
            assert all(each.offset + each.size <= size for each in members(path))


def test_what_is_no_archive(tmp_path: Path) -> None:
    path = _pack(tmp_path / "a.tar", ("a.jpg", b"x"))
    (tmp_path / "a.tgz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.tgz: compressed \(gzip\); only plain tar"):
        list(members(tmp_path / "a.tgz"))
    (tmp_path / "b.tar").write_bytes(b"GIF89a" * 200)
    with pytest.raises(
        ValueError, match=r"b\.tar: no tar archive, or damaged: no header at byte 0"
    ):
        list(members(tmp_path / "b.tar"))
    with pytest.raises(ValueError, match=r"c\.tar: No such file"):
        list(members(tmp_path / "c.tar"))
