"""Whole tensors beside the deltas of a saved adapter: those that it trains, and no others.

PEFT loads every tensor whose name the model has, the base's own weights too. An adapter may bring the biases and the
modules that its config says it trains, and the embeddings, which PEFT saves where tokens were added.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ._peft import AuxiliaryTrainingWrapper, saved_names_in
from .codec import VALUE_DTYPES, DeltaFormatError, is_finite
from .compiled import usual_name
from .config import DowserConfig
from .gate import adapted
from .layer import DowserLayer
from .names import PREFIX, base_name, few, is_delta
from .tied import Tied


def fitted(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The whole tensors of a saved adapter under their names in a model, in the dtypes that they have there.

    Args:
        model: the model that they are about to be loaded into, its layers in place.
        adapter_name: name of the adapter.
        tensors: its tensors beside the deltas, by their names in the file or in the model.
        state: all tensors of the model, by name.

    Raises:
        DeltaFormatError: one of them is nothing that the adapter trains, or does not fit.
    """
    where = f"Adapter '{adapter_name}'"
    names = _names_of(tensors, _brought(model, adapter_name, state))
    if foreign := [key for key in tensors if key not in names]:
        raise DeltaFormatError(f"{where}: {foreign_problem(foreign)}")
    # PEFT saves some of the embeddings twice, and the one that it loads comes last.
    found = {}
    for key in sorted(tensors, key=lambda key: key in state):
        own = state[names[key]]
        if problem := misfit(tensors[key], own):
            raise DeltaFormatError(f"{where}: the tensor {key[:200]!r} {problem}")
        found[names[key]] = tensors[key].to(own.dtype)
    return found


def check_foreign(model: nn.Module, adapter_name: str, replaced: Sequence[str]) -> None:
    """Refuse an adapter whose load has replaced tensors of the base that it does not train.

    Raises:
        DeltaFormatError: it has.
    """
    names = _names_of(replaced, _brought(model, adapter_name, model.state_dict()))
    if foreign := [name for name in replaced if name not in names]:
        raise DeltaFormatError(f"Adapter '{adapter_name}': {foreign_problem(foreign)}")


def misfit(tensor: Tensor, own: Tensor) -> str | None:
    """Why a whole tensor of a file cannot take the place of one of the model; None where it can."""
    if tensor.shape != own.shape:
        return f"has shape {tuple(tensor.shape)}, the model's has {tuple(own.shape)}. It belongs to another base model."
    if tensor.dtype != own.dtype and not {tensor.dtype, own.dtype} <= set(VALUE_DTYPES):
        return f"is {tensor.dtype}, the model's is {own.dtype}. The file was edited."
    if own.is_floating_point() and not tensor.is_meta and not is_finite(tensor, own.dtype):
        return f"has entries that are not finite in {own.dtype}. The file is damaged."
    return None


def check_whole_modules(model: nn.Module, config: DowserConfig) -> None:
    """Refuse modules and tokens to train as a whole that a model does not have, before any module is replaced.

    A name in `modules_to_save` that is no module is ignored, as PEFT itself adds those of heads that a model may have.

    Raises:
        ValueError: a module only holds others, or a token has no row in the embeddings, or is listed twice.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _HOLDERS) and name.endswith(tuple(config.modules_to_save or ())):
            raise ValueError(
                f"modules_to_save names module '{name}', a {type(module).__name__}, which only holds other modules. "
                "Name those."
            )
    tokens = config.trainable_token_indices
    if tokens is None:
        return
    embeddings = dict(_embedding_modules(model)) if isinstance(tokens, list) else {}
    lists = {next(iter(embeddings), "embed_tokens"): tokens} if isinstance(tokens, list) else tokens
    for end, indices in lists.items():
        for name, module in model.named_modules():
            if name.endswith(end) and not isinstance(module, AuxiliaryTrainingWrapper):
                _check_tokens(name, indices, module)


_HOLDERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def _check_tokens(name: str, indices: Sequence[int], module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"trainable_token_indices names module '{name}', a {type(module).__name__}, which has no row for every "
            "token. Name the embeddings or the output head."
        )
    rows = weight.shape[0]
    outside = [index for index in indices if not 0 <= index < rows]
    if outside or len(set(indices)) < len(indices):
        problem = f"{outside[:5]} are no tokens" if outside else "tokens are listed twice"
        raise ValueError(
            f"trainable_token_indices: {problem} in module '{name}', whose weight has {rows} rows. Resize the "
            "embeddings as they were when the adapter was made, or name each of its tokens once."
        )


def own_biases(selected: Mapping[str, Tensor], config: DowserConfig, modules: Collection[str]) -> dict[str, Tensor]:
    """What PEFT selects for a save, less the biases of layers of other adapters where only those of its own train.

    Args:
        selected: tensors by their name in the model.
        config: configuration of the adapter.
        modules: names of its modules in the base.
    """
    own = {f"{module}.base_layer.bias" for module in modules}
    return {
        key: tensor
        for key, tensor in selected.items()
        if config.bias != "dowser_only" or not key.endswith(".bias") or key.removeprefix(PREFIX) in own
    }


def _brought(model: nn.Module, adapter_name: str, state: Iterable[str]) -> dict[str, str]:
    """Whatever a file of an adapter may bring beside its deltas, as PEFT saves it: names in the model by `_plain` name.

    These are the biases that its config says it trains, modules and tokens that it trains as a whole, and the
    embeddings with all that PEFT has put around them.

    Args:
        model: the model, its layers in place.
        adapter_name: name of the adapter.
        state: names of all tensors of the model.
    """
    configs = cast(Mapping[str, DowserConfig], model.peft_config)
    bias = configs[adapter_name].bias
    others = [f".{name}." for name in configs if name != adapter_name]
    embeddings = tuple(f"{name}." for name, _ in _embedding_modules(model))
    saved = saved_names(model, adapter_name)
    own = {*saved.values()}
    if bias == "dowser_only":
        own |= {f"{name}.base_layer.bias" for name, _ in adapted(model, adapter_name)}
    brought = {}
    for name in state:
        is_own = name in own or name.startswith(embeddings) or (bias == "all" and f".{name}".endswith(".bias"))
        if is_own and not is_delta(name) and not any(other in f"{name}." for other in others):
            plain = _plain(usual_name(name).removesuffix(f".{adapter_name}"))
            brought[plain] = name
            brought.setdefault(_bare(plain), name)
    # Under their whole names, so that the original of a module is not taken for the adapter's copy.
    return brought | {PREFIX + key.removeprefix(PREFIX): name for key, name in saved.items()}


def _names_of(keys: Iterable[str], brought: Mapping[str, str]) -> dict[str, str]:
    """The names in the model of tensors in a file; those that it does not train there are left out.

    Where adapters wrap a module in one of the two models, the saved one or this, only, PEFT would find no place for it.
    """
    known = set(brought.values())
    found = {}
    for key in keys:
        plain = _plain(usual_name(key))
        kinds = (PREFIX + key.removeprefix(PREFIX), plain, _bare(plain))
        name = key if key in known else next((brought[kind] for kind in kinds if kind in brought), None)
        if name is not None:
            found[key] = name
    return found


def _plain(key: str) -> str:
    """A tensor's name without that of the adapter, which PEFT leaves in the name of what lies deeper in a module."""
    start, found, rest = key.removeprefix(PREFIX).partition(_COPY)
    return start + found + (rest.partition(".")[2] or rest)


