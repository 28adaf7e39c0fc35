"""The built-in network is the same everywhere; TorchScript files are read with care."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from palette.metrics import networks, torchscript
from palette.metrics.networks import Identity, unit_distance
from palette.metrics.random_network import RandomDistance, RandomNetwork
from palette.metrics.scorer import Networks

DIGEST = "04ea12421b94f5b0150d8ff18d389be1e121fc6ab1c7a67d1ea8d987c28138ff"
VALUES = [0.21918201446533203, 0.7728918194770813, 0.48757562041282654, 0.24700208008289337]


def _pictures(count: int = 3, height: int = 48, width: int = 40) -> Tensor:
    numbers = torch.arange(count * 3 * height * width)
    return (numbers * 7919 % 65521 % 256).reshape(count, 3, height, width).to(torch.uint8)


def test_the_random_network_is_the_same_everywhere() -> None:
    network = RandomNetwork()
    assert network.identity.digest == DIGEST
    values = network(_pictures(1)).values[0]
    assert values.dtype == torch.float32
    assert values[[0, 40, 100, 479]].tolist() == pytest.approx(VALUES, rel=1e-6)


def test_features_do_not_depend_on_batch_or_threads() -> None:
    network, pictures = RandomNetwork(), _pictures(5)
    together = network(pictures).values
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        alone = torch.cat([network(pictures[i : i + 1]).values for i in range(5)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)
    assert together.shape == (5, network.dim)
    assert network(pictures, classify=True).probabilities is None


def test_random_scores_can_never_be_mistaken() -> None:
    identity = RandomNetwork().identity
    assert identity.stand_in
    assert "NOT Inception" in str(identity)
    assert identity.key("fid") == "fid_random"
    assert Identity("inception.pt", "ab" * 32).key("fid") == "fid"


def test_distance_is_unweighted_lpips() -> None:
    network, first = RandomNetwork(), _pictures(2, 128, 128)
    second = (first // 2 + 60).to(torch.uint8)
    expected = torch.zeros(2, dtype=torch.float64)
    for a, b in zip(network._layers(first), network._layers(second), strict=True):
        a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        expected += (a - b).square().sum(1).mean((1, 2))
    assert RandomDistance()(first, second).tolist() == pytest.approx(expected.tolist(), rel=1e-10)
    assert RandomDistance()(first, first).tolist() == [0, 0]
    same = [torch.ones(2, 4, 3, 3)]
    assert unit_distance(same, [5 * same[0]]).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_distance_and_features_grow_with_damage() -> None:
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    clean = torch.stack([2 * x + y, 3 * y, 255 - 2 * x]).clamp(0, 255).to(torch.uint8)[None]
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = RandomNetwork()
    features, distances = [], []
    for level in (0, 3, 10, 30):
        damaged = (clean + level * noise).round().clamp(0, 255).to(torch.uint8)
        features.append(float((network(damaged).values - network(clean).values).norm()))
        distances.append(float(network.distance(damaged, clean)))
    assert features == sorted(features)
    assert distances == sorted(distances)
    assert features[0] == distances[0] == 0


def test_exact_switches_tf32_off_and_back() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    with contextlib.suppress(ZeroDivisionError), networks.exact():
        assert not cudnn.allow_tf32
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert cudnn.allow_tf32 == before
    assert torch.is_grad_enabled()


class Inception(nn.Module):
    """A small network with the interface of the StyleGAN papers' file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Conv2d(3, 6, 3, stride=2)
        self.output = nn.Linear(6, 5)

    def forward(
        self,
        img: Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> Tensor:
        features = self.layers(img.float() / 255).relu().mean([2, 3])
        if return_features:
            return features
        logits = features @ self.output.weight.t()
        if not no_output_bias:
            logits = logits + self.output.bias
        return logits.softmax(1)


class OtherHead(Inception):
    """Its last layer does not explain its probabilities."""

    def forward(
        self,
        img: Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> Tensor:
        features = self.layers(img.float() / 255).relu().mean([2, 3])
        if return_features:
            return features
        return (3 * features @ self.output.weight.t()).softmax(1)


class Vgg(nn.Module):
    """A small network with the interface of their vgg16.pt."""

    def forward(
        self,
        img: Tensor,
        resize_images: bool = True,
        return_features: bool = False,
        return_lpips: bool = False,
    ) -> Tensor:
        assert not resize_images
        return img.float().mean([2, 3]) / 255


class Pair(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().mean([1, 2, 3], keepdim=True)


class Logits(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean([2, 3])


class Failing(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        if img.shape[2] != 0:
            raise ValueError("out of order")
        return img


class Images(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.float()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[nn.Module], Path]:
    """Compile a network and save it."""

    def save(module: nn.Module) -> Path:
        path = tmp_path / f"{type(module).__name__}.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.save(torch.jit.script(module), path)
        return path

    return save


@pytest.mark.parametrize("kind", [Inception, OtherHead])
def test_inception_file(saved: Callable[[nn.Module], Path], kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind()
    network = torchscript.TorchScriptFeatures(saved(module))
    found = network(_pictures(), classify=True)
    assert (network.dim, network.classes) == (6, 5)
    assert torch.allclose(found.values, module(_pictures(), return_features=True), rtol=1e-5)
    expected = module(_pictures(), no_output_bias=True)
    assert found.probabilities is not None
    assert torch.allclose(found.probabilities.float(), expected, rtol=1e-4)
    assert (network._head is None) == (kind is OtherHead)
    assert network(_pictures()).probabilities is None
    assert network.identity.name.startswith(f"{kind.__name__}.pt (TorchScript")
    assert not network.identity.stand_in


def test_file_with_features_only(saved: Callable[[nn.Module], Path]) -> None:
    class_free = torchscript.TorchScriptFeatures(saved(Vgg2()))
    assert class_free.classes is None
    assert class_free(_pictures(), classify=True).probabilities is None


class Vgg2(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.float().mean([2, 3])


def test_lpips_files(saved: Callable[[nn.Module], Path]) -> None:
    first, second = _pictures(2), _pictures(2).flip(3)
    embedding = torchscript.TorchScriptLpips(saved(Vgg()))
    means = [side.float().mean((2, 3)) / 255 for side in (first, second)]
    expected = (means[0] - means[1]).square().sum(1).tolist()
    assert embedding(first, second).tolist() == pytest.approx(expected, abs=1e-6)
    pair = torchscript.TorchScriptLpips(saved(Pair()))
    difference = (first.float() - second.float()).abs().mean((1, 2, 3)) / 127.5
    assert pair(first, second).tolist() == pytest.approx(difference.tolist(), rel=1e-5)


def test_classifier_file(saved: Callable[[nn.Module], Path]) -> None:
    network = torchscript.TorchScriptClassifier(saved(Logits()))
    grey = torch.full((2, 3, 90, 120), 128, dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((128 / 255 - mean) / std).softmax(0)
    assert network.classes == 3
    assert torch.allclose(network(grey)[1].float(), expected, rtol=1e-5)
    for size in ((224, 224), (300, 40), (41, 500)):
        view = torchscript.imagenet_view(torch.zeros(1, 3, *size, dtype=torch.uint8))
        assert view.shape == (1, 3, 224, 224)


def test_files_that_are_something_else(tmp_path: Path, saved: Callable[[nn.Module], Path]) -> None:
    (tmp_path / "text.pt").write_bytes(b"no network at all")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    kinds = (
        torchscript.TorchScriptFeatures,
        torchscript.TorchScriptClassifier,
        torchscript.TorchScriptLpips,
    )
    cases = [
        (tmp_path / "missing.pt", "No such file or directory; a TorchScript file is wanted"),
        (tmp_path, "Is a directory; a TorchScript file is wanted"),
        (tmp_path / "text.pt", "not a TorchScript file"),
        (tmp_path / "empty.pt", "not a TorchScript file"),
        (tmp_path / "weights.pt", "not a TorchScript file"),
    ]
    for path, message in cases:
        for kind in kinds:
            with pytest.raises(ValueError, match=message) as caught:
                kind(path)
            assert str(caught.value).startswith(str(path))
            assert "\n" not in str(caught.value)
    inception = saved(Inception())
    with pytest.raises(ValueError, match=r"SHA-256 is [0-9a-f]{64}, wanted is 00"):
        torchscript.TorchScriptFeatures(inception, sha256="00")
    right = torchscript.TorchScriptFeatures(inception).identity.digest
    torchscript.TorchScriptFeatures(inception, sha256=right.upper())


@pytest.mark.parametrize(
    ("kind", "module", "message"),
    [
        (torchscript.TorchScriptFeatures, Logits(), r"forward\(images\) has no argument 'return_f"),
        (torchscript.TorchScriptFeatures, Failing(), "failed when called: .*out of order"),
        (torchscript.TorchScriptFeatures, Images(), r"returned shape \[2, 3, 64, 64\] for 2 pict"),
        (torchscript.TorchScriptLpips, Logits(), "neither takes 'return_lpips'"),
        (torchscript.TorchScriptClassifier, Pair(), "failed when called"),
    ],
)
def test_networks_of_another_kind(
    saved: Callable[[nn.Module], Path],
    kind: Callable[[Path], object],
    module: nn.Module,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        kind(saved(module))
    assert "\n" not in str(caught.value)


def test_features_that_are_not_finite(saved: Callable[[nn.Module], Path]) -> None:
    module = Inception()
    with torch.no_grad():
        module.layers.bias.fill_(torch.nan)
    given = Networks(torchscript.TorchScriptFeatures(saved(module)))
    with pytest.raises(ValueError, match=r"Inception\.pt .*: features that are not finite"):
        given.features(_pictures())
