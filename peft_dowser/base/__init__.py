"""The base model as an adapter sees it: which weights it has, how they are stored, and on which ranks.

May import delta and config.
"""
