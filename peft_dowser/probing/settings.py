"""How to probe, as one value that prompts and passes read; the choice of targets and masks stays in the config."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import DowserConfig


@dataclass(frozen=True)
class ProbeSettings:
    """Everything in a `DowserConfig` that a probe depends on besides its targets.

    Attributes:
        num_probes: N, the number of synthetic prompts.
        num_rademacher: R, the number of random projections of the output per prompt.
        probe_length: T, the tokens of a synthetic prompt.
        probe_images: fraction of the prompts that begin with a noise image.
        seed: seed of prompts and projections.
        batch_size: prompts per batch; None chooses it from the free memory.
        gradient: also keep the gradient of the next-token loss.
    """

    num_probes: int
    num_rademacher: int
    probe_length: int
    probe_images: float
    seed: int
    batch_size: int | None
    gradient: bool

    @classmethod
    def of(cls, config: "DowserConfig") -> "ProbeSettings":
        return cls(
            num_probes=config.num_probes,
            num_rademacher=config.num_rademacher,
            probe_length=config.probe_length,
            probe_images=config.probe_images,
            seed=config.seed,
            batch_size=config.probe_batch_size,
            gradient=config.score == "gradient",
        )
