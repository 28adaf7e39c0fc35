"""Which file belongs to which, and to which class."""

from __future__ import annotations

from pathlib import Path

import pytest

from palette.metrics import pairing


def _files(*names: str) -> pairing.Files:
    return {name: f"/somewhere/{name}.png" for name in names}


def test_pairs_of_one_name() -> None:
    inputs = pairing.pair(_files("a", "b", "c/d_1"), _files("a", "b", "c/d_1"))
    assert [one.name for one in inputs] == ["a", "b", "c/d_1"]
    assert [[sample.number for sample in one.samples] for one in inputs] == [[0], [1], [2]]


def test_several_samples_are_in_order_of_their_numbers() -> None:
    samples = _files("a_0", "a_1", "a_10", "a_2", "b_3")
    inputs = pairing.pair(samples, _files("a", "b"))
    assert [sample.path[-6:-4] for sample in inputs[0].samples] == ["_0", "_1", "_2", "10"]
    assert [sample.number for sample in inputs[0].samples] == [0, 1, 3, 2]
    assert len(inputs[1].samples) == 1


def test_names_that_end_in_a_number_pair_as_they_are() -> None:
    inputs = pairing.pair(_files("img_0", "img_1"), _files("img_0", "img_1"))
    assert [len(one.samples) for one in inputs] == [1, 1]


@pytest.mark.parametrize(
    ("samples", "truth", "message"),
    [
        (("a", "x"), ("a", "b"), "samples: 1 of 2 images have no partner .* in truth, .* 'x'"),
        (("a_0", "x_0"), ("a", "b"), "samples: 1 of 2 .* in truth, the first is 'x_0'"),
        (("a_0", "a_1"), ("a", "b"), "truth: 1 of 2 .* in samples, the first is 'b'"),
    ],
)
def test_images_without_partner(
    samples: tuple[str, ...], truth: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pairing.pair(_files(*samples), _files(*truth))


def test_classes_by_folder() -> None:
    names = ["data/n2/x", "data/n1/y", "data/n2/z"]
    assert pairing.class_folders(names) == ["n1", "n2"]
    assert pairing.labels_of_folders(names, ["n0", "n1", "n2"]) == {
        "data/n2/x": 2,
        "data/n1/y": 1,
        "data/n2/z": 2,
    }
    deeper = ["cat/young/a", "b", "fox/c"]
    assert pairing.labels_of_folders(deeper, ["cat", "dog"]) == {"cat/young/a": 0}
    with pytest.raises(ValueError, match="'x' is in no class folder"):
        pairing.class_folders(["n1/y", "x"])


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a/b.JPEG", "a/b"),
        ("frame.0001.png", "frame.0001"),
        ("frame.0001", "frame.0001"),
        ("v1.2/x", "v1.2/x"),
        ("a.jpg-12", "a"),
        ("a-12", "a-12"),
    ],
)
def test_only_extensions_of_images_are_no_part_of_a_name(name: str, plain: str) -> None:
    assert pairing.plain_name(name) == plain


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "val.txt"
    path.write_text("ILSVRC2012_val_1.JPEG 65\n\na picture.png  7\na.1 0\na.2 1\n")
    assert pairing.read_labels(path) == {
        "ILSVRC2012_val_1": 65,
        "a picture": 7,
        "a.1": 0,
        "a.2": 1,
    }
    path.write_text("a.png 1\nb.png one\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 2: wanted is"):
        pairing.read_labels(path)
    path.write_text("a.png 1\na.jpg 2\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 2: 'a' has a class already"):
        pairing.read_labels(path)
    with pytest.raises(ValueError, match="No such file"):
        pairing.read_labels(tmp_path / "none.txt")
