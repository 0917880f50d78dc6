"""Writing into weights that others use too: one writer at a time, and to the end where a Ctrl-C comes in between."""

import threading
from collections.abc import Callable

# Held while base weights or an adapter in use are written; not while tokens are generated.
lock = threading.RLock()


def to_the_end(step: Callable[[], None]) -> None:
    """Run a step to its end, also where a Ctrl-C comes in between, which is raised after it.

    Args:
        step: what goes on where it has stopped when it is called again.
    """
    try:
        step()
    except (KeyboardInterrupt, SystemExit):  # what a signal raises; an error would come again, and again
        to_the_end(step)
        raise
