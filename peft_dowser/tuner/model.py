"""`DowserModel`: the tuner that PEFT calls. Wiring only; the method lives in the other rooms."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .._peft import _get_submodules, _set_adapter, check_target_module_exists
from ..base.compiled import uncompiled, uncompiled_name
from ..base.search import check_is_base
from ..config import DowserConfig
from ..delta.apply import report_vanished
from ..delta.arithmetic import CombinationType, SignMethod
from ..delta.codec import encode
from ..delta.format import PREFIX
from ..layers.experts import Experts, FusedParameter
from ..layers.kinds import layer_for
from ..layers.layer import DowserLayer, dowser_layers, layers_with_adapter
from ..layers.state import Values
from ..layers.tied import Tied
from .combining import check_sources, combined_config, combined_deltas
from .injection import Injection, check_adapter_name, prepare_for_task
from .loading import current_load, read_file, set_positions
from .merging import briefly_merged, note_merged_everywhere, prepare_merge, report_not_finite, unmerge_everywhere
from .messages import report_untrained
from .mixed_batch import check_names, mixed_batch
from .saving import (
    check_unmerged_embeddings,
    completed_selection,
    leave_positions_to_us,
    own_biases,
    report_scale,
    saved_manifest,
    under_model_names,
)
from .snapshot import differ
from .whole_tensors import whole_tensors_in_model

logger = logging.getLogger(__name__)


class DowserModel(BaseTuner):
    """A model with sparse deltas on its linear layers (Model-Dowser, arXiv 2602.04509).

    Made by `get_peft_model(model, DowserConfig(...))`. A new adapter probes the model and chooses its mask before any
    module is replaced; a loaded one takes its mask from the file.
    """

    peft_config: dict[str, DowserConfig]
    _injection: Injection  # while an adapter is added
    _mixes = False  # whether a batch that mixes adapters is under way
    prefix = "dowser_"
    tuner_layer_cls = DowserLayer
    # Empty: the default targets are found in the structure of the model, see `base.default_targets`.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        check_is_base(model)
        if isinstance(peft_config, dict):  # a `PeftModel` is being made
            prepare_for_task(model, cast(DowserConfig, peft_config[adapter_name]))
        # In a tuple, which hides it from torch: PEFT looks for modules and tensors under their usual names.
        self._compiled = () if uncompiled(model) is model else (model,)
        super().__init__(uncompiled(model), peft_config, adapter_name, low_cpu_mem_usage, state_dict)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the model, compiled where the model was so when it was adapted."""
        model = self._compiled[0] if self._compiled else self.model
        return model.forward(*args, **kwargs)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        return check_target_module_exists(peft_config, uncompiled_name(key))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config = self.peft_config[adapter_name]
        before = dict(vars(config))
        self._injection = Injection.begin(model, adapter_name, self.peft_config, state_dict)
        is_new = not layers_with_adapter(model, adapter_name)
        if is_new and (load := current_load()) is not None:
            load.snapshots.append(self._injection.snapshot)
        try:
            check_adapter_name(adapter_name)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            leave_positions_to_us(model)
            config.record = replace(config.record, settings=config.settings())
            if not config.inference_mode:
                report_untrained(list(layers_with_adapter(model, adapter_name).values()), adapter_name)
        except BaseException:
            vars(config).update(before)
            self.peft_config.pop(adapter_name, None)
            if is_new:
                self._injection.snapshot.restore()
            raise
        finally:
            del self._injection

    def _prepare_adapter_config(self, peft_config: DowserConfig, model_config: dict) -> DowserConfig:
        return peft_config

    def _prepare_model(self, peft_config: DowserConfig, model: nn.Module) -> None:
        # All checks of the config have passed by now, and no module is replaced yet.
        self._injection.prepare(model)

    def _create_and_replace(
        self,
        peft_config: DowserConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        current_key = uncompiled_name(current_key)
        if isinstance(target, FusedParameter) or not self._injection.adapts(current_key):
            return
        if isinstance(target, DowserLayer):
            self._injection.add_to(target, self.active_adapters)
            return
        found, samples = self._injection.targets[current_key], self._injection.samples
        layer = layer_for(found, samples.get(found.name))
        self._injection.add_to(layer, self.active_adapters)
        # Not `_replace_module`, which moves positions to the meta device along with weights yet to come.
        setattr(parent, target_name, layer)
        for use in found.tied:
            path, _, name = use.name.rpartition(".")
            setattr(self.model.get_submodule(path), name, Tied(layer, layer_for(use, samples.get(use.name))))

    def _check_tied_modules(self, model: nn.Module, peft_config: DowserConfig) -> None:
        # `resolve_targets` finds tied targets by their weights; PEFT looks for the names of embeddings.
        if peft_config.modules_to_save or not peft_config.ensure_weight_tying:
            super()._check_tied_modules(model, peft_config)

    def _add_targets_to_tie(self, peft_config: DowserConfig, tied_weight_keys: list[str]) -> None:
        pass  # see `_check_tied_modules`

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # PEFT would warn of merging them, which is exact here

    def _add_modules_to_save_to_tie(self, peft_config: DowserConfig, tied_weight_keys: list[str]) -> None:
        """Save the embeddings once, and let the modules that are tied to them use that copy."""
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        others = [
            module
            for module in peft_config.modules_to_save or []
            if not any(f".{key}".endswith(f".{module}") for key in (name, *tied_weight_keys))
        ]
        peft_config.modules_to_save = [name, *others]
        peft_config.modules_to_tie = set(tied_weight_keys)

    def _inject_parameters(
        self, peft_config: DowserConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Wrap the modules of fused parameters; PEFT's own method would nest one wrapper per parameter."""
        fused = self._injection.fused
        for name in fused:
            parent, module, child_name = _get_submodules(model, name.rpartition(".")[0])
            experts = module if isinstance(module, Experts) else Experts(module)
            if self._injection.adapts(name):
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    layer = experts.layer_for(self._injection.targets[name], self._injection.samples.get(name))
                    self._injection.add_to(layer, self.active_adapters)
                setattr(parent, child_name, experts)
        return fused

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also gives it the weight of the child, which some of our layers lack, or hold as a plain tensor.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        check_names(self.model, names, self.peft_config)
        beams = kwargs.get("num_beams") or 1
        with mixed_batch(self.model, [name for name in names for _ in range(beams)]):
            self._mixes = True
            try:
                yield
            finally:
                self._mixes = False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model, at the speed of the base.

        Forming W + D for every token costs several times the base, so the active adapters are merged before the loop
        and unmerged after it; both are exact. Several threads may generate at once, but not train meanwhile.
        """
        with nullcontext() if self._mixes else briefly_merged(self.model):
            return self.model.generate(*args, **kwargs)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: CombinationType = "linear",
        density: float | None = None,
        majority_sign_method: SignMethod = "total",
        seed: int = 0,
    ) -> None:
        """Add an adapter that combines others: exactly, on the union of their positions, and not yet active.

        Args:
            adapters: names of one or more adapters; they may have different masks, ratios and modules.
            weights: one factor each, of any sign.
            adapter_name: name of the new adapter.
            combination_type: "linear", the weighted sum of the deltas; "magnitude_prune", "ties", "dare_linear" or
                "dare_ties", see `delta.arithmetic.combine`.
            density: fraction of each adapter's values to keep, in (0, 1]; not for "linear".
            majority_sign_method: of "ties" and "dare_ties": "total" or "frequency".
            seed: of "dare_linear" and "dare_ties"; the global generators are neither used nor changed.

        Raises:
            ValueError: an argument is out of range, an adapter is merged or trains more than sparse deltas, or nothing
                is left. The model is unchanged.
        """
        check_adapter_name(adapter_name)
        layers = dowser_layers(self.model)
        check_sources(self.peft_config, layers, adapters, adapter_name)
        deltas = combined_deltas(layers, adapters, weights, combination_type, density, majority_sign_method, seed)
        self.peft_config[adapter_name] = combined_config([self.peft_config[name] for name in adapters], deltas, layers)
        self.inject_adapter(self.model, adapter_name)
        for layer in layers:
            if layer.module_name in deltas:
                layout = layer.index(adapter_name).layout
                stored = layout.stored(deltas[layer.module_name])
                layer.replace_delta(adapter_name, stored, encode(stored.positions, layout.size))

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the delta of an adapter by a factor, see `DowserLayer.set_scale`; a saved file does not hold it.

        Raises:
            ValueError: the adapter is unknown or merged, or the factor is not finite.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Unknown adapter '{adapter_name}'; the model has {sorted(self.peft_config)}.")
        for layer in dowser_layers(self.model):
            layer.set_scale(adapter_name, scale)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        prepare_merge(self.model, self.peft_config, adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        note_merged_everywhere(self.model)
        report_vanished([layer.vanished for layer in dowser_layers(self.model)])
        report_not_finite([(layer.module_name, layer.not_finite) for layer in dowser_layers(self.model)])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        unmerge_everywhere(self.model)  # PEFT leaves the tokens of an adapter merged

    def delete_adapter(self, adapter_name: str) -> None:
        others = [name for name in self.active_adapters if name != adapter_name]
        remaining = others or sorted(set(self.peft_config) - {adapter_name})[:1]
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and remaining:  # PEFT lets every layer choose another one among those that it has itself
            for layer in dowser_layers(self.model):
                layer.set_adapter(remaining)
            _set_adapter(self.model, remaining)
            self.active_adapter = remaining

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            prepare_merge(self.model, self.peft_config, adapter_names, safe_merge)
        else:
            unmerge_everywhere(self.model)
        # Only the counts are kept: each layer's state is freed as soon as it is merged.
        layers = dowser_layers(self.model)
        vanished = [layer.vanished for layer in layers]
        not_finite = [(layer.module_name, layer.not_finite) for layer in layers]
        del layers
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            report_vanished(vanished)
            report_not_finite(not_finite)
        return self.model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        layers = layers_with_adapter(self.model, adapter_name).values()
        for layer in layers:
            if layer.target.kind != "quantized":
                layer.dowser_values[adapter_name].to(layer.weight.dtype)
        for layer in layers:
            cast(Values, layer.dowser_values[adapter_name]).narrow_is_known = True
        values = [layer.values(adapter_name) for layer in layers]
        narrow = {value.dtype for value in values if value.requires_grad and value.element_size() < 4}
        if narrow:
            logger.warning(
                "Adapter '%s' trains in %s, so an update much smaller than its value is lost. For float32 "
                "values leave autocast_adapter_dtype on.",
                adapter_name,
                narrow.pop(),
            )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DowserConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        layers = list(layers_with_adapter(model, adapter_name).values())
        report_scale(layers, adapter_name)
        check_unmerged_embeddings(model)
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        selected = completed_selection(selected, state_dict, layers, adapter_name)
        selected = own_biases(selected, config, [layer.module_name for layer in layers])
        if config.save_dtype is not None:
            dtype = getattr(torch, config.save_dtype)
            selected = {key: value.to(dtype) if ".dowser_values." in key else value for key, value in selected.items()}
        # Of this adapter, whatever others were made with the same object.
        counts = {layer.module_name: layer.index(adapter_name).nnz for layer in layers}
        awaits_file = any(tensor.is_meta for tensor in selected.values())  # then these are placeholders
        manifest = None if awaits_file else saved_manifest(layers, selected, adapter_name)
        config.record = replace(config.record, counts=counts, manifest=manifest)
        return {key: tensor.to("meta") for key, tensor in selected.items()} if awaits_file else selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DowserConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the whole file against the model before a single tensor is loaded."""
        layers = layers_with_adapter(model, adapter_name)
        if any(name.startswith(PREFIX) for name in layers) and not any(key.startswith(PREFIX) for key in state_dict):
            # It was saved from a model with the adapter in it but no PeftModel around it, as diffusers does.
            state_dict = {PREFIX + key: tensor for key, tensor in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        remapped = under_model_names(model, remapped, adapter_name)
        deltas = read_file(layers, adapter_name, remapped, state_dict.keys())
        state = model.state_dict()
        whole = whole_tensors_in_model(model, adapter_name, remapped, state)
        if (load := current_load()) is not None:
            load.back_up(state[key] for key, tensor in whole.items() if differ(state[key], tensor))
            load.back_up_deltas(layers.values(), adapter_name)
        return set_positions(layers, adapter_name, remapped, deltas) | whole
