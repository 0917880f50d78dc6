"""How the weights that train are chosen: prompts, passes, statistics, scores, and the masks that follow from them.

May import delta, base and config.
"""
