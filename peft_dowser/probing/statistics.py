"""The result of a probe: two thin factors per weight matrix, from which masks of any ratio are chosen."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..delta.format import few, is_sample, printable, quoted, unlike_samples
from ..delta.safe_files import write_tensors

_FORMAT = "peft_dowser.statistics"

_VERSION = 1


@dataclass
class ModuleStatistics:
    """Statistics of one linear module over `N` probes, float32, on the CPU.

    Attributes:
        sensitivity: mean over the Rademacher vectors and the real tokens of |d(xi^T f)/dz_i|, shape `(N, out)`: the
            ||J_i|| of Eq. 5, up to a constant; None where the probe ran forwards only.
        activity: mean over the real tokens of |h_j|, shape `(N, in)`.
        energy: sum over all probes and real tokens of h_j squared, shape `(in,)` (the norm that Wanda uses).
        gradient: gradient of the probes' mean next-token loss, shape `(out, in)`; only for `score="gradient"`.
    """

    sensitivity: Tensor | None
    activity: Tensor
    energy: Tensor
    gradient: Tensor | None = None

    def of_prompts(self, numbers: Sequence[int]) -> "ModuleStatistics":
        """The statistics with the rows of these prompts only."""
        sensitivity = None if self.sensitivity is None else self.sensitivity[numbers]
        return replace(self, sensitivity=sensitivity, activity=self.activity[numbers])


@dataclass
class ProbeInfo:
    """How statistics were made, as their file tells it.

    Attributes:
        base_model: name or path of the probed model, "" where it has none.
        num_probes: N, the number of prompts.
        num_rademacher: R, the number of random projections of the output per prompt; 0 where the probe ran forwards
            only, and no module has a sensitivity.
        probe_length: T, the tokens of a synthetic prompt; 0 where the caller passed the prompts.
        probe_images: fraction of the prompts that begin with a noise image.
        seed: seed of prompts and projections.
    """

    base_model: str
    num_probes: int
    num_rademacher: int
    probe_length: int
    probe_images: float
    seed: int

    def settings(self) -> dict[str, Any]:
        """Values of the fields of a `DowserConfig` that say how to probe like this."""
        return {name: value for name, value in vars(self).items() if name != "base_model"}


@dataclass
class ProbeStatistics:
    """The result of `probe`: one `ModuleStatistics` per module that the probes reached.

    Attributes:
        modules: statistics by module name, relative to the base model; of an expert by the name of the fused parameter
            and its number: "model.layers.0.mlp.experts.down_proj[3]".
        info: how they were made.
        samples: a few entries of every probed weight (`delta.format.base_sample`), by the name of the module or of the
            fused parameter; they tell this base from others of the same shapes. None for a quantized weight.
    """

    modules: dict[str, ModuleStatistics]
    info: ProbeInfo
    samples: dict[str, str | None] = field(default_factory=dict)

    def __repr__(self) -> str:
        info = self.info
        tensors = [tensor for module in self.modules.values() for tensor in vars(module).values() if tensor is not None]
        return (
            f"ProbeStatistics({len(self.modules)} modules, N={info.num_probes}, R={info.num_rademacher}, "
            f"T={info.probe_length}, seed={info.seed}, {sum(tensor.nbytes for tensor in tensors) / 1e6:.1f} MB)"
        )

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {
            f"{name}:{part}": tensor.contiguous()
            for name, module in self.modules.items()
            for part, tensor in vars(module).items()
            if tensor is not None
        }
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "info": json.dumps(asdict(self.info)),
            "samples": json.dumps(self.samples),
        }
        write_tensors(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "ProbeStatistics":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a statistics file of a known version, is incomplete, or holds values that no
                probe can give.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No probe statistics at '{path}'.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                _check_version(metadata, path)
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"'{path}' is not a readable safetensors file ({printable(str(error))}).") from error
        fields: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(":")
            fields.setdefault(name, {})[part] = tensor
        try:
            info = ProbeInfo(**json.loads(metadata["info"]))
            # R = 0 says that there is no sensitivity; a file that lacks one otherwise is not whole.
            absent: dict[str, Any] = {"sensitivity": None} if info.num_rademacher == 0 else {}
            modules = {name: ModuleStatistics(**absent | found) for name, found in fields.items()}
            samples = _samples(json.loads(metadata.get("samples", "{}")))  # early files have none
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"'{path}' lacks a part of the probe statistics ({printable(str(error))}).") from error
        for name, module in modules.items():
            _check_module(name, module, info, path)
        return cls(modules, info, samples)

    def named_as(self, names: Collection[str], own: str) -> "ProbeStatistics":
        """The statistics under the names that another class of the same base gives its modules.

        The layers are at "model.layers" in LlamaForCausalLM, at "layers" in LlamaModel, and at "transformer.layers" in
        LlamaForQuestionAnswering: only the prefix differs.

        Args:
            names: the modules that need statistics.
            own: the prefix of the base in that class, such as "transformer"; "" where the model is the base.

        Raises:
            ValueError: the names fit several parts of the model that was probed, or none.
        """
        known = {name.partition("[")[0] for name in (*self.samples, *self.modules)}
        if not known.isdisjoint(names):
            return self
        start = f"{own}." if own else ""
        bare = {name.removeprefix(start) for name in names}
        parts = [name.split(".") for name in known]
        found = {
            "".join(f"{part}." for part in path[:depth])
            for path in parts
            for depth in range(len(path))
            if ".".join(path[depth:]) in bare
        }
        if len(found) > 1:
            raise ValueError(
                f"The probed model names its modules differently, and '{min(bare)}' and others fit several parts of "
                f"it: {few(sorted(found))}. Choose target_modules that fit one of them, or probe this model."
            )
        if not found:
            raise ValueError(
                f"The probe statistics have none of the {len(names)} target modules, such as '{min(names)}', but "
                f"{few(sorted(known))}. Probe this model, or choose target_modules among these."
            )
        (prefix,) = found

        def renamed(name: str) -> str:
            return start + name.removeprefix(prefix) if name.startswith(prefix) else name

        return replace(
            self,
            modules={renamed(name): module for name, module in self.modules.items()},
            samples={renamed(name): sample for name, sample in self.samples.items()},
        )

    def of_forwards(self) -> "ProbeStatistics":
        """What a probe that ran forwards only would have measured."""
        modules = {name: replace(module, sensitivity=None, gradient=None) for name, module in self.modules.items()}
        return replace(self, modules=modules, info=replace(self.info, num_rademacher=0))

    def unlike(self, samples: Mapping[str, str | None]) -> list[str]:
        """Names of the weights that differ from the probed ones by more than a cast to another float dtype."""
        return unlike_samples(self.samples, samples)


def combined(parts: Sequence[tuple[Sequence[int], ModuleStatistics | None]]) -> ModuleStatistics | None:
    """Join the statistics of one module over parts of the prompts, whose numbers come first in each part.

    The rows of the result are in the order of the numbers. None is a module that no prompt has reached.
    """
    reached = [(numbers, part) for numbers, part in parts if part is not None]
    if not reached:
        return None
    if len(parts) == 1:
        return reached[0][1]
    total = sum(len(numbers) for numbers, _ in parts)
    sensitivities = [(numbers, part.sensitivity) for numbers, part in reached if part.sensitivity is not None]
    gradients = [len(numbers) / total * part.gradient for numbers, part in reached if part.gradient is not None]
    return ModuleStatistics(
        sensitivity=_rows(total, sensitivities) if sensitivities else None,
        activity=_rows(total, [(numbers, part.activity) for numbers, part in reached]),
        energy=torch.stack([part.energy for _, part in reached]).sum(0),
        gradient=torch.stack(gradients).sum(0) if gradients else None,
    )


def _rows(total: int, parts: list[tuple[Sequence[int], Tensor]]) -> Tensor:
    rows = torch.zeros(total, parts[0][1].shape[1], device="cpu")
    for numbers, found in parts:
        rows[list(numbers)] = found
    return rows


def _samples(found: object) -> dict[str, str | None]:
    if not isinstance(found, dict) or not all(text is None or is_sample(text) for text in found.values()):
        raise TypeError("'samples' is not a mapping of names to samples of weights")
    return found


def _check_version(metadata: dict[str, str], path: str | Path) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"'{path}' holds no probe statistics. Write them with ProbeStatistics.save.")
    version = printable(str(metadata.get("version"))[:50])
    if version != str(_VERSION):
        raise ValueError(
            f"'{path}' was written in format {version} of the probe statistics, this release reads "
            f"format {_VERSION}: upgrade peft-dowser, or probe again."
        )


def _check_module(name: str, module: ModuleStatistics, info: ProbeInfo, path: str | Path) -> None:
    where = f"'{path}': the statistics of module {quoted(name)}"
    tensors = {field: tensor for field, tensor in vars(module).items() if tensor is not None}
    if info.num_rademacher == 0 and tensors.keys() != {"activity", "energy"}:
        raise ValueError(f"{where} hold more than forwards measure, but the file says R = 0: forwards only.")
    factors = (module.sensitivity, module.activity)
    out, width = (0 if factor is None or factor.dim() != 2 else factor.shape[-1] for factor in factors)
    shapes = {
        "sensitivity": (info.num_probes, out),
        "activity": (info.num_probes, width),
        "energy": (width,),
        "gradient": (out, width),
    }
    if any(tuple(tensor.shape) != shapes[field] for field, tensor in tensors.items()):
        raise ValueError(f"{where} have shapes that disagree.")
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise ValueError(f"{where} are not float32.")
    if any(bool((tensor < 0).any()) for field, tensor in tensors.items() if field != "gradient"):
        raise ValueError(f"{where} have negative entries, which no probe gives. The file is damaged; probe again.")
