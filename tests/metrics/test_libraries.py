"""Networks of torchvision, torch-fidelity and lpips, whether they work here or not.

The libraries themselves are played by small stand-ins with their interface.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from palette.metrics import libraries


def _pictures(count: int = 3) -> Tensor:
    numbers = torch.arange(count * 3 * 48 * 40)
    return (numbers * 7919 % 65521 % 256).reshape(count, 3, 48, 40).to(torch.uint8)


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.mean((2, 3)))


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.SimpleNamespace:
    """Something that looks like torchvision.models, with torch's cache folder in tmp_path."""
    entry = types.SimpleNamespace(
        url="https://example.org/small-0123.pth", transforms=lambda: lambda x: x.float() / 255
    )

    def get_model(name: str, weights: object) -> nn.Module:
        torch.manual_seed(1 if weights else 2)
        return _Classifier()

    fake = types.SimpleNamespace(
        get_model_weights={"small": {"IMAGENET1K_V1": entry}}.__getitem__, get_model=get_model
    )
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return fake


def test_torchvision_with_given_weights(torchvision: types.SimpleNamespace) -> None:
    torch.manual_seed(3)
    module = _Classifier()
    state = module.state_dict()
    network = libraries.TorchvisionClassifier("small", state=state)
    expected = module(_pictures().float() / 255).double().softmax(1)
    assert torch.allclose(network(_pictures()), expected)
    assert network.classes == 4
    features = libraries.TorchvisionFeatures("small", state=state)
    found = features(_pictures(), classify=True)
    assert torch.equal(found.values, (_pictures().float() / 255).mean((2, 3)))
    assert torch.equal(found.probabilities, network(_pictures()))
    assert features.identity == network.identity
    changed = {name: value + 1 for name, value in state.items()}
    assert libraries.TorchvisionClassifier("small", state=changed).identity != network.identity


def test_torchvision_with_weights_in_the_cache(
    torchvision: types.SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"none at .*small-0123\.pth; nothing is downloaded"):
        libraries.TorchvisionClassifier("small")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "small-0123.pth").write_bytes(b"weights")
    torch.manual_seed(1)
    expected = _Classifier().state_dict()["fc.weight"]
    network = libraries.TorchvisionClassifier("small")
    assert torch.equal(network.last_layer.weight, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "large"}, "torchvision has no 'large' with weights 'IMAGENET1K_V1'"),
        ({"name": "small", "weights": "V9"}, "torchvision has no 'small' with weights 'V9'"),
        ({"name": "small", "state": {}}, "torchvision's small .*Missing key"),
    ],
)
def test_torchvision_refuses(
    torchvision: types.SimpleNamespace, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        libraries.TorchvisionClassifier(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: libraries.TorchvisionClassifier("resnet50"), "torchvision"),
        (libraries.FidelityFeatures, "torch-fidelity"),
        (libraries.LpipsPackage, "lpips"),
    ],
)
def test_a_broken_library_is_reported(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], object], name: str
) -> None:
    def broken(module: str) -> None:
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(libraries.importlib, "import_module", broken)
    with pytest.raises(ValueError, match=f"{name} does not work here: operator torchvision::nms d"):
        make()


class _Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slice1 = nn.Sequential(nn.Conv2d(3, 2, 1))


class _Lpips(nn.Module):
    def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
        super().__init__()
        assert pnet_rand  # or it would download
        self.net = _Trunk()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        difference = self.net.slice1(first) - self.net.slice1(second)
        return difference.square().mean((1, 2, 3), keepdim=True)


def test_lpips_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=_Lpips))
    weight, bias = torch.ones(2, 3, 1, 1), torch.zeros(2)
    state = {"features.0.weight": weight, "features.0.bias": bias, "classifier.1.bias": bias}
    network = libraries.LpipsPackage("alex", state=state)
    first, second = _pictures(2), _pictures(2).flip(3)
    expected = (((first.double() - second.double()) / 127.5).sum(1)).square().mean((1, 2))
    assert network(first, second).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    with pytest.raises(ValueError, match=r"state: has no 'features\.0\.weight' of torchvision's"):
        libraries.LpipsPackage("vgg", state={})
    with pytest.raises(ValueError, match="net must be one of alex, vgg, squeeze, got 'resnet'"):
        libraries.LpipsPackage("resnet")


class _Fidelity(nn.Module):
    """Unpickles whatever file it is given, as the real one does."""

    def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2048)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layer(pictures.float().mean((2, 3)))
        return features, features[:, :1008]


def test_torch_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.SimpleNamespace(
        FeatureExtractorInceptionV3=_Fidelity, URL_INCEPTION_V3="https://example.org/weights-1.pth"
    )
    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    layer = nn.Linear(3, 2048)
    state = {f"layer.{key}": value for key, value in layer.state_dict().items()}
    network = libraries.FidelityFeatures(state=state)
    found = network(_pictures(), classify=True)
    expected = layer(_pictures().float().mean((2, 3)))
    assert torch.allclose(found.values, expected)
    assert torch.allclose(found.probabilities, expected[:, :1008].double().softmax(1))
    with pytest.raises(ValueError, match=r"none at .*weights-1\.pth; nothing is downloaded"):
        libraries.FidelityFeatures()
    with pytest.raises(ValueError, match=r"torch-fidelity's Inception: .*Missing key"):
        libraries.FidelityFeatures(state={})
