"""Pictures of an adapter, and a page of them; needs matplotlib.

May import delta, probing, evaluation and files.
"""
