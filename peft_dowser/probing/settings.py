"""How to probe, as one value that prompts and passes read; the choice of targets and masks stays in the config."""

from dataclasses import dataclass

from ..config import FORWARD_SCORES, DowserConfig


@dataclass(frozen=True)
class ProbeSettings:
    """Everything in a `DowserConfig` that a probe depends on besides its targets; the fields mean what they mean there.

    R, `num_rademacher`, is 0 in a probe of forwards only; `gradient` also keeps the gradient of the next-token loss.
    """

    num_probes: int
    num_rademacher: int
    probe_length: int
    probe_images: float
    seed: int
    batch_size: int | None
    gradient: bool

    @property
    def backward(self) -> bool:
        """Whether anything is measured that needs a graph."""
        return self.num_rademacher > 0 or self.gradient

    @classmethod
    def of(cls, config: DowserConfig) -> "ProbeSettings":
        return cls(
            num_probes=config.num_probes,
            num_rademacher=0 if config.score in FORWARD_SCORES else config.num_rademacher,
            probe_length=config.probe_length,
            probe_images=config.probe_images,
            seed=config.seed,
            batch_size=config.probe_batch_size,
            gradient=config.score == "gradient",
        )
