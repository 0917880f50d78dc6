"""`DowserConfig`: every choice of a Dowser adapter, as plain data that survives JSON."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType

from ._peft import NAME, get_pattern_key
from .card import MEASURED, complete_card
from .delta.codec import DeltaFormatError
from .delta.format import FORMAT, check_manifest, few
from .delta.layout import Granularity, Layout
from .delta.safe_files import open_tensors

Score = Literal["dowser", "shift", "activity", "random", "magnitude", "wanda", "gradient"]
Select = Literal["low", "high"]
Scope = Literal["matrix", "row", "layer", "model"]
Bias = Literal["none", "all", "dowser_only"]
SaveDtype = Literal["float32", "bfloat16", "float16"]

# The scores that need statistics of the model, and the scores among them for which forwards alone measure enough.
PROBED_SCORES = ("dowser", "shift", "activity", "wanda", "gradient")
FORWARD_SCORES = ("activity", "wanda")


@dataclass(frozen=True)
class AdapterRecord:
    """What a config knows of the last adapter that it made, loaded or saved.

    It is never changed, only replaced: a copy of the config, or a caller who takes back what failed, keeps the old one.

    Attributes:
        in_use: whether there is such an adapter. The manifest that came with its file may then be out of date.
        counts: its trained weights by module. The field `nnz_pattern` stays None in the config of a new adapter, so
            that the same config can make a second one, which must choose its own weights.
        settings: the `settings` of the config when the adapter was added.
        probe: the settings of the probe that its mask comes from, by field, if it comes from one.
        manifest: of the tensors that were saved last.
        measured: what `ForgettingCallback` measured last.
    """

    in_use: bool = False
    counts: Mapping[str, int] | None = None
    settings: Mapping[str, Any] | None = None
    probe: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] | None = None
    measured: Mapping[str, float] | None = None


def _option(default: Any, meaning: str) -> Any:
    """A field of the config, with the text that parsers show as its help; a class makes its own default."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


