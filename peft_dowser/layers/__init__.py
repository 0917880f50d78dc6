"""The modules that stand in a base model, one per target: their state, and the products with W + D.

May import delta and base.
"""
