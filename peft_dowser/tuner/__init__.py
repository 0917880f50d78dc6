"""What PEFT calls: adding, loading, saving, merging, mixing, combining and switching adapters of a model.

May import delta, base, probing, layers, files and config.
"""
