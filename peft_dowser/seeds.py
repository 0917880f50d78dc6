"""One seed, many independent generators; the global ones belong to the caller."""

import hashlib


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose: the same on every machine, unrelated between purposes.

    Args:
        seed: the seed of the config.
        purpose: what the generator is for, such as `("rademacher", 17)`.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
