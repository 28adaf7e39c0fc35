"""The published Palette code's interface, configs and checkpoints, on our engine."""

from __future__ import annotations

from palette.upstream.config import Settings, network_arguments, settings, to_config
from palette.upstream.files import (
    as_published,
    find_published,
    is_published,
    open_published,
    read_config,
)
from palette.upstream.formats import (
    EMBEDDINGS,
    Converted,
    Fitted,
    TrainingState,
    convert_state_dict,
    convert_training_state,
    fit_state_dict,
    recognise,
)
from palette.upstream.infer import infer_unet
from palette.upstream.jsonc import parse_json_config, read_json_config
from palette.upstream.network import Network
from palette.upstream.options import build_schedule, build_unet, schedule_options, unet_options
from palette.upstream.recipe import read_run

__all__ = [
    "EMBEDDINGS",
    "Converted",
    "Fitted",
    "Network",
    "Settings",
    "TrainingState",
    "as_published",
    "build_schedule",
    "build_unet",
    "convert_state_dict",
    "convert_training_state",
    "find_published",
    "fit_state_dict",
    "infer_unet",
    "is_published",
    "network_arguments",
    "open_published",
    "parse_json_config",
    "read_config",
    "read_json_config",
    "read_run",
    "recognise",
    "schedule_options",
    "settings",
    "to_config",
    "unet_options",
]
