"""Pictures that are there already, and one clear line for everything that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from palette.cli import main


def folder(path: Path, names: list[str], seed: int = 0, side: int = 16) -> Path:
    """A folder of noise."""
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for name in names:
        pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / name)
    return path


@pytest.fixture
def both(tmp_path) -> list[str]:
    """Arguments for two folders of three pictures."""
    names = ["a.png", "b.png", "c.png"]
    samples, truth = folder(tmp_path / "s", names, 1), folder(tmp_path / "t", names, 2)
    return ["evaluate", "--samples", str(samples), "--truth", str(truth)]


def test_two_folders_are_scored_and_laid_out_as_an_evaluation(both, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(both) == 0
    table = capsys.readouterr().out
    assert "PSNR" in table
    assert "NOT Inception" in table
    assert main([*both, "--output", str(output)]) == 0
    assert json.loads((output / "names.json").read_text()) == {
        "00000": "a",
        "00001": "b",
        "00002": "c",
    }
    found = json.loads((output / "scores.json").read_text())
    shown = next(line for line in table.splitlines() if line.startswith("PSNR, mean"))
    assert f"{found['scores']['psnr']['value']:.6g}" in shown
    with (
        Image.open(output / "samples" / "00001_0.png") as copy,
        Image.open(tmp_path / "s" / "b.png") as sample,
    ):
        assert (np.asarray(copy) == np.asarray(sample)).all()
    assert main([*both, "--output", str(output)]) == 0  # again is as good as once
    folder(tmp_path / "t", ["d.png"])
    folder(tmp_path / "s", ["d.png"])
    assert main([*both, "--output", str(output)]) == 2
    assert "another evaluation" in capsys.readouterr().err


def test_several_samples_masks_and_sets(tmp_path, capsys):
    samples = folder(tmp_path / "s", ["a_0.png", "a_1.png"], 1)
    truth, other = folder(tmp_path / "t", ["a.png"], 2), folder(tmp_path / "o", ["x.png", "y.png"])
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    arguments = ["evaluate", "--samples", str(samples), "--truth", str(truth)]
    masked = [*arguments, "--masks", str(tmp_path / "mask.png"), "--output", str(tmp_path / "out")]
    assert main(masked) == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["scores"]["mae_hole"]["images"] == 2
    assert list(found["per_image"]["diversity_ms_ssim"]) == ["00000"]
    sets = ["evaluate", "--samples", str(samples), "--truth", str(other), "--unpaired"]
    assert main(sets) == 0
    assert "no truth was given to compare with" in capsys.readouterr().out
    reference = [*arguments, "--reference", str(other), "--cache", str(tmp_path / "cache")]
    assert main(reference) == 0
    assert main([*sets, "--dry-run"]) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert "2 pictures against 2" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_network_takes_the_place_of_the_built_in_one(both, tmp_path, capsys):
    class Network(torch.nn.Module):
        def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return pictures.float().mean((2, 3))

    torch.jit.save(torch.jit.script(Network()), tmp_path / "inception.pt")
    assert main([*both, "--inception", str(tmp_path / "inception.pt")]) == 0
    table = capsys.readouterr().out
    assert "inception.pt (TorchScript" in table
    assert "FID (random" not in table


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_classes_by_file_and_by_folder(tmp_path, capsys):
    class Classifier(torch.nn.Module):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]]).expand(len(pictures), 2)

    torch.jit.save(torch.jit.script(Classifier()), tmp_path / "classes.pt")
    for side in ("s", "t"):
        for name in ("cat", "dog"):
            folder(tmp_path / side / name, [f"{name}1.png"])
    (tmp_path / "labels.txt").write_text("cat1.png 0\ndog1.png 1\n")
    arguments = ["evaluate", "--samples", str(tmp_path / "s"), "--truth", str(tmp_path / "t")]
    arguments += ["--classifier", str(tmp_path / "classes.pt"), "--labels"]
    for labels in (str(tmp_path / "labels.txt"), "folders"):
        assert main([*arguments, labels]) == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("CA, top"))
        assert line.split()[4] == "50"
    for side in ("s", "t"):  # numbers of frames are no extensions
        folder(tmp_path / "frames" / side, ["a.1.png", "a.2.png"])
    frames = [str(tmp_path / "frames" / side) for side in ("s", "t")]
    for text in ("a.1.png 0\na.2.png 1\n", "a.1 0\na.2 1\n"):
        (tmp_path / "labels.txt").write_text(text)
        more = [*arguments[5:], str(tmp_path / "labels.txt")]
        assert main(["evaluate", "--samples", frames[0], "--truth", frames[1], *more]) == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("CA, top"))
        assert line.split()[4] == "50"
    (tmp_path / "labels.txt").write_text("cat1.png 0\n")
    assert main([*arguments, str(tmp_path / "labels.txt")]) == 2
    assert "no class of 1 inputs, the first is 'dog/dog1'" in capsys.readouterr().err


def _more(*arguments: str):
    return lambda both, path: [*both, *(text.replace("PATH", str(path)) for text in arguments)]


def _instead(*arguments: str):
    return lambda both, path: [text.replace("PATH", str(path)) for text in arguments]


def _prepared(prepare, *arguments: str):
    def make(both, path):
        prepare(path)
        return _more(*arguments)(both, path)

    return make


MISTAKES = {
    "nothing": (_instead("evaluate"), "wanted is a checkpoint"),
    "one folder": (_instead("evaluate", "--samples", "PATH/s"), "--samples and --truth"),
    "missing folder": (
        _instead("evaluate", "--samples", "PATH/no", "--truth", "PATH/t"),
        "no such folder",
    ),
    "zero images": (
        _prepared(lambda path: [file.unlink() for file in (path / "s").iterdir()]),
        "no image in this folder",
    ),
    "mismatched folders": (
        _prepared(lambda path: (path / "s" / "b.png").unlink()),
        "1 of 3 images have no partner of the same name in samples, the first is 'b'",
    ),
    "another size": (
        _prepared(lambda path: folder(path / "s", ["b.png"], side=20)),
        "b.png is 20x20, its truth",
    ),
    "missing extractor": (_more("--inception", "PATH/no.pt"), "no.pt: No such file"),
    "wrong extractor": (
        _prepared(lambda path: (path / "x.pt").write_bytes(b"no"), "--inception", "PATH/x.pt"),
        "x.pt: not a TorchScript file",
    ),
    "unknown network": (_more("--network", "vgg"), "--network vgg: wanted is random"),
    "two networks": (_more("--inception", "a", "--network", "b"), "one of them is wanted"),
    "unknown LPIPS": (_more("--lpips", "resnet"), "--lpips resnet: wanted is random"),
    "unknown classifier": (
        _more("--classifier", "x", "--labels", "y"),
        "--classifier x: wanted is",
    ),
    "half of CA": (_more("--labels", "folders"), "--classifier and --labels: both are wanted"),
    "missing weights": (_more("--lpips", "alex=PATH/no.pth"), "no.pth: No such file"),
    "missing masks": (_more("--masks", "PATH/no.png"), "no.png: No such file"),
    "config of folders": (_more("-c", "x.yaml"), "config: does not go with --samples"),
    **{
        f"{name} of folders": (_more(f"--{name}", value), f"{name}: does not go with --samples")
        for name, value in (
            ("limit", "5"),
            ("samples-per-input", "1"),
            ("weights", "ema"),
            ("seed", "0"),
            ("steps", "5"),
            ("solver", "ddim"),
            ("precision", "auto"),
        )
    },
    "sets on a page": (_more("--unpaired", "--output", "PATH/o"), "--output: shows samples"),
    "trial without a folder": (_more("--human"), "--human: needs --output DIR"),
    "someone's folder": (
        _prepared(lambda path: folder(path / "o" / "samples", ["a.png"]), "--output", "PATH/o"),
        "holds something else",
    ),
    "no such preset": (_instead("evaluate", "x", "--preset", "no"), "--preset no: unknown"),
    "no such model": (_instead("evaluate", "PATH/no"), "no such checkpoint"),
    "size of a model": (_instead("evaluate", "x", "--size", "8"), "--size: goes with --samples"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, both, tmp_path, capsys):
    make, words = MISTAKES[name]
    assert main(make(both, tmp_path)) in (1, 2)
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("palette: ")
    assert message.count("\n") == 1
