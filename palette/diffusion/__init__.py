"""Schedules, objective, solvers and the step engine. Knows tensors, no files and no images."""
