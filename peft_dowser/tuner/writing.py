"""Writing into weights that others use too: one writer at a time, and to the end even if Ctrl-C interrupts."""

import threading
from collections.abc import Callable

# Held while base weights or an adapter in use are written; not while tokens are generated.
lock = threading.RLock()


def to_the_end(step: Callable[[], None]) -> None:
    """Run a step to its end even if Ctrl-C interrupts it, and raise the interruption afterwards.

    The step continues where it has stopped when it is called again.
    """
    try:
        step()
    except (KeyboardInterrupt, SystemExit):  # what a signal raises; to retry after an error would loop for ever
        to_the_end(step)
        raise
