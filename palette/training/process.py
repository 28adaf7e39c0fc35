"""How pictures come out of noise while a model trains, by the raw and by the averaged weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from palette.build import CHANNELS, build_levels, image_size
from palette.config import Config
from palette.diffusion.sampler import CancelledError, Sampler
from palette.training.distributed import World
from palette.training.interrupts import Interrupts
from palette.training.logging import RunLog
from palette.training.pictures import evenly, grid, save_gif
from palette.training.sharding import whole

FRAMES = 40
"""Most frames of an animation: more take memory, and nobody sees them."""
_STAGES, _ROWS = 10, 4  # of the denoising plot


class Process:
    """Draws the same pictures from nothing each time, and shows how they came about.

    Args:
        config: ``train.process_every`` says how often, ``sample.*`` how and how many; classes
            take turns.
        networks: what to draw with, by name: ``ema``, and others beside it.
        world: only the first process draws.
        dtype: what the networks compute in.
    """

    def __init__(
        self, config: Config, networks: Mapping[str, nn.Module], world: World, dtype: torch.dtype
    ) -> None:
        self.config, self.networks = config, networks
        self.world, self.dtype = world, dtype

    def draw(self, step: int, log: RunLog, interrupts: Interrupts) -> bool:
        """Where it is due after ``step``, draw; False when nothing was drawn.

        Writes ``samples/step_<step>.png``, ``process/step_<step>.png`` (time to the right) and
        ``process/step_<step>_<name>.gif`` for each network. After a signal there is no time for
        it: what a stopped run has not drawn by then it never draws.
        """
        every = self.config.train.process_every
        if every == 0 or step % every:
            return False
        networks = {name: whole(each, self.config) for name, each in self.networks.items()}
        if interrupts.signal or not self.world.is_first:
            return False
        try:
            found = {name: self._frames(each, interrupts) for name, each in networks.items()}
        except CancelledError:
            return False
        last = self.config.sample.steps - 1
        log.picture(step, grid({name: frames[last] for name, frames in found.items()}))
        stages = {f"step {i + 1}": found["ema"][i][:_ROWS] for i in evenly(last + 1, _STAGES)}
        plot = log.picture(step, grid(stages), "process")
        for name, frames in found.items():
            save_gif(list(frames.values()), plot.with_name(f"{plot.stem}_{name}.gif"))
        return True

    def _frames(self, network: nn.Module, interrupts: Interrupts) -> dict[int, Tensor]:
        """States [N, C, H, W] on the CPU after the steps that are shown, by number from 0."""
        options, classes = self.config.sample, self.config.model.num_classes
        device = self.world.device
        seeds = torch.arange(options.count, device=device)
        wanted = {*evenly(options.steps, FRAMES), *evenly(options.steps, _STAGES)}
        frames: dict[int, Tensor] = {}

        def keep(index: int, state: Tensor) -> bool:
            if index in wanted:
                frames[index] = state.to("cpu", copy=True)
            return not interrupts.signal

        Sampler(
            network,
            build_levels(self.config),
            solver=options.solver,
            prediction=self.config.model.prediction,
            eta=options.eta,
            guidance=1.0 if classes is None else options.guidance,
            reuse=options.reuse,
            dtype=self.dtype,
        ).sample(
            torch.empty(options.count, 0, *image_size(self.config), device=device),
            seeds=seeds,
            channels=CHANNELS,
            label=None if classes is None else seeds % classes,
            on_step=keep,
            preview="state",
        )
        return frames
