"""Every option of the training; see ``palette.config``."""

# ruff: noqa: RUF009 - option() returns a dataclasses.field, which is what RUF009 asks for

from __future__ import annotations

import dataclasses
from typing import Literal

from palette._config_option import option


@dataclasses.dataclass
class Train:
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto: bfloat16 where it is fast, else float32 (float16 on sm_75)"
    )
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp",
        "of several processes: ddp, each has the whole model; fsdp, each has a part of weights, "
        "gradients, optimizer and averages",
    )
    compile: bool = option(False, "torch.compile the network; the first step takes minutes")
    steps: int = option(10000, "optimizer steps in all", unit="steps", low=1)
    lr: float = option(1e-4, "learning rate after warm-up", above=0, high=10)
    warmup: int = option(0, "linear rise of the learning rate", unit="steps", low=0)
    lr_schedule: Literal["constant", "cosine", "linear", "exponential", "step"] = option(
        "constant",
        "learning rate after warm-up: constant as in Palette; cosine (SGDR, without restarts) and "
        "linear (guided-diffusion) down to train.lr_end at train.steps; exponential: times "
        "train.lr_factor in each train.lr_every; step: the same, all at once",
    )
    lr_end: float = option(
        0.0, "lowest learning rate after warm-up, as a share of train.lr", low=0, high=1
    )
    lr_factor: float = option(0.5, "of train.lr_schedule exponential and step", above=0, high=1)
    lr_every: int = option(10000, "in which these two fall by train.lr_factor", unit="steps", low=1)
    weight_decay: float = option(0.0, "of AdamW", low=0, high=10)
    betas: list[float] = option([0.9, 0.999], "of AdamW", low=0, below=1, pair=True)
    clip: float = option(1.0, "largest gradient norm; 0 never clips", low=0)
    accumulate: int = option(1, "backward passes that share one step's batch", low=1)
    ema_decay: float = option(
        0.9999, "of the averaged weights, after warm-up (1+n)/(10+n)", low=0, below=1
    )
    ema_warmup: bool = option(True, "that warm-up; false: train.ema_decay from the first update")
    ema_start: int = option(0, "before the first update of the average", unit="steps", low=0)
    ema_decays: list[float] = option(
        [], "of further averages, saved as ema-<decay>", low=0, below=1, empty=True
    )
    swa_start: int | None = option(
        None, "before an equal mean of the weights, saved as ema-swa", unit="steps", low=0
    )
    ema_every: int = option(1, "between updates of the averages", unit="steps", low=1)
    loss: Literal["l2", "l1", "huber"] = option("l2", "distance to the prediction target")
    min_snr: float | None = option(
        None,
        "weight of a sample's loss: its signal-to-noise ratio but at most this (Hang et al. 2023: "
        "5), in units of the loss of x0; null: every sample counts alike",
        above=0,
    )
    normalise_loss: bool = option(
        True, "divide by the area of the hole; false: mean over all pixels, as published"
    )
    norms_only: bool = option(False, "train the normalisation layers alone", fixed=True)
    init_from: str = option(
        "",
        "weights that a new run begins with, averaged ones where there are: a run, checkpoint or "
        ".safetensors file of ours, or published Palette, SR3 or guided-diffusion (ADM) weights, "
        "with other input and output channels too",
    )
    resume_from: str = option(
        "", "published checkpoint that a new run continues, without _Network.pth or .state"
    )
    label_drop: float = option(
        0.1, "share of samples trained without their label, for guidance", low=0, below=1
    )
    save_every: int = option(1000, "between checkpoints", unit="steps", low=1)
    log_every: int = option(10, "between lines of metrics.jsonl", unit="steps", low=1)
    sample_every: int = option(
        1000, "between validations with the sampler; 0 never", unit="steps", low=0
    )
    process_every: int = option(
        0,
        "of generate: between samples, denoising plots and GIFs of the process by raw and averaged "
        "weights; 0 never",
        unit="steps",
        low=0,
    )
    keep: int = option(2, "newest checkpoints kept", low=2)
    timeout: float = option(
        1800.0,
        "that processes wait for one another before the run ends; validation and saving count",
        unit="seconds",
        above=0,
    )
