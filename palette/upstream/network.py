"""The published ``Network`` (Janspiry/Palette, models/network.py): same interface, same numbers.

A script that imports ``Network`` from the published code works with this one. What differs is
underneath: the fused ops, no host synchronisation in the reverse process, any device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from palette.diffusion.schedule import Schedule, published
from palette.diffusion.solvers import ddpm
from palette.models.initial import INIT_TYPES, initialise
from palette.ops import reverse_step
from palette.upstream.options import build_schedule, build_unet

SCHEDULE_BUFFERS = (
    "gammas",
    "sqrt_recip_gammas",
    "sqrt_recipm1_gammas",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)

Loss = Callable[[Tensor, Tensor], Tensor]


class Network(nn.Module):
    """Conditional diffusion with the published constructor, methods and return values.

    Images are [N, C, H, W] in [-1, 1]; ``mask`` is [N, 1, H, W] with 1 in the hole. ``denoise_fn``
    is the U-Net, called with x [N, condition + image channels, H, W] and gamma [N, 1].

    Args:
        unet: the published ``unet`` block (``attn_res``, ``inner_channel``, ...).
        beta_schedule: the published block, with one schedule per phase.
        module_name: "sr3" or "guided_diffusion".
        init_type: what ``init_weights`` does: kaiming, normal, xavier, xavier_uniform, orthogonal
            or none.
        gain: of the normal, xavier and orthogonal initialisations.

    Raises:
        ValueError: an option is unknown, missing or out of range.
    """

    def __init__(
        self,
        unet: Mapping[str, Any],
        beta_schedule: Mapping[str, Any],
        module_name: str = "sr3",
        *,
        init_type: str = "kaiming",
        gain: float = 0.02,
    ) -> None:
        super().__init__()
        if init_type not in INIT_TYPES:
            raise ValueError(
                f"init_type: {init_type!r} is unknown; choose from {', '.join(INIT_TYPES)}"
            )
        self.denoise_fn = build_unet(module_name, unet)
        self.beta_schedule = beta_schedule
        self.init_type = init_type
        self.gain = gain
        self.num_timesteps = 0
        self.loss_fn: Loss | None = None
        self._schedule: Schedule | None = None
        self.register_load_state_dict_pre_hook(_keep_own_schedule)  # type: ignore[no-untyped-call]

    def set_loss(self, loss_fn: Loss) -> None:
        """The function of (noise, predicted noise) that ``forward`` returns."""
        self.loss_fn = loss_fn

    def set_new_noise_schedule(
        self, device: torch.device | str | None = None, phase: str = "train"
    ) -> None:
        """Register the six buffers of a phase, on ``device`` (None: where the weights are).

        Raises:
            ValueError: ``beta_schedule`` has no such phase or describes no schedule.
        """
        self._schedule = build_schedule(self.beta_schedule, phase)
        self.num_timesteps = len(self._schedule.gammas)
        device = next(self.denoise_fn.parameters()).device if device is None else device
        tables = self._schedule.buffers()
        for name in SCHEDULE_BUFFERS:
            self.register_buffer(name, tables[name].to(device))

    def init_weights(self) -> None:
        """Initialise every convolution and linear layer as the published trainer does.

        It overwrites the zero-initialised output layers too, as published; biases become 0 and
        norms keep 1 and 0.
        """
        initialise(self, self.init_type, self.gain)

    def predict_start_from_noise(self, y_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The clean image that y_t would come from with this noise; t int64 [N]."""
        recip, recipm1 = self._at(t, "sqrt_recip_gammas", "sqrt_recipm1_gammas")
        return recip * y_t - recipm1 * noise

    def q_posterior(self, y_0_hat: Tensor, y_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clipped log-variance of y_{t-1} given y_t and the clean image."""
        coef1, coef2, log_variance = self._at(
            t, "posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped"
        )
        return coef1 * y_0_hat + coef2 * y_t, log_variance

    def p_mean_variance(
        self, y_t: Tensor, t: Tensor, clip_denoised: bool, y_cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of y_{t-1} by the network."""
        gammas = self._at(t, "gammas")[0].reshape(-1, 1)
        noise = self.denoise_fn(_concatenate(y_cond, y_t), gammas)
        y_0_hat = self.predict_start_from_noise(y_t, t, noise)
        if clip_denoised:
            y_0_hat = y_0_hat.clamp(-1.0, 1.0)
        return self.q_posterior(y_0_hat, y_t, t)

    def q_sample(self, y_0: Tensor, sample_gammas: Tensor, noise: Tensor | None = None) -> Tensor:
        """y_0 with noise at levels ``sample_gammas`` [N, 1, 1, 1]."""
        noise = torch.randn_like(y_0) if noise is None else noise
        return sample_gammas.sqrt() * y_0 + (1 - sample_gammas).sqrt() * noise

    @torch.no_grad()
    def p_sample(
        self, y_t: Tensor, t: Tensor, clip_denoised: bool = True, y_cond: Tensor | None = None
    ) -> Tensor:
        """Draw y_{t-1}; the last step (every t 0) adds no noise."""
        mean, log_variance = self.p_mean_variance(y_t, t, clip_denoised, y_cond)
        noise = torch.randn_like(y_t) if bool((t > 0).any()) else torch.zeros_like(y_t)
        return mean + noise * (0.5 * log_variance).exp()

    @torch.no_grad()
    def restoration(
        self,
        y_cond: Tensor,
        y_t: Tensor | None = None,
        y_0: Tensor | None = None,
        mask: Tensor | None = None,
        sample_num: int = 8,
        *,
        noises: Iterable[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the whole reverse process.

        Args:
            y_cond: [N, C, H, W] condition.
            y_t: [N, C, H, W] the noise to start from; drawn in the shape of y_cond where None.
            y_0: [N, C, H, W] the known pixels; needed with ``mask``.
            mask: [N, 1, H, W], 1 in the hole; y_0 replaces the rest after every step.
            sample_num: snapshots to keep, less than the number of steps.
            noises: the draws instead of PyTorch's: y_T first where y_t is None, then one per step
                but the last; each [N, C, H, W].

        Returns:
            The image [N, C, H, W], and [(1 + snapshots) * N, C, H, W]: the start and the snapshots
            in the order of time. Both float32.

        Raises:
            ValueError: no schedule is set, an argument is missing or does not fit.
        """
        table, gammas = self._table(y_cond.device)
        steps = self.num_timesteps
        if not 0 < sample_num < steps:
            raise ValueError(
                f"sample_num: {sample_num} is not between 1 and {steps - 1} (steps - 1)"
            )
        if mask is not None and y_0 is None:
            raise ValueError("y_0: needed with mask, for the pixels outside the hole")
        draws = None if noises is None else iter(noises)
        if y_t is None:
            y_t = _draw(draws, y_cond)
        state = y_t.to(torch.float32, copy=True).contiguous()
        frames = [state.clone()]
        inputs = torch.cat([y_cond.to(torch.float32), state], dim=1)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        slot = inputs[:, y_cond.shape[1] :]
        known = None if mask is None or y_0 is None else y_0.to(torch.float32)
        hole = None if mask is None else mask.to(torch.float32)
        step = torch.zeros((), dtype=torch.int64, device=y_cond.device)
        for i in tqdm(range(steps), desc="sampling", disable=not sys.stderr.isatty()):
            output = self.denoise_fn(inputs, gammas[i].expand(state.shape[0], 1))
            z = _draw(draws, state) if i < steps - 1 else None
            reverse_step(state, output, table, step, noise=z, known=known, mask=hole, slot=slot)
            step.add_(1)
            if (steps - 1 - i) % (steps // sample_num) == 0:
                frames.append(state.clone())
        if draws is not None and next(draws, None) is not None:
            raise ValueError("noises: more tensors than the reverse process draws")
        return state, torch.cat(frames)

    def forward(
        self,
        y_0: Tensor,
        y_cond: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        gammas: Tensor | None = None,
    ) -> Tensor:
        """The training loss: ``loss_fn`` of the noise and its prediction.

        With a mask the network sees the known pixels clean and both arguments of the loss are
        masked; the mean is over all elements all the same, so it scales with the hole's area.
        ``gammas`` [N] or [N, 1] replaces the draw of noise levels.

        Raises:
            ValueError: no schedule or no loss is set.
        """
        if self.loss_fn is None:
            raise ValueError("loss_fn: not set; call set_loss first")
        levels = self._draw_gammas(y_0) if gammas is None else gammas.reshape(-1, 1)
        noise = torch.randn_like(y_0) if noise is None else noise
        noisy = self.q_sample(y_0, levels[:, :, None, None], noise)
        if mask is not None:
            noisy = noisy * mask + (1.0 - mask) * y_0
        predicted: Tensor = self.denoise_fn(_concatenate(y_cond, noisy), levels)
        if mask is not None:
            noise, predicted = mask * noise, mask * predicted
        return self.loss_fn(noise, predicted)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Coefficients [T, 6] of every step for ``reverse_step``, and the gammas [T + 1]."""
        levels = published(self._scheduled())
        if len(levels) != self.num_timesteps + 1:
            raise ValueError("beta_schedule: its last gamma is 0, which no step can start from")
        # From float64 and not from the buffers, which follow the weights into half precision.
        table, gammas = torch.from_numpy(ddpm(levels)), torch.from_numpy(levels)
        return table.to(device, torch.float32), gammas.to(device, torch.float32)

    def _draw_gammas(self, y_0: Tensor) -> Tensor:
        """Noise levels [N, 1], each uniform between two neighbours of the schedule."""
        self._scheduled()
        count = y_0.shape[0]
        t = torch.randint(1, self.num_timesteps, (count,), device=y_0.device)
        upper, lower = self._at(t - 1, "gammas")[0], self._at(t, "gammas")[0]
        u = torch.rand((count, 1), device=y_0.device)
        return (lower - upper).reshape(-1, 1) * u + upper.reshape(-1, 1)

    def _scheduled(self) -> Schedule:
        if self._schedule is None:
            raise ValueError("noise schedule: not set; call set_new_noise_schedule first")
        return self._schedule

    def _at(self, t: Tensor, *names: str) -> list[Tensor]:
        """Entries t [N] of the named buffers, each [N, 1, 1, 1]."""
        self._scheduled()
        return [self.get_buffer(name)[t].reshape(-1, 1, 1, 1) for name in names]


def _concatenate(y_cond: Tensor | None, image: Tensor) -> Tensor:
    """The network's input: condition first, channels together."""
    return image if y_cond is None else torch.cat([y_cond, image], dim=1)


def _draw(draws: Iterator[Tensor] | None, like: Tensor) -> Tensor:
    """The next given noise, or PyTorch's, in the shape of ``like``."""
    if draws is None:
        return torch.randn_like(like)
    noise = next(draws, None)
    if noise is None:
        raise ValueError("noises: fewer tensors than the reverse process draws")
    if noise.shape != like.shape:
        raise ValueError(
            f"noises: a tensor of shape {list(noise.shape)}, expected {list(like.shape)}"
        )
    return noise.to(like.device, torch.float32)


def _keep_own_schedule(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a checkpoint load whatever schedule it was saved with: ours is the one that was set.

    The published weights carry the training schedule, the published EMA weights none.
    """
    for name in SCHEDULE_BUFFERS:
        state.pop(prefix + name, None)
        if name in module._buffers:
            state[prefix + name] = module._buffers[name]