def _bare(plain: str) -> str:
    """How the base calls it, whatever adapters have put around its module."""
    return base_name(plain).replace(".original_module.", ".").replace(".token_adapter.", ".")


# What PEFT puts around an adapter's own copy of a module.
_COPY = ".modules_to_save."


def saved_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Names in the model of the tensors that an adapter trains as a whole, by their names in the file."""
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            start = name.removeprefix("_fsdp_wrapped_module.")
            saved = saved_names_in(module, adapter_name)
            names |= {f"{start}.{key}": f"{start}.{own}" for key, own in saved.items()}
    return names


def foreign_problem(foreign: list[str]) -> str:
    """What is wrong with whole tensors that an adapter does not train."""
    return (
        f"the file has {len(foreign)} tensors that the adapter does not train: {few(foreign)}. Loading them could "
        "overwrite the base model. The file was edited, or its config has lost its bias or modules_to_save."
    )


def foreign_tensors(config: DowserConfig, keys: Collection[str], layers: Iterable[str], base: nn.Module) -> str | None:
    """What a saved adapter has that it does not train in a base without adapters; None where there is nothing.

    Args:
        config: configuration of the adapter.
        keys: names of its tensors in the base.
        layers: names of the layers under its deltas.
        base: the base.
    """
    own = {*_in_modules_to_save(base, config), *_embeddings(base)}
    if config.bias == "dowser_only":
        own |= {f"{layer}.bias" for layer in layers}
    foreign = [key for key in keys if key not in own and not (config.bias == "all" and f".{key}".endswith(".bias"))]
    return foreign_problem(foreign) if foreign else None


def missing_tensors(config: DowserConfig, keys: Collection[str], base: nn.Module) -> str | None:
    """What a saved adapter lacks of the modules that it trains as a whole; None where nothing is missing.

    Args:
        config: configuration of the adapter.
        keys: names of its tensors in the base.
        base: the base.
    """
    missing = [name for name in _in_modules_to_save(base, config) if name not in keys]
    if not missing:
        return None
    return (
        f"the file lacks {len(missing)} tensors of modules that the adapter trains as a whole (modules_to_save): "
        f"{few(missing)}. The file was edited or is not that of the config; copy the adapter again."
    )


def _in_modules_to_save(base: nn.Module, config: DowserConfig) -> Iterator[str]:
    for name, module in base.named_modules(remove_duplicate=False):
        if name.endswith(tuple(config.modules_to_save or [])):  # as PEFT matches
            yield from (f"{name}.{key}" for key in module.state_dict())


def check_unmerged_embeddings(model: nn.Module) -> None:
    """Refuse to save an adapter while PEFT would take merged weights for those of the base.

    Raises:
        ValueError: adapters are merged into the embeddings or the output head.
    """
    layers = [module.layer if isinstance(module, Tied) else module for _, module in _embedding_modules(model)]
    layers = [layer for layer in layers if isinstance(layer, DowserLayer)]
    if merged := sorted({name for layer in layers for name in layer.merged_adapters if name in layer.dowser_values}):
        raise ValueError(
            f"Adapters {merged} are merged into the embeddings, which PEFT saves beside an adapter that targets them, "
            "so loading would add its delta twice. Call unmerge_adapter() before saving."
        )


def _embeddings(model: nn.Module) -> Iterator[str]:
    """Names of the tensors of the embeddings."""
    for name, module in _embedding_modules(model):
        yield from (f"{name}.{key}" for key in module.state_dict())


def _embedding_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The embeddings and the output head, which PEFT counts among them, with their names in the model."""
    base: Any = next((module for module in model.modules() if hasattr(module, "get_input_embeddings")), None)
    if base is None:
        return []
    try:
        found = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (NotImplementedError, AttributeError):
        return []
    return [(name, module) for name, module in model.named_modules() if any(module is one for one in found)]
