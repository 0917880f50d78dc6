"""What a save of an adapter must hold: every tensor under its usual name, and the manifest that describes them."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..base.compiled import uncompiled_name
from ..base.distributed import is_sharded_tensor
from ..base.module_names import embedding_modules
from ..config import DowserConfig
from ..delta.codec import side_by_side
from ..delta.format import CODE, PREFIX, VALUES, manifest_entry, manifest_of, with_adapter_name
from ..layers.layer import DowserLayer
from ..layers.tied import Tied

# Where DistributedDataParallel looks for the names of what it shall not synchronize.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def leave_positions_to_us(model: nn.Module) -> None:
    """Keep DistributedDataParallel from sending the positions of all adapters again in every forward.

    They are the same on every rank from the start, and never change. DDP finds the names given here in a `PeftModel`,
    and in the base model itself, where transformers' `add_adapter` puts an adapter.
    """
    names = {
        f"{prefix}{name}.{buffer}"
        for name, layer in model.named_modules()
        if isinstance(layer, DowserLayer)
        for buffer, _ in layer.dowser_index.named_buffers(prefix="dowser_index")
        for prefix in ("", PREFIX)
    }
    setattr(model, _IGNORED, sorted({*getattr(model, _IGNORED, ()), *names}))


def completed_selection(
    selected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], layers: Iterable[DowserLayer], adapter_name: str
) -> dict[str, Tensor]:
    """Complete what PEFT selects of a state dict for a save, and refuse values of which this rank has only a part.

    PEFT looks for tensors under the names of the modules. FSDP1 and activation checkpointing add parts to the names of
    modules but not of tensors; torch.compile adds one to both, which a file must not have. A state dict may lack the
    index code, see `layers.state.Index`. The layers are those that carry the adapter, whose name is in all keys.
    """
    completed, state_dict = _uncompiled(selected), _uncompiled(state_dict)
    inside_peft = any(key.startswith(PREFIX) for key in state_dict)
    for layer in layers:
        module, index = layer.module_name, layer.index(adapter_name)
        start = f"{PREFIX if inside_peft else ''}{module}"
        values_key = start + with_adapter_name(VALUES, adapter_name)
        values = state_dict.get(values_key)
        if values is None or is_sharded_tensor(values) or values.numel() != index.nnz:
            whole = 0 if values is None or is_sharded_tensor(values) else values.numel()
            raise ValueError(
                f"Adapter '{adapter_name}': the state dict has {whole} of the {index.nnz} values of module '{module}', "
                "so the file would be incomplete. The model is sharded: gather a full state dict on all ranks "
                "(accelerator.get_state_dict(model), or get_model_state_dict with full_state_dict=True), and call "
                "save_pretrained(..., state_dict=...) with it on rank 0."
            )
        index.check_agreement()
        completed[values_key] = values
        completed[start + with_adapter_name(CODE, adapter_name)] = index.code
    return completed


def under_model_names(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The tensors of a saved adapter, under those names in a model that PEFT does not find.

    They are the names of buffers outside the state dict, see `layers.state.Index`, and of all inside compiled modules.
    """
    known = {uncompiled_name(name): name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    renamed = {}
    for key, tensor in tensors.items():
        part = next((part for part in (VALUES, CODE) if key.endswith(part)), None)
        full = key if part is None else key.removesuffix(part) + with_adapter_name(part, adapter_name)
        renamed[known.get(full) or known.get(full.removeprefix(PREFIX)) or key] = tensor
    return renamed


def _uncompiled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {uncompiled_name(name): tensor for name, tensor in tensors.items()}


def saved_manifest(layers: Sequence[DowserLayer], tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Any]:
    """The manifest of what is about to be saved, of tensors by their names in the model."""
    code, values = with_adapter_name(CODE, adapter_name), with_adapter_name(VALUES, adapter_name)

    def entry_of(layer: DowserLayer) -> dict[str, Any]:
        name = layer.module_name
        start = name if name + values in tensors else PREFIX + name
        layout = layer.index(adapter_name).layout
        return manifest_entry(tensors[start + code], tensors[start + values], layout, layer.base_sample)

    return manifest_of(dict(zip([layer.module_name for layer in layers], side_by_side(entry_of, layers), strict=True)))


def own_biases(selected: Mapping[str, Tensor], config: DowserConfig, modules: Collection[str]) -> dict[str, Tensor]:
    """PEFT's selection for a save; with bias="dowser_only", without the biases of modules of other adapters."""
    own = {f"{module}.base_layer.bias" for module in modules}
    return {
        key: tensor
        for key, tensor in selected.items()
        if config.bias != "dowser_only" or not key.endswith(".bias") or key.removeprefix(PREFIX) in own
    }


def check_unmerged_embeddings(model: nn.Module) -> None:
    """Refuse to save an adapter while PEFT would take merged weights of the embeddings or the output head for the
    base's.
    """
    layers = [module.layer if isinstance(module, Tied) else module for _, module in embedding_modules(model)]
    layers = [layer for layer in layers if isinstance(layer, DowserLayer)]
    if merged := sorted({name for layer in layers for name in layer.merged_adapters if name in layer.dowser_values}):
        raise ValueError(
            f"Adapters {merged} are merged into the embeddings, which PEFT saves with an adapter that targets them, "
            "so loading would add its delta twice. Call unmerge_adapter() before saving."
        )


def report_scale(layers: Iterable[DowserLayer], adapter_name: str) -> None:
    scales = sorted({layer.scaling[adapter_name] for layer in layers} - {1.0})
    if scales:
        warnings.warn(
            f"Adapter '{adapter_name}' is saved as it was trained, without its scale of {scales[0]:g}. To save it "
            f"scaled, make an adapter of it: add_weighted_adapter(['{adapter_name}'], [1.0], 'NEW_NAME').",
            stacklevel=2,
        )
