"""Adapters and checkpoints on disk, one tensor at a time: nothing here builds or changes a model.

May import delta, base, config and baselines.
"""
