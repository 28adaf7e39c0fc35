"""A trained network that samples batches of tensors: what a :class:`palette.Pipeline` drives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from palette.build import (
    CHANNELS,
    build_levels,
    build_schedule,
    default_eta,
    image_size,
    resolve_device,
    resolve_precision,
    tells_level,
)
from palette.config import Config
from palette.diffusion.sampler import Sampler
from palette.models.layers import channels_last
from palette.models.packed import pack
from palette.models.tiled import Tiled
from palette.ops import noise, philox

_AT_ONCE = 16  # images a batch is cut into
_SAMPLERS = 4  # kept, each with buffers and on a GPU with graphs

Preview = Callable[[int, Tensor], Any]


class Options(TypedDict, total=False):
    """What every method of a pipeline takes beside its images.

    Keys:
        steps: network evaluations; default ``config.sample.steps``.
        seed: image i of a list is drawn with ``seed + i``, alone or in a batch; default 0.
        solver: dpmpp_2m, dpmpp_2m_sde, unipc, ddim or ddpm; default ``config.sample.solver``.
        eta: noise of ddim: 0 none, 1 ancestral; default ``config.sample.eta``.
        label: class to draw, from 0, of a model with classes; default none in particular.
        guidance: weight of the label, with one only; default ``config.sample.guidance``.
        reuse: every so many evaluations one is whole and the others, a sixth to a third of its
            cost, reuse its deep features; 1 is off; default ``config.sample.reuse``.
        native: show the network the whole picture at its own size.
        tiled: the picture's own size, shown to the network in overlapping tiles of its own.
        progress: draw a bar on a terminal.
        on_step: called with the step and the current estimate [N, C, H, W] of the picture.
    """

    steps: int | None
    seed: int
    solver: str | None
    eta: float | None
    label: int | None
    guidance: float | None
    reuse: int | None
    native: bool
    tiled: bool
    progress: bool
    on_step: Preview | None


@dataclass(frozen=True)
class Request:
    """How to sample: :class:`Options` with the defaults of the config."""

    steps: int
    solver: str
    seed: int
    eta: float = 0.0
    label: int | None = None
    guidance: float = 1.0
    reuse: int = 1
    native: bool = False
    tiled: bool = False
    progress: bool = False
    on_step: Preview | None = None


class Engine:
    """A network, its schedule and the samplers made of them.

    Attributes:
        network: the network, in evaluation mode.
        config: the options it was trained with.
        name: what it was loaded from, for the record in written pictures.
        digest: the first characters of the weights' SHA-256.
        graph: on a GPU, replay sampling steps as CUDA graphs (see ``Sampler``); set it to False
            where a layer put into the network reads values back to the host.
    """

    graph = True

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        name: str = "",
        digest: str = "",
    ) -> None:
        self.device = resolve_device(device) if isinstance(device, str) else device
        # "auto" is what it was trained in, which for published weights is float32.
        chosen = config.train.precision if precision == "auto" else precision
        self.dtype = resolve_precision(chosen, self.device)
        self.network = network.eval().to(device=self.device, dtype=self.dtype)
        channels_last(self.network)
        self.config, self.name, self.digest = config, name, digest
        self.schedule = build_schedule(config)
        self._samplers: OrderedDict[tuple[Any, ...], Sampler] = OrderedDict()
        self._packed: nn.Module | None = None
        self._packed_of: tuple[tuple[int, int], ...] = ()

    def record(self, seed: int, **options: Any) -> dict[str, Any]:
        """What a written picture should say of its origin, to be drawn again."""
        request = self._request(**options, seed=seed)
        label = {"label": request.label, "guidance": request.guidance}
        return {
            "model": self.name,
            "weights": self.digest,
            "seed": request.seed,
            "steps": request.steps,
            "solver": request.solver,
            **({} if request.label is None else label),
            **({} if request.reuse == 1 else {"reuse": request.reuse}),
            **({"eta": request.eta} if request.eta else {}),
            **({"native": True} if request.native else {}),
            **({"tiled": True} if request.tiled else {}),
        }

    def sampler(
        self,
        steps: int | None = None,
        solver: str | None = None,
        eta: float | None = None,
        reuse: int | None = None,
    ) -> Sampler:
        """The step engine behind the methods, for a batch of any task; arguments as ``inpaint``.

        That of a model with classes guides as its config says.
        """
        request = self._request(steps=steps, solver=solver, eta=eta, reuse=reuse)
        if self.config.model.num_classes is not None:
            request = replace(request, guidance=self.config.sample.guidance)
        return self._sampler(request)

    def complete(self, known: Tensor, mask: Tensor, seeds: Tensor, **options: Any) -> Tensor:
        """Fill the hole of a batch at the network's size.

        Args:
            known: [N, C, H, W] in [-1, 1]; what lies in the hole is never read.
            mask: [N, 1, H, W], 1 = hole.
            seeds: int64 [N], one per image.
            options: as for ``inpaint``: steps, solver, eta, progress, on_step.

        Returns:
            [N, C, H, W] float32 in [-1, 1], equal to ``known`` outside the hole.
        """
        request = self._request(**options)
        known, mask, seeds = (tensor.to(self.device) for tensor in (known, mask, seeds))
        return self._complete(known, mask, seeds, request)

    def _complete(self, known: Tensor, mask: Tensor, seeds: Tensor, request: Request) -> Tensor:
        known = torch.where(mask.bool(), 0.0, known)
        condition = known + mask * self._condition_noise(seeds, known.shape[1:])
        return self._draw(condition, seeds, request, known=known, mask=mask.to(known.dtype))

    def _draw(
        self,
        condition: Tensor,
        seeds: Tensor,
        request: Request,
        *,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """A batch [N, C, H, W] float32 in [-1, 1] from conditions [N, C', H, W].

        ``level`` [N] is that of the condition, by default clean where the network is told it.
        """
        classes, ones = self.config.model.num_classes, torch.ones_like(seeds)
        if level is None and tells_level(self.config):
            level = ones.float()
        label = None
        if classes is not None:
            label = ones * (classes if request.label is None else request.label)
        return self._sampler(request).sample(
            condition,
            seeds=seeds,
            channels=CHANNELS if known is None else known.shape[1],
            known=known,
            mask=mask,
            label=label,
            level=level,
            batch_size=_AT_ONCE,
            progress=request.progress,
            on_step=request.on_step,
        )

    def _condition_noise(self, seeds: Tensor, shape: torch.Size) -> Tensor:
        step = torch.zeros((), dtype=torch.int64, device=self.device)
        return noise(seeds, step, shape, stream=philox.CONDITION)

    def _weights(self) -> tuple[tuple[int, int], ...]:
        """Where parameters and buffers lie, and how often each was written to."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        return tuple(
            (each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors
        )

    def _ready(self) -> nn.Module:
        """The network made ready for this device, anew where its weights have changed."""
        weights = self._weights()
        if self._packed is None or weights != self._packed_of:
            self._samplers.clear()
            self._packed, self._packed_of = pack(self.network), weights
        return self._packed

    def _sampler(self, request: Request) -> Sampler:
        key = (
            request.solver,
            request.steps,
            request.eta,
            request.guidance,
            request.reuse,
            request.tiled,
        )
        network = self._ready()
        if key not in self._samplers:
            while len(self._samplers) >= _SAMPLERS:
                self._samplers.popitem(last=False)
            self._samplers[key] = Sampler(
                Tiled(network, image_size(self.config)) if request.tiled else network,
                build_levels(self.config, request.steps),
                solver=request.solver,
                prediction=self.config.model.prediction,
                eta=request.eta,
                guidance=request.guidance,
                reuse=request.reuse,
                dtype=self.dtype,
            )
        self._samplers.move_to_end(key)
        self._samplers[key].graph = self.graph
        return self._samplers[key]

    def _request(
        self,
        steps: int | None = None,
        solver: str | None = None,
        seed: int = 0,
        eta: float | None = None,
        label: int | None = None,
        guidance: float | None = None,
        reuse: int | None = None,
        native: bool = False,
        tiled: bool = False,
        progress: bool = False,
        on_step: Preview | None = None,
    ) -> Request:
        if native and tiled:
            raise ValueError("native and tiled: give one of them, not both")
        classes = self.config.model.num_classes
        if label is not None and not 0 <= label < (classes or 0):
            known = "no classes" if classes is None else f"classes 0 to {classes - 1}"
            raise ValueError(f"label: found {label}; the model has {known}")
        if guidance is not None and label is None:
            raise ValueError(f"guidance: found {guidance}; it is the weight of a label, give one")
        sample = self.config.sample
        reuse = sample.reuse if reuse is None else reuse
        if reuse > 1 and self.config.model.kind == "sr3":
            raise ValueError(f"reuse: found {reuse}; a model of kind sr3 has to have 1")
        steps = sample.steps if steps is None else steps
        # Few steps of a network published with a thousand ancestral ones want another solver.
        few = sample.grid == "published" and steps != sample.steps
        usual = "dpmpp_2m_sde" if few else sample.solver
        chosen = solver or usual
        return Request(
            steps=steps,
            solver=chosen,
            seed=seed,
            eta=default_eta(self.config, chosen) if eta is None else eta,
            label=label,
            guidance=1.0 if label is None else sample.guidance if guidance is None else guidance,
            reuse=reuse,
            native=native,
            tiled=tiled,
            progress=progress,
            on_step=on_step,
        )
