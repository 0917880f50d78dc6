"""`hotswap`: other positions and values for an adapter that is in use, without a new module or a new parameter."""

from contextlib import ExitStack
from pathlib import Path
from typing import cast

from torch import nn

from . import writing
from .adapters import SavedAdapter, open_adapter
from .config import DowserConfig
from .gate import adapted, check_unmerged
from .layer import DowserLayer
from .names import few
from .postmerge import Delta
from .provenance import warn_of_other_base
from .targets import check_is_model


def hotswap(model: nn.Module, adapter: str | Path, adapter_name: str = "default") -> None:
    """Replace an adapter of a model by a saved one for the same modules, in place.

    Where the numbers of values agree, as they do at one `update_ratio`, every tensor keeps its memory, so a model that
    `torch.compile` has compiled is not compiled again. An optimizer keeps what it knows of the old values.

    Args:
        model: model with Dowser adapters.
        adapter: folder or Hub id of the saved adapter.
        adapter_name: the adapter to replace.

    Raises:
        TypeError: the model is not a module, but its name for example.
        ValueError: the model has no such adapter, it is merged, one of the two trains more than sparse deltas, or the
            saved one is damaged or for other modules (`DeltaFormatError`). The model is unchanged.
        OSError: there is no such saved adapter.
    """
    check_is_model(model)
    layers = {layer.module_name: layer for _, layer in adapted(model, adapter_name)}
    with ExitStack() as files:
        saved = open_adapter(str(adapter), files)
        _check(model, layers, saved, adapter_name)
        targets = {name: layer.target for name, layer in layers.items()}
        saved.check_fits(targets)
        codes = {name: saved.code(name) for name in layers}
        deltas = {name: Delta(*saved.delta(name, target.numel, codes[name])) for name, target in targets.items()}
    if saved.config.manifest is not None:
        samples = {name: layer.base_sample for name, layer in layers.items()}
        warn_of_other_base(saved.config.manifest, samples, f"Adapter '{saved.name}'")
    config = saved.config
    config.nnz_pattern, config._in_use = saved.counts, True
    config.inference_mode = model.peft_config[adapter_name].inference_mode  # type: ignore[index, union-attr]

    def fill() -> None:
        for name, layer in layers.items():
            layer.fill(adapter_name, deltas[name], codes[name])
        model.peft_config[adapter_name] = config  # type: ignore[index, operator]

    with writing.lock:
        check_unmerged(layers.values(), adapter_name)  # a `generate` may have merged it meanwhile
        writing.to_the_end(fill)


def _check(model: nn.Module, layers: dict[str, DowserLayer], saved: SavedAdapter, adapter_name: str) -> None:
    if not layers:
        raise ValueError(f"The model has no Dowser adapter '{adapter_name}' to replace. Load one with load_adapter().")
    check_unmerged(layers.values(), adapter_name)
    known = cast(DowserConfig, model.peft_config[adapter_name])  # type: ignore[index]
    for name, config in ((adapter_name, known), (saved.name, saved.config)):
        if also := config.also_trains:
            raise ValueError(
                f"Adapter '{name}' also trains {also}, which hotswap does not replace. Use load_adapter() and "
                "delete_adapter()."
            )
    if saved.others:
        raise ValueError(
            f"Adapter '{saved.name}' also changes {len(saved.others)} whole tensors, such as "
            f"{next(iter(saved.others))[:100]!r}, which hotswap does not replace. Use load_adapter() and "
            "delete_adapter()."
        )
    if different := sorted(layers.keys() ^ saved.counts.keys()):
        raise ValueError(
            f"Adapter '{saved.name}' is not for the modules of adapter '{adapter_name}'; {len(different)} differ: "
            f"{few(different)}. Use load_adapter() and delete_adapter()."
        )