@dataclass
class DowserConfig(PeftConfig):
    """Configuration of a Dowser adapter (Model-Dowser, arXiv 2602.04509).

    The help in the metadata of each field says what the field means.

    Raises:
        DeltaFormatError: the config belongs to an adapter in a newer format.
        ValueError: one or more values are out of range; the message lists all of them.
    """

    update_ratio: float = _option(
        0.1,
        "rho, the fraction of each target weight that trains, in (0, 1]. Exactly round(rho * n) of the n "
        "weights of a matrix train.",
    )
    ratio_pattern: dict[str, float] = _option(
        dict,
        "Another ratio in [0, 1] for some modules. Keys are module names, their ends or regular expressions, as in "
        "LoRA's rank_pattern. A ratio of 0 freezes the module.",
    )
    granularity: Granularity = _option(
        "weight",
        "What is chosen: 'weight', single weights as in the paper, or 'input_channel', all weights that an input "
        "feature of a linear layer is multiplied with: a LoRA adapter whose A is fixed.",
    )
    channels: int | None = _option(
        None,
        "Number of input channels to train in each module, as LoRA's rank r; with granularity='input_channel' in the "
        "place of update_ratio.",
    )
    target_modules: list[str] | set[str] | str | None = _option(
        None,
        "Modules to adapt: names or their ends, a regular expression, or 'all-linear'. None takes the "
        "linear layers of the language model, never those of a vision tower, a connector, an output head or a "
        "router.",
    )
    exclude_modules: list[str] | set[str] | str | None = _option(
        None, "Modules to leave out: names or their ends, or a regular expression."
    )
    layers_to_transform: list[int] | int | None = _option(
        None, "Indices of the layers to adapt; not with a regular expression or 'all-linear'."
    )
    layers_pattern: list[str] | str | None = _option(
        None, "Name of the layer list that layers_to_transform refers to; only where target_modules is a list."
    )
    last_layers: int | None = _option(None, "Train only the last L layers of the language model (the paper's L).")
    modules_to_save: list[str] | None = _option(None, "Further modules to train and save as a whole.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _option(
        None, "Indices of the tokens whose embeddings train, or such indices by embedding name."
    )
    ensure_weight_tying: bool = _option(
        False,
        "Adapt a weight that several modules share, such as embeddings and output head, in all of them, "
        "with one delta. Without it such a target is refused. As in LoRA it also holds for modules_to_save.",
    )
    bias: Bias = _option(
        "none", "Which biases train: 'none', 'all' or 'dowser_only'. Any but 'none' changes the base model's biases."
    )
    target_parameters: list[str] | None = _option(
        None,
        "Fused weights of experts to adapt, names or their ends, such as 'mlp.experts.down_proj'. Each "
        "expert is ranked by itself. None are adapted by default.",
    )
    score: Score = _option(
        "dowser",
        "What ranks the weights: 'dowser' (|J| |W| |h|, data-free), 'shift' (|J| |h|: better than 'dowser' on the "
        "measured language model, worse than 'random' on the image-text model), 'activity' (|h|, the probe runs "
        "forwards only), 'random', 'magnitude' (|W|), 'wanda' (|W| ||h||, forwards only) or 'gradient' (|dL/dW|).",
    )
    select: Select = _option(
        "low",
        "'low' trains the weights with the lowest scores and so protects what matters; 'high' trains the highest.",
    )
    scope: Scope = _option(
        "matrix",
        "Where weights are ranked against each other: in each 'matrix', each 'row', each decoder 'layer' "
        "or the whole 'model'.",
    )
    num_probes: int = _option(64, "N, the number of synthetic prompts.")
    num_rademacher: int = _option(
        8,
        "R, the number of random projections of the output per prompt; not used, and 0 in a saved config, where the "
        "score needs forwards only.",
    )
    probe_length: int = _option(64, "T, tokens per prompt; 0 in a saved config whose prompts were given to probe().")
    probe_batch_size: int | None = _option(None, "Prompts per batch; None chooses it from the free memory.")
    probe_images: float = _option(
        0.0, "For image-text models, the fraction of the prompts that begin with a noise image."
    )
    statistics: str | None = _option(
        None,
        "File written by `peft-dowser probe` or ProbeStatistics.save. The model is then not probed: N, R, "
        "T, images and seed are those of the file, and a saved adapter records them.",
    )
    seed: int = _option(
        0, "Seed of prompts, projections and random scores. The global generators are neither used nor changed."
    )
    init_weights: bool = _option(True, "False starts from random values instead of zeros, for tests.")
    save_dtype: SaveDtype | None = _option(
        None,
        "dtype of the values in the saved file: 'float32', 'bfloat16' or 'float16'; None keeps theirs. "
        "Checkpoints are saved files too: a training that resumes from one continues with the rounded values.",
    )
    nnz_pattern: dict[str, int] | None = _option(
        None,
        "Leave it None; save_pretrained writes it: trained weights by module. A config that has it belongs "
        "to a saved adapter, and loading that never probes.",
    )
    manifest: dict[str, Any] | None = _option(
        None,
        "Leave it None; save_pretrained writes it: format version, digests and samples of the base, see FORMAT.md.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        # None of these is a field, so none is written to a file or compared.
        self.record = AdapterRecord()
        # Whether it was read from a file that should have counts and has none. No mask is chosen by such a config.
        self.lacks_counts = False
        # Read and filled by PEFT: modules that get the adapter's copy of the embeddings in `modules_to_save`.
        self.modules_to_tie: set[str] | None = None
        self.check()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def check(self) -> None:
        """Refuse values as the class says; called again before a model is changed."""
        if self.manifest is not None:
            # First, because other problems may come from a newer format.
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
            DeltaFormatError: the file with the tensors is in the same folder and not whole.
        """
        path = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if path.is_file():
            with ExitStack() as files:
                open_tensors(path, files)
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config.lacks_counts = isinstance(config, cls) and config.nnz_pattern is None
        return config

    def settings(self) -> dict[str, Any]:
        """A copy of the values that decide which weights train; PEFT changes others after the choice."""
        others = ("modules_to_save", "save_dtype", "nnz_pattern", "manifest")
        return copy.deepcopy({name: getattr(self, name) for name in DowserConfig.__annotations__ if name not in others})

    @property
    def saved_nnz(self) -> Mapping[str, int] | None:
        """Trained weights by module: chosen in this process, read from a saved adapter, or not known yet."""
        return self.nnz_pattern if self.record.counts is None else self.record.counts

    @property
    def also_trains(self) -> str | None:
        """What the adapter trains besides its sparse deltas, if anything."""
        if self.modules_to_save:
            return f"modules_to_save={sorted(self.modules_to_save)}"
        if self.trainable_token_indices:
            return "trainable_token_indices"
        return None if self.bias == "none" else f"bias='{self.bias}'"

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data, with sorted lists for sets, and with what the `record` knows of an adapter."""
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
        if self.modules_to_save:  # PEFT adds the head of the task once more at every load
            plain["modules_to_save"] = list(dict.fromkeys(self.modules_to_save))
        if self.saved_nnz is not None:
            # The mask is in the file from now on; the statistics that it came from stay on this machine.
            plain["nnz_pattern"] = dict(self.saved_nnz)
            plain["statistics"] = None
        plain |= self.record.probe or {}
        if self.record.in_use:
            # Only a save knows the manifest: a program that writes the config first, or alone, would write an old one.
            plain["manifest"] = None
        return plain

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config as PEFT does, but whole or not at all, and complete the model card in the folder.

        A warning names what a killed save has left in the folder.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if left := sorted(path.name for pattern in (".config-*", ".tmp*") for path in folder.glob(pattern)):
            warnings.warn(
                f"'{folder}' has {few(left)}: left by a save that was killed, unless another process is saving there. "
                "Delete it.",
                stacklevel=2,
            )
        with TemporaryDirectory(prefix=".config-", dir=folder) as work:
            PeftConfig.save_pretrained(self._as_saved(), work, **kwargs)
            (Path(work) / CONFIG_NAME).replace(folder / CONFIG_NAME)
        self.complete_card(folder)

    def _as_saved(self) -> DowserConfig:
        """The config with the manifest of the file that was saved."""
        saved = copy.copy(self)
        if self.record.in_use:
            saved.record = replace(self.record, in_use=False)
            saved.manifest = None if self.record.manifest is None else dict(self.record.manifest)
        return saved

    def complete_card(self, folder: Path) -> None:
        """Write at the top of the model card in a folder how the adapter is loaded and what it is."""
        made = vars(self) | dict(self.record.probe or {})
        length = f"T = {made['probe_length']}" if made["probe_length"] else "prompts that were given"
        passes = f"R = {made['num_rademacher']}" if made["num_rademacher"] else "forwards only"
        probe = f"N = {made['num_probes']}, {passes}, {length}"
        measured = self.record.measured or {}
        facts = {
            "base model": self.base_model_name_or_path or "",
            "trained weights": f"{sum(self.saved_nnz.values()):,}" if self.saved_nnz else "",
            "trains": self._trains(),
            "chosen by": f"score {self.score}, the {'lowest' if self.select == 'low' else 'highest'} by {self.scope}",
            "probe": probe if self.score in PROBED_SCORES else "",
            "seed": str(made["seed"]),
            "format": str(FORMAT),
            MEASURED: ", ".join(f"{name} {value:.4g}" for name, value in measured.items()),
        }
        complete_card(folder, self.task_type, facts)

    def _trains(self) -> str:
        """What trains in a module, in a few words."""
        if self.channels is not None:
            return f"{self.channels} input channels of each module"
        what = "single weights" if self.granularity == "weight" else "input channels"
        return f"{self.update_ratio:g} of the {what}"

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
        choices = {"granularity": Granularity, "score": Score, "select": Select, "scope": Scope, "bias": Bias}
        for name, known in choices.items():
            yield from _not_one_of(name, getattr(self, name), get_args(known))
        if self.save_dtype is not None:
            yield from _not_one_of("save_dtype", self.save_dtype, get_args(SaveDtype))
        yield from _not_an_integer("num_probes", self.num_probes, at_least=1)
        least = 0 if self.score in FORWARD_SCORES else 1
        yield from _not_an_integer("num_rademacher", self.num_rademacher, at_least=least)
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
        yield from self._channel_problems()
        yield from self._target_problems()

    def _channel_problems(self) -> Iterator[str]:
        if self.granularity == "input_channel" and self.scope == "row":
            yield (
                "scope='row' ranks the weights of each row, and granularity='input_channel' has none to rank: take "
                "'matrix'"
            )
        if self.channels is not None:
            wrong = list(_not_an_integer("channels", self.channels, at_least=1))
            yield from wrong
            if not wrong and self.granularity != "input_channel":
                yield (
                    f"channels={self.channels} needs granularity='input_channel'; for single weights there is "
                    "update_ratio"
                )
            elif self.update_ratio != type(self).update_ratio:
                yield (
                    f"channels={self.channels} and update_ratio={self.update_ratio} both say how much of a module "
                    "trains; give one of them, or a ratio_pattern for single modules"
                )

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
        if not (layers is None or _is(layers, int) or _is_list(layers, int)):
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


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; a bool is not a number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list | set) and all(_is(entry, kind) for entry in value)


