"""The training loop: batches in, checkpoints, metrics and pictures out.

The trainer knows networks and batches, and nothing of tasks or images. All randomness is a function
of the samples' seeds and the order of samples one of (run seed, samples seen), so a run that was
killed and taken up again is the run that was not, to the last bit on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import palette
from palette import checkpoint as checkpoints
from palette import config as configs
from palette import info
from palette.build import build_schedule, epoch_length
from palette.checkpoint import Checkpoint, CheckpointError
from palette.config import Config
from palette.data.dataset import Batch, Batches, TaskDataset
from palette.data.loader import Loader
from palette.diffusion import objective
from palette.training.beginning import elsewhere
from palette.training.boards import open_boards
from palette.training.distributed import (
    World,
    check_share,
    copies_in,
    is_sharded,
    parallel,
    precision,
    share_out,
    split,
    unsynchronised,
)
from palette.training.ema import EMA, Further
from palette.training.hangs import naming_the_lost
from palette.training.interrupts import Interrupts
from palette.training.levels import LEVELS, LevelLosses
from palette.training.logging import RunLog
from palette.training.mixed_precision import MixedPrecision
from palette.training.optimizer import adam, trained
from palette.training.pictures import grid
from palette.training.process import Process
from palette.training.rate import learning_rate
from palette.training.resume import RunExists as RunExists
from palette.training.resume import find
from palette.training.sharding import gathered_states, load_optimizer, load_weights
from palette.training.update import OnePass, Update
from palette.training.validation import Validation

OnSamples = Callable[[int, dict[str, Tensor]], object]
"""``on_samples(step, columns)`` after each validation, with the tensors of the picture grid."""

MAX_BAD_STEPS = 20  # skipped in a row before the run stops; float16 may need some to find its scale


class TrainingFailed(RuntimeError):  # noqa: N818 - it says what happened
    """Training cannot go on; what was saved stays."""


class Trainer:
    """Trains one network as ``config.train`` says.

    Args:
        config: the whole config; it is saved with every checkpoint.
        network: on any device; called as ``network(x, gamma, label, seeds)``.
        dataset: training samples.
        validation: samples never trained on, or None.
        world: this process and the others.
        on_samples: called on the first process after each validation.

    Attributes:
        step: optimizer steps done. ``samples`` counts samples seen, over all processes.
    """

    def __init__(
        self,
        config: Config,
        network: nn.Module,
        dataset: TaskDataset,
        validation: TaskDataset | None,
        world: World,
        *,
        on_samples: OnSamples | None = None,
    ) -> None:
        self.config, self.world, self.dataset = config, world, dataset
        self._epoch = epoch_length(len(dataset), config)
        check_share(config, world)
        self.run_dir = Path(config.run.dir)
        self.dtype = precision(config, world)
        sharded = is_sharded(config, world)
        self.network = network.to("cpu" if sharded else world.device).train()
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = EMA(self.network, config.train.ema_decay, warmup=config.train.ema_warmup)
        self.further = Further(self.network, config.train)
        if config.train.compile:
            self.network.compile(fullgraph=True)
        if sharded:
            share_out((self.network, self.ema.network, *self.further.networks()), world)
        self.trained = trained(self.network, config.train)
        self._one_pass = world.device.type == "cpu" and not sharded
        alone = world.size == config.train.accumulate == 1
        self.mixed = MixedPrecision(
            self.network, copies_in(config, world), half_gradients=self._one_pass and alone
        )
        self.model = parallel(self.mixed.network, world)
        self.schedule = build_schedule(config)
        self.optimizer = adam(self.trained, config.train)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype is torch.float16)
        self.validation: Validation | None = None
        if validation is not None:
            found = (self.ema.network, self.network, self.schedule, validation)
            self.validation = Validation(config, *found, world, self.dtype)
        weights = {"ema": self.ema.network, "raw": self.network}
        self.process = Process(config, weights, world, self.dtype)
        self.on_samples = on_samples
        self.step = self.samples = self.bad_steps = 0
        self.validated = 0  # the step of the last validation
        self.window: list[float] = []  # losses since the last line of metrics.jsonl
        self.levels = LevelLosses(self.schedule, world.device)
        self._started = time.perf_counter()
        self._reported = (self._started, 0)  # when, and samples seen
        self.saved: Path | None = None
        self._saved_step = -1

    @functools.cached_property
    def update(self) -> Update:
        """What the gradients do to the weights; made at the first step."""
        followers = (self.optimizer, self.scaler, self.ema, self.further, self.mixed)
        kind = OnePass if self._one_pass and not self.scaler.is_enabled() else Update
        return kind(self.config.train, self.network, *followers)

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between being killed and being taken up again."""
        return time.perf_counter() - self._started

    def fit(self, resume: str | None = None) -> Path:
        """Train to ``config.train.steps`` and return the last checkpoint.

        Args:
            resume: None starts a new run; ``auto`` takes up the newest good checkpoint of the run
                directory, or starts where there is none; a path takes up that checkpoint.

        Raises:
            RunExists: the run directory is in use and ``resume`` does not continue it.
            ConfigError: the config changes what the checkpoint's model is.
            CheckpointError: none can be loaded, or one cannot be written.
            TrainingFailed: too many steps in a row were not finite.
            ProcessLost: another process hangs or has died.
            SystemExit: with 143 or 130 after SIGTERM or Ctrl-C, once a checkpoint is written.
        """
        notes = self._begin(resume)
        active = self.world.is_first
        log = RunLog(self.run_dir, self.step, self.config.train.steps, active=active)
        if active:
            log.boards = open_boards(self.config, self.step, log.say)
        lost = naming_the_lost(self.world, lambda: self.step)
        with contextlib.closing(log), lost, Interrupts() as interrupts:
            log.session(self.step, {"processes": self.world.size, **info.facts()})
            for note in notes:
                log.say(note)
            if not self._loop(log, interrupts):
                number = interrupts.signal or signal.SIGTERM  # or another process received it
                name = signal.Signals(number).name
                log.say(f"stopped by {name}; --resume auto goes on from here")
                raise SystemExit(128 + number)
        assert self.saved is not None or not self.world.is_first
        return self.saved or self.run_dir

    def _loop(self, log: RunLog, interrupts: Interrupts) -> bool:
        """Train to the end; False when a signal ended it earlier. Either way it is saved."""
        train = self.config.train
        batches = self._batches()
        if self.step > 0:
            self._save(log)  # what another run left off with is a checkpoint of this one from now
        going = self._validate(log, interrupts)  # where a signal had cut it short
        while going and self.step < train.steps:
            going = self._train_step(next(batches), log, interrupts)
            going = going and self._validate(log, interrupts)
            if self.process.draw(self.step, log, interrupts):
                self._reported = (time.perf_counter(), self.samples)
            if self.step % train.save_every == 0 and self.step < train.steps:
                self._save(log)
        self._save(log)
        return going or self.step >= train.steps

    def _train_step(self, batch: Batch, log: RunLog, interrupts: Interrupts) -> bool:
        """One optimizer step; False when a signal asked any process to stop."""
        train = self.config.train
        rate = learning_rate(self.step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        per_sample, gamma = self._backward(batch)
        totals = per_sample.new_tensor([0, interrupts.signal], dtype=torch.float64)
        totals[0] = per_sample.double().sum()
        by_level = self.levels.of(per_sample, gamma)
        totals = self.world.sum(torch.cat((totals, by_level.flatten()))).cpu()
        loss, signals = totals[:2].tolist()
        loss /= self.config.data.batch_size
        # The gradients were summed over all processes, so all of them see the same norm.
        norm = self.update.apply(loss, self.step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.window.append(loss)
            self.levels.add(totals[2:].view(2, LEVELS))
        self.step += 1
        self.samples += self.config.data.batch_size
        self._look_after(finite, batch, per_sample, log)
        if self.step % train.log_every == 0 or self.step == train.steps:
            self._report(log, rate, norm)
        log.advance()
        return bool(signals == 0)

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss over all processes; losses and noise levels [N] of mine."""
        config, device = self.config, self.world.device.type
        classes = config.model.num_classes
        parts = split(batch, config.train.accumulate, self.world.device)
        losses, levels = [], []
        self.mixed.refresh()
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with contextlib.nullcontext() if last else unsynchronised(self.model):
                with torch.autocast(device, self.dtype, enabled=self.dtype is not torch.float32):
                    found = objective.loss(
                        self.model,
                        self.schedule,
                        part,
                        part["seed"],
                        prediction=config.model.prediction,
                        kind=config.train.loss,
                        min_snr=config.train.min_snr,
                        normalise=config.train.normalise_loss,
                        label_drop=config.train.label_drop if classes else 0.0,
                        null_label=classes,
                    )
                self.scaler.scale(found.total / len(parts)).backward()  # type: ignore[no-untyped-call]
            losses.append(found.per_sample.detach())
            levels.append(found.gamma)
        return torch.cat(losses), torch.cat(levels)

    def _look_after(self, finite: bool, batch: Batch, per_sample: Tensor, log: RunLog) -> None:
        """Name the samples of a step that was not applied; stop after too many in a row."""
        if finite:
            self.bad_steps = 0
            return
        self.bad_steps += 1
        bad = (~per_sample.isfinite()).tolist()
        mine = [str(name) for name, hit in zip(batch["name"], bad, strict=True) if hit]
        names = [name for share in self.world.gather(mine) for name in share]
        if not names:  # the losses were finite, the gradients not
            names = [str(name) for share in self.world.gather(batch["name"]) for name in share]
        log.skipped(self.step, names)
        if self.bad_steps >= MAX_BAD_STEPS:
            raise TrainingFailed(
                f"{self.run_dir}: loss or gradient not finite in {self.bad_steps} steps in a row, "
                f"last at step {self.step} on {', '.join(names[:4])}; "
                f"lower train.lr or set train.precision=float32"
            )

    def _report(self, log: RunLog, rate: float, norm: float) -> None:
        """One line of metrics: the mean loss since the last one."""
        loss = sum(self.window) / len(self.window) if self.window else None
        self.window.clear()
        now = time.perf_counter()
        since, seen = self._reported
        speed = (self.samples - seen) / max(now - since, 1e-9)
        self._reported = (now, self.samples)
        record = {
            "step": self.step,
            "loss": loss,
            **self.levels.take(),
            "samples": self.samples,
            "lr": rate,
            "seconds": self.seconds,
            "samples_per_second": speed,
            "data_wait": self._loader.waiting(),
            "grad_norm": norm if math.isfinite(norm) else None,
        }
        shown = "not finite" if loss is None else f"{loss:.4f}"
        log.metrics(record, f"loss {shown}, lr {rate:.2g}, {speed:.1f} samples/s")

    def _validate(self, log: RunLog, interrupts: Interrupts) -> bool:
        """Validate where it is due; False when a signal came in between."""
        every = self.config.train.sample_every
        due = every > 0 and self.step > 0 and self.step % every == 0
        if self.validation is None or not due or self.validated == self.step:
            return True
        scores = self.validation.run(interrupts)
        if scores is None:
            return False
        self.validated = self.step
        counts = {"samples": self.samples, "seconds": self.seconds}
        log.metrics({"step": self.step, **scores.metrics(), **counts}, scores.shown())
        if self.world.is_first and scores.columns:
            log.picture(self.step, grid(scores.columns))
            if self.on_samples is not None:
                self.on_samples(self.step, scores.columns)
        self._reported = (time.perf_counter(), self.samples)
        return True

    def _batches(self) -> Iterator[Batch]:
        """This process's share of every batch from the sample after the last one seen."""
        data = self.config.data
        rank, world = self.world.rank, self.world.size
        share = data.batch_size // world
        order = Batches(self._epoch, share, start=self.samples, rank=rank, world=world)
        pinned = self.world.device.type == "cuda"
        self._loader = Loader(self.dataset, order, workers=data.workers, pin_memory=pinned)
        return iter(self._loader)

    def _begin(self, resume: str | None) -> list[str]:
        """Take up the run where there is one to take up; returns what there is to say about it."""
        found = find(self.config, resume, self.world)
        where = f"training in {self.run_dir}"
        notes = [f"skipped {reason}" for reason in found.skipped] if found else []
        if found is None:
            fresh = self._state()
            weights = gathered_states(self.network.state_dict(), keep=True)
            found, notes = elsewhere(self.config, weights, self.trained, fresh, self._epoch)
        if found is not None:
            self._restore(found)
            where += f", {'begun' if self.step == 0 else 'continued'} from {found.path}"
        return [*notes, where]

    def _save(self, log: RunLog) -> None:
        """Write a checkpoint of this step, and only then remove old ones."""
        if self._saved_step == self.step:
            return
        parts = {
            "model": self.network.state_dict(),
            "ema": self.ema.network.state_dict(),
            "averages": self.further.states(),
            "trainer": self._state(),
        }
        parts = gathered_states(parts, keep=self.world.is_first)
        problem = None
        if self.world.is_first:
            try:
                log.flush()
                self.saved = checkpoints.save(
                    self.run_dir,
                    self.step,
                    **parts,
                    config_yaml=configs.to_yaml(self.config),
                    meta={"palette": palette.__version__, "samples": self.samples},
                )
                checkpoints.prune(self.run_dir, self.config.train.keep)
            except checkpoints.CheckpointError as error:
                problem = error
        problem = self.world.from_first(problem)  # and nobody goes on before it is written
        if problem is not None:
            raise problem
        self._saved_step = self.step

    def _state(self) -> dict[str, Any]:
        """All that the weights do not say, in tensors and plain types."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema.updates,
            "further_updates": self.further.updates(),
            "step": self.step,
            "samples": self.samples,
            "bad_steps": self.bad_steps,
            "validated": self.validated,
            "window": self.window,
            "levels": self.levels.sums.clone(),
            "seconds": self.seconds,
            "rng": self.world.gather(torch.get_rng_state()),
        }

    def _restore(self, found: Checkpoint) -> None:
        try:
            load_weights(self.network, found.model)
            self.ema.load(found.ema, found.trainer["ema_updates"])
            updates = found.trainer.get("further_updates", {})
            self.further.load(found.averages, updates, found.model)
            load_optimizer(self.optimizer, found.trainer["optimizer"], self.trained)
            if found.trainer["scaler"]:  # empty where it was not trained in float16
                self.scaler.load_state_dict(found.trainer["scaler"])
            for name in ("step", "samples", "bad_steps", "validated"):
                setattr(self, name, int(found.trainer[name]))
            self.window = [float(loss) for loss in found.trainer["window"]]
            if "levels" in found.trainer:  # checkpoints before 2026-11-20 have none
                self.levels.sums.copy_(found.trainer["levels"])
            self._started = time.perf_counter() - float(found.trainer["seconds"])
            self._reported = (time.perf_counter(), self.samples)
            states = found.trainer["rng"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{found.path}: does not fit this model: {reason}") from None
        if len(states) == self.world.size:  # nothing of ours draws from it; a user's task may
            torch.set_rng_state(states[self.world.rank])
        self.saved = found.path
        if found.path.resolve().is_relative_to(self.run_dir.resolve()):
            self._saved_step = self.step
