"""Pictures of an adapter, and a page of them; needs matplotlib.

May import delta, base, probing, evaluation, files and config.
"""
