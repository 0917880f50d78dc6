"""`DowserConfig`: every choice of a Dowser adapter, as plain data that survives JSON."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType

from ._peft import NAME, get_pattern_key
from .card import complete_card
from .delta.codec import DeltaFormatError
from .delta.format import FORMAT, check_manifest, check_readable, few

SCORES = ("dowser", "random", "magnitude", "wanda", "gradient")

# Those that need statistics of the model.
PROBED_SCORES = ("dowser", "wanda", "gradient")

SELECTS = ("low", "high")

SCOPES = ("matrix", "row", "layer", "model")

SAVE_DTYPES = ("float32", "bfloat16", "float16")

BIASES = ("none", "all", "dowser_only")


@dataclass
class DowserConfig(PeftConfig):
    """Configuration of a Dowser adapter (Model-Dowser, arXiv 2602.04509).

    Args:
        update_ratio: rho, the fraction of each target weight that trains, in (0, 1]. Exactly round(rho * n) of the n
            weights of a matrix train.
        ratio_pattern: another ratio in [0, 1] for some modules; keys are module names, their ends or regular
            expressions, as in LoRA's `rank_pattern`. A ratio of 0 freezes the module.
        target_modules: modules to adapt: names or their ends, a regular expression, or "all-linear". None takes the
            linears of the language model: never a vision tower, a connector, an output head or a router.
        exclude_modules: modules to leave out: names or their ends, or a regular expression.
        layers_to_transform: indices of the layers to adapt; not with a regular expression or "all-linear".
        layers_pattern: name of the layer list that the indices refer to; only where `target_modules` is a list.
        last_layers: train only the last L layers of the language model (the paper's L).
        modules_to_save: further modules to train and save as a whole.
        trainable_token_indices: token indices whose embeddings train, or indices by embedding name.
        ensure_weight_tying: adapt a weight that several modules share, such as embeddings and output head, in all of
            them: they get one delta. Without it such a target is refused. As in LoRA it also holds for modules_to_save.
        bias: which biases train: "none", "all" or "dowser_only". Any but "none" changes the base model's biases.
        target_parameters: fused weights of experts to adapt, names or their ends: "mlp.experts.down_proj". Each expert
            is ranked by itself. None are adapted by default.
        score: what ranks the weights: "dowser" (|J| |W| |h|, data-free), "random", "magnitude" (|W|), "wanda"
            (|W| ||h||) or "gradient" (|dL/dW|).
        select: "low" trains the lowest scores and so protects what matters, "high" trains the highest.
        scope: weights are ranked inside each "matrix", each "row", each decoder "layer", or the whole "model".
        num_probes: N, the number of synthetic prompts.
        num_rademacher: R, the number of random projections of the output per prompt.
        probe_length: T, tokens of a prompt; 0 in a saved config whose prompts were given to `probe`.
        probe_batch_size: prompts per batch; None chooses it from the free memory.
        probe_images: image-text models: fraction of the prompts that begin with a noise image.
        statistics: path of saved `ProbeStatistics`; the model is then not probed. They decide on N, R, T, images and
            seed, and a saved adapter tells theirs.
        seed: seed of prompts, projections and random scores. The global generators are neither used nor changed.
        init_weights: False starts from random values instead of zeros, for tests.
        save_dtype: dtype of the values in the saved file: "float32", "bfloat16" or "float16"; None keeps theirs.
            Checkpoints are saved files too: a training that resumes from one goes on with the rounded values.
        nnz_pattern: written by `save_pretrained`: trained weights by module. A config that has it belongs to a saved
            adapter, and loading it never probes. Leave it None.
        manifest: written by `save_pretrained`: format version, digests, and samples of the base, see FORMAT.md. Leave
            it None.

    Raises:
        DeltaFormatError: the config is that of an adapter in a newer format.
        ValueError: one or more values are out of range; the message lists all of them.
    """

    update_ratio: float = 0.1
    ratio_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    last_layers: int | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    bias: str = "none"
    target_parameters: list[str] | None = None
    score: str = "dowser"
    select: str = "low"
    scope: str = "matrix"
    num_probes: int = 64
    num_rademacher: int = 8
    probe_length: int = 64
    probe_batch_size: int | None = None
    probe_images: float = 0.0
    statistics: str | None = None
    seed: int = 0
    init_weights: bool = True
    save_dtype: str | None = None
    nnz_pattern: dict[str, int] | None = None
    manifest: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        # Counts of the adapter that was made or saved last. Unlike `nnz_pattern` it is no field, so that the same
        # config can make a second adapter, which must choose its own weights.
        self._selected: dict[str, int] | None = None
        # The `settings` of that adapter.
        self._chosen_with: dict[str, Any] | None = None
        # Read and filled by PEFT: modules that get the adapter's copy of the embeddings in `modules_to_save`.
        self.modules_to_tie: set[str] | None = None
        # Whether a model has it: the manifest that came with the file is then that of the past.
        self._in_use = False
        # The settings of the probe that the mask comes from, by field, where it comes from one.
        self._probed: dict[str, Any] | None = None
        # Whether it was read from a file that should have counts and has none: no mask is chosen by it.
        self._lacks_counts = False
        # Whether it is being written beside the file of its adapter.
        self._is_saving = False
        # What `ForgettingCallback` measured last.
        self._forgetting: dict[str, float] | None = None
        # The manifest of what was saved last: no field either, for a later save has other values.
        self._written: dict[str, Any] | None = None
        self.check()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def check(self) -> None:
        """Refuse values that make no sense; called again before a model is changed.

        Raises:
            DeltaFormatError: the config is that of an adapter in a newer format.
            ValueError: one or more values are out of range; the message lists all of them.
        """
        if self.manifest is not None:
            # First: what else is wrong may be new in that format.
            try:
                check_manifest(self.manifest)
            except DeltaFormatError as error:
                raise DeltaFormatError(f"DowserConfig: {error}.") from error
        if problems := list(self._problems()):
            raise ValueError("DowserConfig: " + "; ".join(problems) + ".")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the config of a saved adapter, as PEFT does before it touches a model.

        Raises:
            DeltaFormatError: the file with the tensors, where it is in the same folder, is not whole.
        """
        path = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if path.is_file():
            check_readable(path)
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config._lacks_counts = isinstance(config, cls) and config.nnz_pattern is None
        return config

    def settings(self) -> dict[str, Any]:
        """A copy of the values that decide which weights train; PEFT changes others after the choice."""
        others = ("modules_to_save", "save_dtype", "nnz_pattern", "manifest")
        return copy.deepcopy({name: getattr(self, name) for name in DowserConfig.__annotations__ if name not in others})

    @property
    def saved_nnz(self) -> dict[str, int] | None:
        """Trained weights by module: chosen in this process, read from a saved adapter, or not known yet."""
        return self._selected if self._selected is not None else self.nnz_pattern

    @property
    def also_trains(self) -> str | None:
        """What the adapter trains besides its sparse deltas, if anything."""
        if self.modules_to_save:
            return f"modules_to_save={sorted(self.modules_to_save)}"
        if self.trainable_token_indices:
            return "trainable_token_indices"
        return None if self.bias == "none" else f"bias='{self.bias}'"

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data: sets become sorted lists, a chosen mask adds its `nnz_pattern` and tells how it was
        probed for, a save adds its `manifest`."""
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
        if self.modules_to_save:  # PEFT adds the head of the task once more at every load
            plain["modules_to_save"] = list(dict.fromkeys(self.modules_to_save))
        if self.saved_nnz is not None:
            # The mask is in the file from now on; the statistics that it came from stay on this machine.
            plain["nnz_pattern"] = dict(self.saved_nnz)
            plain["statistics"] = None
        if self._probed is not None:
            plain |= self._probed
        if self._in_use:
            # Only beside the file that it describes: programs that write the config first, or alone, have an older one.
            plain["manifest"] = self._written if self._is_saving else None
        return plain

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config as PEFT does, but whole or not at all, and complete the model card beside it.

        What a save that was killed has left in the folder is named in a warning.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if left := sorted(path.name for pattern in (".config-*", ".tmp*") for path in folder.glob(pattern)):
            warnings.warn(
                f"'{folder}' has {few(left)}: left by a save that was killed, unless another process is saving there. "
                "Delete it.",
                UserWarning,
                stacklevel=2,
            )
        with TemporaryDirectory(prefix=".config-", dir=folder) as work:
            self._is_saving = True
            try:
                super().save_pretrained(work, **kwargs)
            finally:
                self._is_saving = False
            (Path(work) / CONFIG_NAME).replace(folder / CONFIG_NAME)
        self.complete_card(folder)

    def complete_card(self, folder: Path) -> None:
        """Put on top of the model card in a folder how the adapter is loaded and what it is."""
        made = vars(self) | (self._probed or {})
        length = f"T = {made['probe_length']}" if made["probe_length"] else "prompts that were given"
        probe = f"N = {made['num_probes']}, R = {made['num_rademacher']}, {length}"
        measured = self._forgetting or {}
        facts = {
            "base model": self.base_model_name_or_path or "",
            "trained weights": f"{sum(self.saved_nnz.values()):,}" if self.saved_nnz else "",
            "update ratio": f"{self.update_ratio:g}",
            "chosen by": f"score {self.score}, the {'lowest' if self.select == 'low' else 'highest'} by {self.scope}",
            "probe": probe if self.score in PROBED_SCORES else "",
            "seed": str(made["seed"]),
            "format": str(FORMAT),
            "measured in training": ", ".join(f"{name} {value:.4g}" for name, value in measured.items()),
        }
        complete_card(folder, self.task_type, facts)

    def _problems(self) -> Iterator[str]:
        """Everything that is wrong with the values, one clause each."""
        yield from _outside("update_ratio", self.update_ratio, 0, 1, open_low=True)
        if _is_map(self.ratio_pattern):
            for key, ratio in self.ratio_pattern.items():
                yield from _outside(f"ratio_pattern[{key!r}]", ratio, 0, 1)
                yield from _no_expression(f"the key {key!r} of ratio_pattern", key)
        else:
            yield f"ratio_pattern must map module names to ratios, got {self.ratio_pattern!r}"
        if self.nnz_pattern is not None and not _is_map(self.nnz_pattern):
            yield f"nnz_pattern must map module names to counts, got {self.nnz_pattern!r}"
        yield from _outside("probe_images", self.probe_images, 0, 1)
        yield from _not_one_of("score", self.score, SCORES)
        yield from _not_one_of("select", self.select, SELECTS)
        yield from _not_one_of("scope", self.scope, SCOPES)
        yield from _not_one_of("bias", self.bias, BIASES)
        if self.save_dtype is not None:
            yield from _not_one_of("save_dtype", self.save_dtype, SAVE_DTYPES)
        yield from _not_an_integer("num_probes", self.num_probes, at_least=1)
        yield from _not_an_integer("num_rademacher", self.num_rademacher, at_least=1)
        # In a saved config 0 says that the prompts were given, see `ProbeInfo`.
        yield from _not_an_integer("probe_length", self.probe_length, at_least=2 if self.nnz_pattern is None else 0)
        yield from _not_an_integer("seed", self.seed, at_least=0)
        for name in ("probe_batch_size", "last_layers"):
            if getattr(self, name) is not None:
                yield from _not_an_integer(name, getattr(self, name), at_least=1)
        for name in ("init_weights", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name} must be True or False, got {getattr(self, name)!r}"
        if self.statistics is not None and not isinstance(self.statistics, str):
            yield f"statistics must be the path of a file, got {self.statistics!r}"
        yield from self._target_problems()

    def _target_problems(self) -> Iterator[str]:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or _is_list(value, str)):
                yield f"{name} must be a string or a list of strings, got {value!r}"
            if isinstance(value, str):
                yield from _no_expression(name, value)
        for name, kind in (("modules_to_save", "module"), ("target_parameters", "parameter")):
            value = getattr(self, name)
            if not (value is None or (_is_list(value, str) and all(value))):
                yield f"{name} must be a list of {kind} names, got {value!r}"
        layers, tokens = self.layers_to_transform, self.trainable_token_indices
        if not (layers is None or _is_index(layers) or _is_list(layers, int)):
            yield f"layers_to_transform must be an index or a list of indices, got {layers!r}"
        lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
        if not (tokens is None or all(_is_list(indices, int) for indices in lists)):
            yield f"trainable_token_indices must be a list of indices, or such lists by module name, got {tokens!r}"
        if isinstance(self.target_modules, str) and layers is not None:
            yield "layers_to_transform needs target_modules as a list, got the string " + repr(self.target_modules)
        if self.layers_pattern and layers is None:
            yield "layers_pattern needs layers_to_transform"
        elif self.layers_pattern and self.target_modules is None:
            yield "layers_pattern needs target_modules as a list"
        if self.last_layers is not None and layers is not None:
            yield "last_layers and layers_to_transform exclude each other"


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list | set) and all(
        isinstance(entry, kind) and not isinstance(entry, bool) for entry in value
    )


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _no_expression(name: str, value: str) -> Iterator[str]:
    try:
        re.compile(value)
    except re.error as error:
        yield f"{name} must be a regular expression, got {value!r} ({error})"


def _outside(name: str, value: Any, low: float, high: float, open_low: bool = False) -> Iterator[str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (open_low and value == low):
        yield f"{name} must be a number in {'(' if open_low else '['}{low}, {high}], got {value!r}"


def _not_one_of(name: str, value: Any, known: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(value, str) or value not in known:
        yield f"{name} must be one of {', '.join(known)}, got {value!r}"


def _not_an_integer(name: str, value: Any, at_least: int) -> Iterator[str]:
    if not _is_index(value) or value < at_least:
        yield f"{name} must be an integer of at least {at_least}, got {value!r}"


def ratio_of(name: str, config: DowserConfig) -> float:
    """The update ratio of a target."""
    key = get_pattern_key(list(config.ratio_pattern), name)
    return config.ratio_pattern.get(key, config.update_ratio)
