"""Adapters and checkpoints on disk, one tensor at a time: no weights of a model are loaded or changed here.

May import delta, base, config, card and baselines.
"""
