"""Evaluation: samples by a fixed plan, their scores, and the paper's figures beside them.

An evaluation is a folder: ``evaluation.json`` (the plan), ``names.json``, ``inputs/``, ``truth/``,
``masks/``, ``samples/`` and ``scores.json``. :mod:`palette.evaluation.run` fills it,
:mod:`palette.evaluation.layout` says what lies where.
"""
