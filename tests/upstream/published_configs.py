"""The four published configs, with their keys and values, around a network small enough to train.

Loaded by file, as tests are no package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = {
    "inpainting_celebahq": ("InpaintDataset", "center", 5, 10),
    "inpainting_places2": ("InpaintDataset", "center", 1, 1),
    "uncropping_places2": ("UncroppingDataset", "onedirection", 1, 1),
    "colorization_mirflickr25k": ("ColorizationDataset", None, 5, 10),
}
SMALL: dict[str, Any] = {"inner_channel": 32, "channel_mults": [1, 2], "res_blocks": 1}
SIDE = 16


def build(name: str, train: Path, test: Path, results: Path, **unet: Any) -> dict[str, Any]:
    """The config, its data at these places. ``unet`` replaces options of the network."""
    dataset, test_mask, every_validation, every_save = CONFIGS[name]
    training: dict[str, Any] = {"data_root": str(train), "data_len": -1, "image_size": [SIDE] * 2}
    testing: dict[str, Any] = {"data_root": str(test), "image_size": [SIDE] * 2}
    if test_mask is None:
        training["data_flist"] = str(train / "train.flist")
        testing["data_flist"] = str(test / "test.flist")
    else:
        training["mask_config"] = {"mask_mode": "hybrid"}
        testing["mask_config"] = {"mask_mode": test_mask, "shape": []}
    return {
        "name": name,
        "gpu_ids": [0],
        "seed": -1,
        "finetune_norm": False,
        "path": {
            "base_dir": str(results),
            "code": "code",
            "tb_logger": "tb_logger",
            "results": "results",
            "checkpoint": "checkpoint",
            "resume_state": None,
        },
        "datasets": {
            "train": {
                "which_dataset": {"name": ["data.dataset", dataset], "args": training},
                "dataloader": {
                    "validation_split": 2,
                    "args": {
                        "batch_size": 3,
                        "num_workers": 0,
                        "shuffle": True,
                        "pin_memory": True,
                        "drop_last": True,
                    },
                    "val_args": {"batch_size": 1, "num_workers": 0, "shuffle": False},
                },
            },
            "test": {
                "which_dataset": {"name": dataset, "args": testing},
                "dataloader": {"args": {"batch_size": 8, "num_workers": 0, "pin_memory": True}},
            },
        },
        "model": _model(name, {**SMALL, **unet}),
        "train": {
            "n_epoch": 1e8,
            "n_iter": 1e8,
            "val_epoch": every_validation,
            "save_checkpoint_epoch": every_save,
            "log_iter": 3,
            "tensorboard": True,
        },
        "debug": {"val_epoch": 1, "save_checkpoint_epoch": 1, "log_iter": 3, "debug_split": 8},
    }


def write(path: Path, config: dict[str, Any]) -> Path:
    """The config as a file, with comments as the published ones have them."""
    lines = json.dumps(config, indent=4).splitlines()
    lines[1] += ' // experiments are named "after" it'
    path.write_text("\n".join(lines) + "\n")
    return path


def _model(name: str, unet: dict[str, Any]) -> dict[str, Any]:
    return {
        "which_model": {
            "name": ["models.model", "Palette"],
            "args": {
                "sample_num": 3,
                "task": name.split("_")[0],
                "ema_scheduler": {"ema_start": 1, "ema_iter": 1, "ema_decay": 0.9999},
                "optimizers": [{"lr": 5e-5, "weight_decay": 0}],
            },
        },
        "which_networks": [
            {
                "name": ["models.network", "Network"],
                "args": {
                    "init_type": "kaiming",
                    "module_name": "guided_diffusion",
                    "unet": {
                        "in_channel": 6,
                        "out_channel": 3,
                        "attn_res": [16],
                        "num_head_channels": 32,
                        "dropout": 0.2,
                        "image_size": SIDE,
                        **unet,
                    },
                    "beta_schedule": {
                        "train": {
                            "schedule": "linear",
                            "n_timestep": 2000,
                            "linear_start": 1e-6,
                            "linear_end": 0.01,
                        },
                        "test": {
                            "schedule": "linear",
                            "n_timestep": 6,
                            "linear_start": 1e-4,
                            "linear_end": 0.9,
                        },
                    },
                },
            }
        ],
        "which_losses": ["mse_loss"],
        "which_metrics": ["mae"],
    }
