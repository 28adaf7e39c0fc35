"""Fingerprints of sources and what is said of the compiled halves."""

from __future__ import annotations

from pathlib import Path

import pytest

from palette import _extension


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("ops.cpp", "shared.h", "cpu/noise.cpp", "cuda/noise.cu", "cuda/notes.txt"):
        file = tmp_path / "csrc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"// {name}\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("edited", "changed"),
    [
        ("ops.cpp", {"cpp", "cuda"}),
        ("shared.h", {"cpp", "cuda"}),
        ("cpu/noise.cpp", {"cpp"}),
        ("cpu/new.h", {"cpp"}),
        ("cuda/noise.cu", {"cuda"}),
        ("cuda/notes.txt", set()),
        ("module.cpp", set()),
    ],
)
def test_fingerprint_follows_the_sources_of_its_half(
    repository: Path, edited: str, changed: set[str]
) -> None:
    before = {half: _extension.fingerprint(repository, half) for half in ("cpp", "cuda")}
    with (repository / "csrc" / edited).open("a", encoding="utf-8") as file:
        file.write("edited\n")
    after = {half: _extension.fingerprint(repository, half) for half in ("cpp", "cuda")}
    assert {half for half in before if before[half] != after[half]} == changed


def test_renaming_a_source_changes_the_fingerprint(repository: Path) -> None:
    before = _extension.fingerprint(repository, "cpp")
    source = repository / "csrc" / "cpu" / "noise.cpp"
    source.rename(source.with_name("other.cpp"))
    assert _extension.fingerprint(repository, "cpp") != before


def test_fingerprint_is_read_from_the_library_without_loading_it(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(b"\x7fELF not a library \0palette-sources:0123456789abcdef\0 more")
    assert _extension.built_from(library) == "0123456789abcdef"
    library.write_bytes(b"built by somebody else")
    assert _extension.built_from(library) == ""


def test_status_names_a_reason_for_each_half_that_is_not_loaded() -> None:
    for half, found in _extension.load().items():
        assert (found.library is None) == bool(_extension.status()[half])
    assert _extension.load() is _extension.load()


def test_build_facts_are_text() -> None:
    facts = _extension.build_facts()
    assert all(isinstance(value, str) for value in facts.values())
    if facts:
        assert facts["torch_target"] == "2.11"
        assert bool(facts["nvcc"]) != bool(facts["cuda_absence"])
    assert all(name == name.lower() for name in _extension.instruction_sets())
