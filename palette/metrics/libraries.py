"""Feature networks of other libraries, where they are installed and work; nothing is downloaded.

Weights are given as a state dict (a file is read by whoever calls: this module unpickles nothing),
or were put into torch's own cache folder by earlier work with the library. A library may be
installed and still not work (torchvision beside a torch of another build raises RuntimeError), so
every failure to import one is reported in a line and nothing is guessed beforehand.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from palette.metrics.networks import Features, Identity, exact, weights_digest
from palette.metrics.pictures import check_pictures

Weights = Mapping[str, Tensor]

_TRUNKS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


class TorchvisionClassifier:
    """A classifier of torchvision; the paper names resnet50 and efficientnet_b0 for CA.

    Args:
        name: as ``torchvision.models.get_model`` takes it.
        state: its weights; without it those in torch's cache folder.
        weights: which published weights they are: decides resize, crop and normalisation.
        device: where it computes.

    Raises:
        ValueError: torchvision does not work here, has no such network, or there are no weights.
    """

    def __init__(
        self,
        name: str,
        *,
        state: Weights | None = None,
        weights: str = "IMAGENET1K_V1",
        device: str | torch.device = "cpu",
    ) -> None:
        model, entry = _torchvision_model(name, state, weights)
        self._model = model.eval().to(device)
        self._view: Any = entry.transforms()
        self._device = torch.device(device)
        self.last_layer = _last_linear(model, name)
        self.classes = self.last_layer.out_features
        self.identity = Identity(f"torchvision {name} {weights}", weights_digest(_state(model)))

    def __call__(self, pictures: Tensor) -> Tensor:
        """p(class | image) [N, classes] float64 of uint8 [N, 3, H, W]."""
        check_pictures(pictures, "pictures")
        with exact():
            logits: Tensor = self._model(self._view(pictures.to(self._device)))
        return logits.to("cpu", torch.float64).softmax(1)


class TorchvisionFeatures:
    """What the last linear layer of a torchvision classifier sees. Arguments as of the classifier.

    Its FID is not the FID of the literature, whose Inception has other weights.
    """

    def __init__(
        self,
        name: str,
        *,
        state: Weights | None = None,
        weights: str = "IMAGENET1K_V1",
        device: str | torch.device = "cpu",
    ) -> None:
        self._classifier = TorchvisionClassifier(name, state=state, weights=weights, device=device)
        layer = self._classifier.last_layer
        self.identity = self._classifier.identity
        self.classes: int | None = self._classifier.classes
        self.dim = layer.in_features
        self._seen: list[Tensor] = []
        layer.register_forward_pre_hook(lambda _, inputs: self._seen.append(inputs[0]))

    def __call__(self, pictures: Tensor, *, classify: bool = False) -> Features:
        """Features of uint8 [N, 3, H, W], and probabilities."""
        self._seen.clear()
        probabilities = self._classifier(pictures)
        values = self._seen.pop().to("cpu", torch.float32)
        return Features(values, probabilities if classify else None)


class FidelityFeatures:
    """The Inception network of torch-fidelity: TensorFlow's weights and resize, as for real FID.

    Args:
        state: its weights; without it those in torch's cache folder.
        device: where it computes.

    Raises:
        ValueError: torch-fidelity does not work here, or there are no weights.
    """

    dim = 2048

    def __init__(self, *, state: Weights | None = None, device: str | torch.device = "cpu") -> None:
        module = _library("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
        if state is None:
            _cached(module.URL_INCEPTION_V3, "torch-fidelity's Inception")
        with tempfile.TemporaryDirectory() as folder:
            path = None
            if state is not None:  # it takes a path, and unpickles what it finds: so, only our file
                path = str(Path(folder, "weights.pt"))
                torch.save(dict(state), path)
            try:
                self._model = module.FeatureExtractorInceptionV3(
                    "palette", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
                )
            except Exception as error:
                raise ValueError(f"torch-fidelity's Inception: {_line(error)}") from None
        self._model.eval().to(device)
        self._device = torch.device(device)
        self.classes: int | None = 1008
        digest = weights_digest(_state(self._model))
        self.identity = Identity("torch-fidelity inception-v3-compat", digest)

    def __call__(self, pictures: Tensor, *, classify: bool = False) -> Features:
        """Features of uint8 [N, 3, H, W], and probabilities."""
        check_pictures(pictures, "pictures")
        with exact():
            values, logits = self._model(pictures.to(self._device))
        chances = logits.to("cpu", torch.float64).softmax(1) if classify else None
        return Features(values.to("cpu", torch.float32), chances)


class LpipsPackage:
    """LPIPS of the ``lpips`` package, whose calibration weights it brings along.

    Args:
        net: "alex", "vgg" or "squeeze".
        state: weights of the torchvision network of that name (alexnet, vgg16, squeezenet1_1);
            without it those in torch's cache folder.
        device: where it computes.

    Raises:
        ValueError: lpips or torchvision does not work here, or there are no weights.
    """

    def __init__(
        self,
        net: str = "alex",
        *,
        state: Weights | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if net not in _TRUNKS:
            raise ValueError(f"net must be one of {', '.join(_TRUNKS)}, got '{net}'")
        library = _library("lpips", "lpips")
        if state is None:
            state = _state(_torchvision_model(_TRUNKS[net], None, "IMAGENET1K_V1")[0])
        self._model = library.LPIPS(net=net, pnet_rand=True, verbose=False)
        trunk = self._model.net
        wanted = {name: f"features.{name.split('.', 1)[1]}" for name in trunk.state_dict()}
        missing = [name for name in wanted.values() if name not in state]
        if missing:
            raise ValueError(f"state: has no '{missing[0]}' of torchvision's {_TRUNKS[net]}")
        trunk.load_state_dict({name: state[key] for name, key in wanted.items()})
        self._model.eval().to(device)
        self._device = torch.device(device)
        digest = weights_digest(_state(self._model))
        self.identity = Identity(f"lpips 0.1 {net}", digest)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances [N] float64 of uint8 [N, 3, H, W] from uint8 [N, 3, H, W]."""
        check_pictures(first, "first")
        check_pictures(second, "second")
        with exact():
            a, b = (part.to(self._device, torch.float32) / 127.5 - 1 for part in (first, second))
            distance: Tensor = self._model(a, b)
        return distance.flatten().to("cpu", torch.float64)


def _torchvision_model(name: str, state: Weights | None, weights: str) -> tuple[nn.Module, Any]:
    models = _library("torchvision.models", "torchvision")
    try:
        entry = models.get_model_weights(name)[weights]
    except Exception as error:  # an unknown name is a ValueError, an unknown weight a KeyError
        raise ValueError(f"torchvision has no '{name}' with weights '{weights}'") from error
    if state is None:
        _cached(entry.url, f"torchvision's {name}")
    try:
        model = models.get_model(name, weights=entry if state is None else None)
        if state is not None:
            model.load_state_dict(dict(state))
    except Exception as error:
        raise ValueError(f"torchvision's {name} ({weights}): {_line(error)}") from None
    return model, entry


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"{name} does not work here: {_line(error)}") from None


def _cached(url: str, what: str) -> None:
    """Raise ValueError unless torch has the file of ``url`` in its cache folder already."""
    path = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(url).name)
    if not path.is_file():
        raise ValueError(f"{what}: no weights given and none at {path}; nothing is downloaded")


def _last_linear(model: nn.Module, name: str) -> nn.Linear:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(f"torchvision's {name} has no linear layer at its end")
    return layers[-1]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
