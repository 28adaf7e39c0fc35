"""Trainer, weight averaging, distributed set-up and logging."""
