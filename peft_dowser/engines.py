"""The engines that spread a model over ranks: what to tell them of an adapter, and what their states lack."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .compiled import usual_name
from .layer import DowserLayer
from .names import CODE, PREFIX, VALUES, named
from .spread import is_sharded

# Where DistributedDataParallel looks for the names of what it shall not synchronize.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def leave_positions_to_us(model: nn.Module) -> None:
    """Keep DistributedDataParallel from sending the positions of all adapters again in every forward.

    They are the same on every rank from the start, and never change. The names are given as DDP finds them in a
    `PeftModel` and in the base model itself, where `add_adapter` of transformers has put the adapter.
    """
    names = {
        f"{prefix}{name}.{buffer}"
        for name, layer in model.named_modules()
        if isinstance(layer, DowserLayer)
        for buffer, _ in layer.dowser_index.named_buffers(prefix="dowser_index")
        for prefix in ("", PREFIX)
    }
    setattr(model, _IGNORED, sorted({*getattr(model, _IGNORED, ()), *names}))


def complete(
    selected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], layers: Iterable[DowserLayer], adapter_name: str
) -> dict[str, Tensor]:
    """Complete what PEFT selects for a save, and refuse values of which this rank has only a part.

    PEFT looks for tensors under the names of the modules; FSDP1 and activation checkpointing add parts to those, which
    the names of the tensors lack; torch.compile adds one to both, which a file must not have. The index code may be no
    part of a state dict, see `state.Index`.

    Args:
        selected: the adapter's tensors, their keys with the adapter's name.
        state_dict: the state that they are selected from.
        layers: those that carry the adapter, in the model that the state dict comes from.
        adapter_name: name of the adapter.

    Returns:
        All tensors of the adapter.

    Raises:
        ValueError: values of a module are empty or sharded, or something has written into the positions.
    """
    completed, state_dict = _as_usual(selected), _as_usual(state_dict)
    inside_peft = any(key.startswith(PREFIX) for key in state_dict)
    for layer in layers:
        module, index = layer.module_name, layer.index(adapter_name)
        start = f"{PREFIX if inside_peft else ''}{module}"
        values_key = start + named(VALUES, adapter_name)
        values = state_dict.get(values_key)
        if values is None or is_sharded(values) or values.numel() != index.nnz:
            whole = 0 if values is None or is_sharded(values) else values.numel()
            raise ValueError(
                f"Adapter '{adapter_name}': the state dict has {whole} of the {index.nnz} values of module '{module}', "
                "so the file would be incomplete. The model is sharded: gather a full state dict on all ranks "
                "(accelerator.get_state_dict(model), or get_model_state_dict with full_state_dict=True), and call "
                "save_pretrained(..., state_dict=...) with it on rank 0."
            )
        index.check_untouched()
        completed[values_key] = values
        completed[start + named(CODE, adapter_name)] = index.code
    return completed


def with_usual_names(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """The tensors of a saved adapter, under the names that those have in a model which PEFT does not find.

    These are buffers that are no part of a state dict, see `state.Index`, and all that is inside compiled modules.
    """
    known = {usual_name(name): name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    renamed = {}
    for key, tensor in tensors.items():
        part = next((part for part in (VALUES, CODE) if key.endswith(part)), None)
        full = key if part is None else key.removesuffix(part) + named(part, adapter_name)
        renamed[known.get(full) or known.get(full.removeprefix(PREFIX)) or key] = tensor
    return renamed


def _as_usual(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that they have where nothing is compiled."""
    return {usual_name(name): tensor for name, tensor in tensors.items()}