def _no_expression(name: str, value: str) -> Iterator[str]:
    try:
        re.compile(value)
    except re.error as error:
        yield f"{name} must be a regular expression, got {value!r} ({error})"


def _outside(name: str, value: Any, low: float, high: float, open_low: bool = False) -> Iterator[str]:
    if not _is(value, int | float) or not low <= value <= high or (open_low and value == low):
        yield f"{name} must be a number in {'(' if open_low else '['}{low}, {high}], got {value!r}"


def _not_one_of(name: str, value: Any, known: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(value, str) or value not in known:
        yield f"{name} must be one of {', '.join(known)}, got {value!r}"


def _not_an_integer(name: str, value: Any, at_least: int) -> Iterator[str]:
    if not _is(value, int) or value < at_least:
        yield f"{name} must be an integer of at least {at_least}, got {value!r}"


def ratio_of(name: str, config: DowserConfig) -> float:
    """The update ratio of a target."""
    return config.ratio_pattern.get(_pattern_of(name, config), config.update_ratio)


def unrounded_count(name: str, layout: Layout, config: DowserConfig) -> float:
    """How many positions of a target are to train, before it is rounded.

    Raises:
        ValueError: it has fewer input channels than are to train.
    """
    if config.channels is None or _pattern_of(name, config) in config.ratio_pattern:
        return ratio_of(name, config) * layout.size
    if config.channels > layout.size:
        raise ValueError(
            f"channels={config.channels}, but module '{name}' has only {layout.size} input channels. Use fewer, or "
            "give the module a ratio of its own in ratio_pattern."
        )
    return config.channels


def _pattern_of(name: str, config: DowserConfig) -> str:
    """The key of `ratio_pattern` that matches a target; its name, where none does."""
    return get_pattern_key(list(config.ratio_pattern), name)
