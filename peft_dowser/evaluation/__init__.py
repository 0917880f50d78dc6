"""What a training forgets and learns: callbacks that measure it and hold it back, and the measures of the literature.

May import delta, base, probing and config.
"""

from . import metrics
from .forgetting import ForgettingCallback
from .rehearsal import RehearsalCallback

__all__ = ["ForgettingCallback", "RehearsalCallback", "metrics"]
