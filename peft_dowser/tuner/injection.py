"""`Injection`: the adapter that is just being added to a model, be it new, saved, or a twin of another one."""

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn

from .._peft import bare_base
from ..base.distributed import check_not_sharded, on_every_rank, rank
from ..base.search import fused_parameters, resolve_targets
from ..base.storage import check_materialized
from ..base.target import Target, layouts_of
from ..config import PROBED_SCORES, AdapterRecord, DowserConfig
from ..delta.codec import DeltaFormatError
from ..delta.format import counts_in, is_delta
from ..files.checks import check_fits, warn_of_other_base
from ..layers.layer import DowserLayer, dowser_layers, layers_with_adapter
from ..probing.run import probe_targets
from ..probing.selection import choose_masks, same_on_all_ranks
from ..probing.settings import ProbeSettings
from ..probing.statistics import ProbeStatistics
from .loading import Load, current_load
from .merging import check_unmerged
from .messages import (
    report_bare_experts,
    report_other_probe,
    report_read,
    report_selection,
    report_unmatched_ratios,
    warn_of_other_weights,
)
from .snapshot import Snapshot
from .whole_tensors import check_whole_modules

# By task, the heads that PEFT trains as a whole. It adds them to `modules_to_save` only after the adapter is made.
_LATE_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass
class Injection:
    """What is known of an adapter while it is added, and forgotten when it is there.

    Attributes:
        config: the caller's object, which PEFT goes on to change.
        snapshot: what the model was before.
        twin: the adapter that has the same config, and so the same positions; TRL makes its reference model this way.
        counts: trained weights by module of a saved adapter, whose file is read later.
        targets: the weights that its config targets, by name, once they are found.
        masks: flat positions, or numbers of input channels, by module of an adapter that is not saved, once they are
            known.
        samples: `base_sample` by module, where they had to be read.
    """

    adapter_name: str
    config: DowserConfig
    snapshot: Snapshot
    twin: str | None = None
    counts: Mapping[str, int] | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Mapping[str, str | None] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        adapter_name: str,
        configs: Mapping[str, DowserConfig],
        state_dict: Mapping[str, Tensor] | None,
    ) -> "Injection":
        """Begin to add an adapter; `state_dict` has the tensors of a saved one, where PEFT was given some."""
        config, snapshot = configs[adapter_name], Snapshot(model, adapter_name)
        twin = next((name for name, given in configs.items() if given is config and name != adapter_name), None)
        # A new adapter is meant where the caller has changed the config since.
        if twin is not None and (config.nnz_pattern is not None or config.settings() == config.record.settings):
            return cls(adapter_name, config, snapshot, twin)
        counts = config.nnz_pattern if state_dict is None else counts_in(state_dict)
        load = current_load()
        if counts is None and (load is not None or config.lacks_counts):
            counts = _counts_beside(load, adapter_name)
        config.record = AdapterRecord(in_use=True, counts=counts)
        return cls(adapter_name, config, snapshot, counts=counts)

    def prepare(self, model: nn.Module) -> None:
        """Find the targets, and decide what the adapter has at each; the model stays as it is."""
        is_new = self.twin is None and self.counts is None
        self.config.check()
        check_whole_modules(model, self.config)
        _check_base_unmerged(model, is_new)
        check_not_sharded(model)
        self.targets = resolve_targets(model, self.config)
        _check_not_nested(model, self.targets)
        by_default = self.config.target_modules is None
        self._name_targets()
        if is_new:
            self._choose(model, by_default)
        elif self.counts is not None:
            self._check_saved(model, self.counts)
        else:
            twin = cast(str, self.twin)
            layers = layers_with_adapter(model, twin).values()
            self.masks = {layer.module_name: layer.index(twin).decoded().clone() for layer in layers}

    @property
    def fused(self) -> list[str]:
        return [name for name, target in self.targets.items() if target.kind == "fused"]

    def _name_targets(self) -> None:
        """Put into the config the targets that PEFT would not find by itself."""
        config, fused = self.config, self.fused
        has_ties = any(target.tied for target in self.targets.values())
        if config.ensure_weight_tying and not (has_ties or config.modules_to_save):
            warnings.warn(
                "ensure_weight_tying=True has no effect: no target shares its weight with another module.", stacklevel=2
            )
        config.ensure_weight_tying |= has_ties  # among the default targets nobody has to ask for it
        by_kind = config.target_modules is None or str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        if by_kind or has_ties or config.last_layers is not None:
            config.target_modules = set(self.targets) - set(fused)
        if config.last_layers is not None:
            config.target_parameters = fused or None

    def adapts(self, name: str) -> bool:
        return name in (self.masks if self.counts is None else self.counts)

    def add_to(self, layer: DowserLayer, active: list[str]) -> None:
        """Add the adapter to a layer that it `adapts`; `active` are the adapters that are to be active."""
        module, manifest = layer.module_name, self.config.manifest
        if self.counts is None:
            config = self.config
            layer.add_positions(self.adapter_name, self.masks[module], config.granularity, config.init_weights)
        else:
            known = manifest["modules"][module]["code_sha256"] if manifest else None
            layer.add_placeholder(self.adapter_name, self.counts[module], self.config.granularity, known)
        layer.set_adapter(active, inference_mode=self.config.inference_mode)

    def _read_samples(self, model: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
        """Samples of base weights by name. A layer that has an adapter may be merged, so it keeps the sample."""
        known = {layer.module_name: layer.base_sample for layer in dowser_layers(model)}
        return {name: known[name] if name in known else self.targets[name].base_sample() for name in names}

    def _check_saved(self, model: nn.Module, counts: Mapping[str, int]) -> None:
        where, manifest = f"Adapter '{self.adapter_name}'", self.config.manifest
        check_fits(counts, layouts_of(self.targets, self.config.granularity), manifest, where)
        report_read(model, counts, self.adapter_name)
        if manifest is not None:
            self.samples = self._read_samples(model, counts)
            warn_of_other_base(manifest, self.samples, where)

    def _choose(self, model: nn.Module, by_default: bool) -> None:
        started = time.perf_counter()
        with bare_base(model):
            statistics = self._statistics(model)
            granularity = self.config.granularity
            self.masks = same_on_all_ranks(lambda: self._chosen_masks(model, statistics), self.targets, granularity)
        layouts = layouts_of(self.targets, granularity)
        counts = {name: mask.numel() * layouts[name].group for name, mask in self.masks.items()}
        probe = None if statistics is None else statistics.info.settings()
        self.config.record = replace(self.config.record, counts=counts, probe=probe)
        report_unmatched_ratios(self.config, self.targets)
        if by_default and not self.fused:
            report_bare_experts(fused_parameters(model))
        report_selection(self.masks, counts, self.targets, time.perf_counter() - started)

    def _statistics(self, model: nn.Module) -> ProbeStatistics | None:
        if self.config.score not in PROBED_SCORES:
            return None
        path = self.config.statistics
        if path is None:
            return probe_targets(model, self.targets, ProbeSettings.of(self.config))
        place = _prefix_of_base(model)
        # Rank 0 chooses.
        return on_every_rank(lambda: ProbeStatistics.load(path).named_as(self.targets, place) if rank() == 0 else None)

    def _chosen_masks(self, model: nn.Module, statistics: ProbeStatistics | None) -> dict[str, Tensor]:
        check_materialized(model)
        masks = choose_masks(self.targets, self.config, statistics)
        if statistics is not None and self.config.statistics is not None:
            report_other_probe(self.config, statistics.info)
            warn_of_other_weights(statistics, self._read_samples(model, self.targets), self.config.statistics)
        return masks


def prepare_for_task(model: nn.Module, config: DowserConfig) -> None:
    """Do before an adapter is made what PEFT does after it: check what the task needs, and list its head as whole."""
    if config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM) and not hasattr(
        model, "prepare_inputs_for_generation"
    ):
        raise ValueError(
            f"task_type='{config.task_type}' is for models that write text, and {type(model).__name__} does not. Set "
            "the task_type of its head (SEQ_CLS, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION), or leave it out."
        )
    if heads := _LATE_HEADS.get(config.task_type or ""):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))


