"""`diff`: where two saved adapters train the same weights, and whether they move them the same way."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

from .adapters import SavedAdapter, open_adapter
from .masks import shared
from .names import quoted
from .postmerge import Delta


@dataclass(frozen=True)
class Overlap:
    """How two deltas A and B of the same weights overlap.

    Attributes:
        shared: number of positions that both have.
        only_a: number of positions that A alone has.
        only_b: number of positions that B alone has.
        conflicts: number of shared positions that A and B move in opposite directions.
        product: sum of A B over the shared positions.
        square_a: sum of A squared over the shared positions.
        square_b: sum of B squared over the shared positions.
    """

    shared: int = 0
    only_a: int = 0
    only_b: int = 0
    conflicts: int = 0
    product: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0

    @property
    def cosine(self) -> float | None:
        """Cosine of the values at the shared positions; None where those of A or of B are all 0, or there are none."""
        length = math.sqrt(self.square_a) * math.sqrt(self.square_b)
        return max(-1.0, min(1.0, self.product / length)) if length else None

    def summary(self) -> dict[str, float | None]:
        """The counts and the cosine by name."""
        return {
            "shared": self.shared,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "conflicts": self.conflicts,
            "cosine": self.cosine,
        }


def overlap(a: Delta, b: Delta) -> Overlap:
    """Compare two deltas of one weight.

    Args:
        a: positions strictly increasing, shape `(k1,)`, int32 or int64; values likewise, any float dtype; read only.
        b: likewise, on the same device; its count and the dtype of its positions may differ.
    """
    own, other = shared(a.positions, b.positions)
    left, right = a.values[own].double(), b.values[other].double()
    return Overlap(
        shared=len(left),
        only_a=len(a.positions) - len(left),
        only_b=len(b.positions) - len(left),
        conflicts=int((left.sign() * right.sign() < 0).sum()),
        product=float(left @ right),
        square_a=float(left @ left),
        square_b=float(right @ right),
    )


def total(overlaps: Iterable[Overlap]) -> Overlap:
    """The overlap of several weights together."""
    every = list(overlaps)
    return Overlap(**{field.name: sum(getattr(one, field.name) for one in every) for field in fields(Overlap)})


def diff(a: str | Path, b: str | Path) -> dict[str, Overlap]:
    """Compare two saved adapters, one module at a time and without their base.

    Args:
        a: folder or Hub id of a saved Dowser adapter.
        b: folder or Hub id of another one, for weights of the same shapes.

    Returns:
        The overlap by module, for every module that either adapts.

    Raises:
        DeltaFormatError: a file is damaged, or has no manifest, which alone tells the shapes.
        ValueError: one of them is no Dowser adapter, or they are for weights of other shapes.
        OSError: an adapter cannot be found.
    """
    with ExitStack() as files:
        first, second = open_adapter(str(a), files), open_adapter(str(b), files)
        shapes_a, shapes_b = first.shapes(), second.shapes()
        _check_same(first.name, shapes_a, second.name, shapes_b)
        shapes = shapes_a | shapes_b
        return {name: _compare(name, math.prod(shapes[name]), first, second) for name in sorted(shapes)}


def _compare(module: str, numel: int, a: SavedAdapter, b: SavedAdapter) -> Overlap:
    if module not in a.counts:
        return Overlap(only_b=b.counts[module])
    if module not in b.counts:
        return Overlap(only_a=a.counts[module])
    return overlap(Delta(*a.delta(module, numel)), Delta(*b.delta(module, numel)))


def _check_same(
    name_a: str, shapes_a: dict[str, tuple[int, ...]], name_b: str, shapes_b: dict[str, tuple[int, ...]]
) -> None:
    common = [module for module in shapes_a if module in shapes_b]
    if not common:
        first, second = quoted(next(iter(shapes_a))), quoted(next(iter(shapes_b)))
        raise ValueError(
            f"'{name_a}' and '{name_b}' have no module in common: the first adapts {first}, the second {second}. They "
            "are for different base models, or for different parts of one."
        )
    if other := [module for module in common if shapes_a[module] != shapes_b[module]]:
        raise ValueError(
            f"'{name_a}' and '{name_b}' are for weights of other shapes in {len(other)} of {len(common)} modules that "
            f"both adapt: {quoted(other[0])} is {shapes_a[other[0]]} in the first and {shapes_b[other[0]]} in the "
            "second. Only adapters of one base model can be compared."
        )
