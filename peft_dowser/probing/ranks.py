"""Which ranks of a distributed run take part in a probe, and how their results come together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from ..base.distributed import (
    all_gather,
    broadcast,
    check_gathered_by_module,
    is_sharded_model,
    is_zero3,
    on_every_rank,
    on_one_rank,
    rank,
)
from ..base.storage import check_materialized, on_meta
from .statistics import ModuleStatistics, combined

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of one probe, decided before it begins; one process is a run of one rank.

    Attributes:
        probing_ranks: the ranks that have the weights, and probe.
        count: how many ranks there are.
        in_step: the base is sharded, and all ranks gather its weights together: each must run as many passes as the
            others.
        one_backward: the weights are gathered for one backward after every forward, as by DeepSpeed.
    """

    probing_ranks: Sequence[int]
    count: int
    in_step: bool
    one_backward: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Ranks":
        """Decide who probes: rank 0 alone can where it alone loads the base.

        Raises:
            ValueError: no rank has the weights, or they are sharded in a way that the probe cannot follow.
        """
        in_step = is_sharded_model(model)
        check_gathered_by_module(model)
        missing = all_gather(bool(on_meta(model)))
        able = [number for number, lacks in enumerate(missing) if not lacks]
        on_every_rank(lambda: check_materialized(model) if not able or in_step or rank() in able else None)
        return cls(able, len(missing), in_step, is_zero3(model))

    @property
    def probes(self) -> bool:
        """Whether this rank probes."""
        return rank() in self.probing_ranks

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for those that probe."""
        return rank() == self.probing_ranks[0]

    def share(self, prompts: list[int]) -> list[int]:
        """The prompts that this rank probes."""
        return prompts[self.probing_ranks.index(rank()) :: len(self.probing_ranks)]

    def batch_count(self, prompts: list[int], size: int) -> int:
        """How many batches the rank with the largest share of some prompts runs."""
        return -(-len(prompts) // (size * len(self.probing_ranks)))

    def common_batch_size(self, size: int) -> int:
        """A batch size that all ranks can use where they run in step, and otherwise this rank's own."""
        return min(all_gather(size)) if self.in_step else size

    def one_result(self, work: Callable[[], T]) -> T:
        """Do some work that needs the weights, and hand one result to all ranks; an error is raised on all of them.

        Where they run in step, it is raised where it happens: the others wait in the middle of the work.
        """
        return broadcast(work()) if self.in_step else on_one_rank(self.probing_ranks[0], work)

    def on_every_rank(self, work: Callable[[], T]) -> T:
        """Do some work on every rank; an error is raised on all of them, unless they run in step."""
        return work() if self.in_step else on_every_rank(work)

    def all_statistics(
        self, names: list[str], mine: Sequence[int], found: dict[str, ModuleStatistics]
    ) -> dict[str, ModuleStatistics]:
        """Statistics of all prompts by matrix: what this rank has `found` for its own ones, `mine`, and the others too.

        The names are in one order on every rank; `found` is emptied on the way, so that no two copies of all exist.
        """
        numbers = all_gather(mine)
        wholes = (
            (name, combined(list(zip(numbers, all_gather(found.pop(name, None)), strict=True)))) for name in names
        )
        return {name: whole for name, whole in wholes if whole is not None}
