"""Published JSON configs: comments, translation into our options, mistakes named by key."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from palette import config as configs
from palette.config import ConfigError
from palette.data.masks import find_mask
from palette.data.order import Draws
from palette.upstream import (
    Network,
    network_arguments,
    parse_json_config,
    read_json_config,
    settings,
    to_config,
)

SCHEDULE = {
    "train": {"schedule": "linear", "n_timestep": 2000, "linear_start": 1e-6, "linear_end": 0.01},
    "test": {"schedule": "linear", "n_timestep": 1000, "linear_start": 1e-4, "linear_end": 0.09},
}


def published(task: str = "inpainting", path: str = "data/train.flist") -> dict[str, Any]:
    """A config with the keys and values of the published one of a task."""
    dataset = {
        "inpainting": "InpaintDataset",
        "uncropping": "UncroppingDataset",
        "colorization": "ColorizationDataset",
    }[task]
    side = 224 if task == "colorization" else 256
    arguments: dict[str, Any] = {"data_root": path, "data_len": -1, "image_size": [side, side]}
    test: dict[str, Any] = {"data_root": path}
    if task == "colorization":
        arguments["data_flist"] = "data/train.flist"
    else:
        arguments["mask_config"] = {"mask_mode": "hybrid"}
        mode = "center" if task == "inpainting" else "onedirection"
        test["mask_config"] = {"mask_mode": mode, "shape": []}
    return {
        "name": task,
        "gpu_ids": [0, 1],
        "seed": -1,
        "finetune_norm": False,
        "path": {"base_dir": "experiments", "resume_state": None},
        "datasets": {
            "train": {
                "which_dataset": {"name": ["data.dataset", dataset], "args": arguments},
                "dataloader": {
                    "validation_split": 2,
                    "args": {"batch_size": 3, "num_workers": 4, "drop_last": True},
                },
            },
            "test": {
                "which_dataset": {"name": dataset, "args": test},
                "dataloader": {"args": {"batch_size": 8, "num_workers": 4}},
            },
        },
        "model": model(task, side),
        "train": {
            "n_epoch": 1e8,
            "n_iter": 1e8,
            "val_epoch": 5,
            "save_checkpoint_epoch": 10,
            "log_iter": 1e3,
        },
        "debug": {"val_epoch": 1, "save_checkpoint_epoch": 1, "log_iter": 2, "debug_split": 50},
    }


def model(task: str, side: int) -> dict[str, Any]:
    """The "model" section of the same config."""
    return {
        "which_model": {
            "name": ["models.model", "Palette"],
            "args": {
                "sample_num": 8,
                "task": task,
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
                        "inner_channel": 64,
                        "channel_mults": [1, 2, 4, 8],
                        "attn_res": [16],
                        "num_head_channels": 32,
                        "res_blocks": 2,
                        "dropout": 0.2,
                        "image_size": side,
                    },
                    "beta_schedule": copy.deepcopy(SCHEDULE),
                },
            }
        ],
        "which_losses": ["mse_loss"],
        "which_metrics": ["mae"],
    }


def replaced(key: str, value: Any, source: dict[str, Any] | None = None) -> dict[str, Any]:
    config = copy.deepcopy(published() if source is None else source)
    *parents, last = key.split(".")
    place: Any = config
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    place[int(last) if last.isdigit() else last] = value
    return config


def test_comments_go_and_urls_stay(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        '\ufeff{ // the name, "quoted"\n'
        '  "name": "https://example.org//x", // and a comment\n'
        '  "quote": "a \\" // b", //\n'
        '  "attn_res": [\n    // 32,\n    16\n  ]\n}\n',
        encoding="utf-8",
    )
    assert read_json_config(file) == {
        "name": "https://example.org//x",
        "quote": 'a " // b',
        "attn_res": [16],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": 1,\n"b" 2 // c\n}', r"^config:3: broken JSON"),
        ('{"a": "open // string\n}', r"^config:1: broken JSON"),
        ('{"a": NaN}', r"^config: broken JSON: NaN"),
        ("[1]", r"^config: expected an object \{\.\.\.\}, found a list"),
        ("[" * 100_000, r"^config: broken JSON: nested too deeply|^config:1: broken JSON"),
        ("", r"^config:1: broken JSON"),
    ],
)
def test_broken_json_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_json_config(text)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        read_json_config(tmp_path / "none.json")
    (tmp_path / "image.json").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_json_config(tmp_path / "image.json")


def test_inpainting_is_a_config_of_ours() -> None:
    sections = to_config(published())
    config = configs.from_yaml(yaml.safe_dump(sections))
    assert config.run.dir == "experiments/train_inpainting"
    assert (config.model.kind, config.model.embedding) == ("unet", "gamma")
    assert (config.model.attention_resolutions, config.model.head_channels) == ([], 32)
    assert config.model.attention_order == "legacy"
    assert (config.schedule.name, config.schedule.steps) == ("linear", 2000)
    assert (config.schedule.start, config.schedule.end) == (1e-6, 0.01)
    assert (config.task.name, config.task.mask) == ("inpaint", "hybrid")
    assert (config.data.source, config.data.path) == ("list", "data/train.flist")
    assert (config.data.image_size, config.data.validation) == ([256, 256], 2)
    assert (config.data.batch_size, config.data.workers, config.data.flip) == (6, 4, False)
    assert (config.train.lr, config.train.clip, config.train.ema_decay) == (5e-5, 0.0, 0.9999)
    assert (config.sample.solver, config.sample.steps) == ("ddpm", 1000)


def test_other_tasks_and_phases(tmp_path: Path) -> None:
    uncropping = to_config(published("uncropping", str(tmp_path)), phase="test")
    assert uncropping["task"] == {"name": "uncrop", "mask": "one_direction"}
    assert uncropping["data"]["source"] == "folder"
    assert uncropping["data"]["batch_size"] == 16
    assert to_config(published("uncropping"))["task"]["mask"] == "uncrop_published"
    colorization = to_config(published("colorization", str(tmp_path)))
    assert colorization["task"] == {"name": "colorize"}
    assert colorization["data"]["image_size"] == [224, 224]
    test = to_config(published("colorization", str(tmp_path)), phase="test")
    assert test["data"]["image_size"] == 224
    assert settings(published("colorization")).file_list == "data/train.flist"


def test_command_line_replaces_the_config() -> None:
    config = to_config(published(), batch_size=5, gpus=1, debug=True)
    assert config["data"]["batch_size"] == 5
    assert config["run"]["dir"] == "experiments/debug_inpainting"
    found = settings(published(), gpus=1, debug=True)
    assert (found.debug_split, found.validate_epochs, found.processes) == (50, 1, 1)
    assert settings(published()).debug_split is None


def test_settings() -> None:
    found = settings(published())
    assert (found.epochs, found.samples) == (10**8, 10**8)
    assert (found.validate_epochs, found.save_epochs, found.processes) == (5, 10, 2)
    assert (found.ema_start, found.ema_every, found.sample_num) == (1, 1, 8)
    assert (found.data_length, found.validation_split, found.drop_last) == (None, 2, True)
    assert found.resume is None
    resumed = replaced("path.resume_state", "x/checkpoint/200")
    assert settings(resumed).resume == "x/checkpoint/200"
    assert settings(replaced("finetune_norm", True)).name == "finetune_inpainting"
    assert to_config(replaced("seed", 7))["run"]["seed"] == 7
    assert "seed" not in to_config(published())["run"]


def test_attention_keeps_its_level_at_another_image_size() -> None:
    config = replaced("model.which_networks.0.args.unet.attn_res", [8])
    config["datasets"]["train"]["which_dataset"]["args"]["image_size"] = [128, 128]
    assert to_config(config)["model"]["attention_resolutions"] == [16]


def test_network_of_a_config() -> None:
    config = replaced("model.which_networks.0.args.unet.inner_channel", 32)
    network = Network(**network_arguments(config))
    assert network.beta_schedule == SCHEDULE
    network.set_new_noise_schedule(phase="test")
    assert network.num_timesteps == 1000


def test_sr3_network() -> None:
    config = published()
    arguments = config["model"]["which_networks"][0]["args"]
    arguments["module_name"] = "sr3"
    del arguments["unet"]["num_head_channels"]
    model = to_config(config)["model"]
    assert (model["kind"], model["attention_resolutions"], model["dropout"]) == ("sr3", [], 0.2)
    arguments["unet"]["norm_groups"] = 16
    assert to_config(config)["model"]["norm_groups"] == 16


def test_a_manual_hole_is_a_box_in_shares() -> None:
    raw = published("uncropping")
    masks = raw["datasets"]["train"]["which_dataset"]["args"]["mask_config"]
    masks |= {"mask_mode": "manual", "shape": [64, 0, 128, 256]}
    config = configs.from_sections(to_config(raw, phase="train"))
    assert config.task.mask == "0.0,0.25,1.0,0.75"
    hole = find_mask(config.task.mask)(256, 256, Draws(0))
    assert hole[64:192].all()
    assert hole.sum() == 128 * 256
    arguments = raw["datasets"]["train"]["which_dataset"]["args"]
    for size in ([0, 256], [256]):
        arguments["image_size"] = size
        with pytest.raises(ConfigError, match=r"args\.image_size: must be \[height, width\], at"):
            to_config(raw, phase="train")
    del arguments["image_size"]
    masks["shape"] = []  # as the published file has it
    with pytest.raises(ConfigError, match=r"mask_config\.shape: must be \[top, left, height, w"):
        to_config(raw, phase="train")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", None, r"^name: missing"),
        ("seed", "x", r"^seed: must be a number; got 'x'"),
        ("gpu_ids", 0, r"^gpu_ids: must be a list of numbers"),
        ("finetune_norm", 1, r"^finetune_norm: must be true or false"),
        ("train.n_epoch", 0.5, r"^train\.n_epoch: must be at least 1"),
        ("train.val_epoch", 1.5, r"^train\.val_epoch: must be a whole number"),
        ("train.n_iter", math.inf, r"^train\.n_iter: must be a number; got inf"),
        ("gpu_ids", [math.nan], r"^gpu_ids: must be a list of numbers; got \[nan\]"),
        (
            "model.which_networks.0.args.beta_schedule.train.n_timestep",
            math.inf,
            r"args: beta_schedule\.train\.n_timestep: must be a whole number; got inf",
        ),
        ("datasets.train.which_dataset.name", "MyDataset", r"which_dataset: 'MyDataset' is unk"),
        ("datasets.train.which_dataset.args.data_root", None, r"args\.data_root: missing"),
        (
            "datasets.train.which_dataset.args.mask_config.mask_mode",
            "file",
            r"^datasets\.train\.which_dataset\.args\.mask_config\.mask_mode: 'file' is not supp",
        ),
        ("model.which_model.name", ["os", "system"], r"^model\.which_model: 'system' is not"),
        ("model.which_model.args.optimizers.0.weight_decay", 0.1, r"weight_decay: must be 0"),
        ("model.which_losses", ["FocalLoss"], r"^model\.which_losses\.0: 'FocalLoss'"),
        ("model.which_networks.0.name", "Net", r"^model\.which_networks\.0: 'Net' is not"),
        ("model.which_networks.0.args.typo", 1, r"args\.typo: unknown"),
        ("model.which_networks.0.args.unet", [], r"args\.unet: must be an object"),
        ("model.which_networks.0.args.unet.attn", 1, r"args: unet\.attn: unknown"),
        ("model.which_networks.0.args.unet.in_channel", 4, r"in_channel and out_channel are 4"),
        ("model.which_networks.0.args.beta_schedule.test", {}, r"beta_schedule\.test\.schedule"),
    ],
)
def test_mistakes_are_named(key: str, value: Any, message: str) -> None:
    config = replaced(key, value, json.loads(json.dumps(published())))
    with pytest.raises(ConfigError, match=message) as caught:
        to_config(config)
    assert "\n" not in str(caught.value)


def keys_of_numbers(value: Any, key: str = "") -> list[str]:
    """The full key of every number below a value, those in lists too."""
    if isinstance(value, (dict, list)):
        names = value if isinstance(value, dict) else range(len(value))
        return [one for name in names for one in keys_of_numbers(value[name], f"{key}.{name}")]
    return [key[1:]] if type(value) in (int, float) else []


# Of another phase; or meaning nothing where no level has it, and where the data have a size.
UNUSED = r"^debug\.|^datasets\.test|unet\.attn_res|unet\.image_size"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + 400 * "0"])
def test_numbers_beyond_all_measure_are_refused_wherever_they_stand(number: str) -> None:
    keys = [key for key in keys_of_numbers(published()) if not re.search(UNUSED, key)]
    assert len(keys) > 30
    for key in keys:
        config = replaced(key, json.loads(number), published())
        with pytest.raises(ConfigError) as caught:
            configs.from_sections(to_config(config))
        assert "\n" not in str(caught.value)