def _counts_beside(load: Load | None, adapter_name: str) -> dict[str, int]:
    """The counts of a saved adapter whose config has none, from the config in the folder of its file.

    Where there are none, no mask is chosen instead, or a stranger would decide what is probed, how long, and which
    files are read for it.
    """
    if load is None or load.counts is None:
        raise DeltaFormatError(
            f"Adapter '{adapter_name}': its config came from a file, but has no nnz_pattern, so nothing tells which "
            "weights it trains. adapter_config.json was edited, or does not belong to a saved adapter. To make a new "
            "adapter, make a new DowserConfig."
        )
    return dict(load.counts)


def check_adapter_name(adapter_name: str) -> None:
    """Refuse a name that torch cannot give a module, or that looks like a part of a delta in the name of a tensor."""
    taken = hasattr(nn.ModuleDict(), adapter_name) or is_delta(f".{adapter_name}.")
    if not adapter_name or "." in adapter_name or taken:
        raise ValueError(
            f"'{adapter_name}' cannot be the name of an adapter: torch keeps an adapter's tensors under it, so it must "
            "not be empty, contain a dot, or be the name of an attribute that every module has. Choose another name."
        )


def _check_base_unmerged(model: nn.Module, is_new: bool) -> None:
    """Refuse a base with merged adapters: its weights would be scored, or kept as rows of tokens.

    For a saved adapter, or a twin, PEFT unmerges our layers.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and (is_new or not isinstance(module, DowserLayer))
    ]
    check_unmerged(layers, "adding an adapter")


def _prefix_of_base(model: nn.Module) -> str:
    """The name of the base in a transformers model with a head; "" for the base itself."""
    place = getattr(model, "base_model_prefix", "")
    return place if isinstance(getattr(model, place, None), nn.Module) else ""


def _check_not_nested(model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Refuse layers that another PEFT method has adapted: what that method adds would be left out silently."""
    others = {
        id(layer.get_base_layer()): type(layer)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, DowserLayer)
    }
    nested = [name for name, target in targets.items() if id(target.module) in others]
    if nested:
        kind = others[id(targets[nested[0]].module)]
        raise ValueError(
            f"{len(nested)} of the target modules are adapted by another PEFT method already, such as '{nested[0]}' by "
            f"{kind.__module__}.{kind.__name__}. Merge that adapter into the base first (merge_and_unload), or leave "
            "its modules out of target_modules."
        )
