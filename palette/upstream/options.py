"""The published names of the networks' options, translated into ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from palette.diffusion.schedule import Schedule
from palette.models.layers import pair, round_up
from palette.models.sr3 import SR3UNet
from palette.models.unet import UNet

_SHARED = {
    "in_channel": "in_channels",
    "out_channel": "out_channels",
    "inner_channel": "channels",
    "channel_mults": "channel_mults",
    "res_blocks": "res_blocks",
    "dropout": "dropout",
    "attn_res": "attn_res",
    "image_size": "image_size",
}
_GUIDED = _SHARED | {
    "conv_resample": "conv_resample",
    "use_checkpoint": "checkpoint",
    "num_heads": "heads",
    "num_head_channels": "head_channels",
    "num_heads_upsample": "heads_upsample",
    "use_scale_shift_norm": "scale_shift",
    "resblock_updown": "resblock_updown",
}
# use_fp16 did nothing in the published code (its forward casts to float32), and does nothing here.
_GUIDED_SPECIAL = ("use_new_attention_order", "use_fp16")
_GUIDED_DEFAULTS: dict[str, Any] = {
    "dropout": 0,
    "channel_mults": (1, 2, 4, 8),
    "conv_resample": True,
    "use_checkpoint": False,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
_SR3 = _SHARED | {"norm_groups": "norm_groups", "with_noise_level_emb": "noise_level_embedding"}
_SR3_DEFAULTS: dict[str, Any] = {
    "in_channel": 6,
    "out_channel": 3,
    "inner_channel": 32,
    "norm_groups": 32,
    "channel_mults": (1, 2, 4, 8, 8),
    "attn_res": 8,
    "res_blocks": 3,
    "dropout": 0,
    "with_noise_level_emb": True,
    "image_size": 128,
}
_SCHEDULE = {
    "schedule": "name",
    "n_timestep": "steps",
    "linear_start": "start",
    "linear_end": "end",
    "cosine_s": "cosine_offset",
}


def unet_options(
    module_name: str,
    unet: Mapping[str, Any],
    image_size: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """Arguments of ``UNet`` or ``SR3UNet`` for a published ``unet`` block.

    ``attn_res`` is a downsampling factor in the guided_diffusion module and pixels in sr3; values
    that no level reaches meant nothing in the published code and are dropped: [16] with four levels
    leaves attention to the middle block alone. ``image_size``, where given, replaces the block's;
    the same levels attend, named by their pixels at the new size.

    Raises:
        ValueError: the module is unknown, or an option is unknown or missing.
    """
    if module_name == "guided_diffusion":
        options = _guided(unet)
        reached = [2**level for level in range(len(options["channel_mults"]))]
    elif module_name == "sr3":
        options = _sr3(unet)
        reached = _resolutions(options, options["image_size"])
    else:
        raise ValueError(f"module_name: {module_name!r} is neither 'guided_diffusion' nor 'sr3'")
    size = pair(options["image_size"] if image_size is None else image_size, "image_size")
    wanted = options.pop("attn_res")
    wanted = [wanted] if isinstance(wanted, int) else wanted
    pixels = _resolutions(options, size)
    attending = [pixels[level] for level, name in enumerate(reached) if name in wanted]
    return options | {
        "attention_resolutions": attending,
        "image_size": size,
        "embedding": "gamma",
    }


def build_unet(module_name: str, unet: Mapping[str, Any]) -> nn.Module:
    """The published network with these published options; ValueError as ``unet_options``."""
    options = unet_options(module_name, unet)
    return SR3UNet(**options) if module_name == "sr3" else UNet(**options)


def build_schedule(beta_schedule: Mapping[str, Any], phase: str) -> Schedule:
    """The schedule of a phase ("train" or "test") of a published ``beta_schedule`` block.

    Raises:
        ValueError: the phase or an option is missing, unknown or out of range.
    """
    return Schedule.from_name(**schedule_options(beta_schedule, phase))


def schedule_options(beta_schedule: Mapping[str, Any], phase: str) -> dict[str, Any]:
    """Arguments of ``Schedule.from_name`` for a phase of a published ``beta_schedule`` block."""
    if phase not in beta_schedule:
        raise ValueError(
            f"beta_schedule.{phase}: missing; there is {', '.join(map(str, beta_schedule))}"
        )
    given = beta_schedule[phase]
    _refuse_unknown(f"beta_schedule.{phase}", given, _SCHEDULE)
    _refuse_missing(f"beta_schedule.{phase}", given, ("schedule", "n_timestep"))
    options = {ours: given[name] for name, ours in _SCHEDULE.items() if name in given}
    try:
        return options | {"steps": int(options["steps"])}
    except (TypeError, ValueError, OverflowError):
        key, found = f"beta_schedule.{phase}.n_timestep", repr(options["steps"])[:60]
        raise ValueError(f"{key}: must be a whole number; got {found}") from None


def _guided(unet: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unknown("unet", unet, (*_GUIDED, *_GUIDED_SPECIAL))
    required = ("image_size", "in_channel", "inner_channel", "out_channel", "res_blocks")
    _refuse_missing("unet", unet, (*required, "attn_res"))
    given = _GUIDED_DEFAULTS | dict(unet)
    options = {ours: given[name] for name, ours in _GUIDED.items()}
    for name in ("head_channels", "heads_upsample"):
        if options[name] == -1:
            options[name] = None
    options["attention_order"] = "new" if given.get("use_new_attention_order") else "legacy"
    return options


def _sr3(unet: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unknown("unet", unet, _SR3_DEFAULTS)
    given = _SR3_DEFAULTS | dict(unet)
    return {ours: given[name] for name, ours in _SR3.items()}


def _resolutions(options: Mapping[str, Any], size: int | Sequence[int]) -> list[int]:
    """Pixels of the shorter side of every level's feature map."""
    levels = len(options["channel_mults"])
    shorter = min(round_up(pair(size, "unet.image_size"), 2 ** (levels - 1)))
    return [shorter >> level for level in range(levels)]


def _refuse_unknown(
    where: str, given: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]
) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where}.{name}: unknown; the published code has {', '.join(known)}")


def _refuse_missing(where: str, given: Mapping[str, Any], required: Sequence[str]) -> None:
    for name in required:
        if name not in given:
            raise ValueError(f"{where}.{name}: missing; the published code has no default for it")
