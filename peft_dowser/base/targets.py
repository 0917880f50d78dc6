"""Which weights of a model an adapter targets, and the layers that they belong to."""

import copy
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from .._peft import AuxiliaryTrainingWrapper, _maybe_include_all_linear_layers, check_target_module_exists
from .._transformers import is_experts, is_falcons, is_scaled_embedding, still_tied_weights, tied_weights
from ..config import DowserConfig
from .compiled import uncompiled, usual_modules, usual_name
from .distributed import shape_of
from .readers import reader_of
from .storage import backend_of
from .target import Target, is_plain

# Linears of a language model, or modules around them, that route tokens to experts or streams; no default targets.
_ROUTERS = {"gate", "router", "modality_router", "shared_expert_gate"}

_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)\.")


def check_is_model(model: object) -> None:
    """Refuse what is not a model, such as the name of one."""
    if not isinstance(model, nn.Module):
        given = repr(model[:100]) if isinstance(model, str) else f"a {type(model).__name__}"
        raise TypeError(
            f"model must be a loaded model, got {given}. Load it first, for example with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )


def check_is_base(model: object) -> None:
    """Refuse what is not a model, and what `get_peft_model` has made of one."""
    check_is_model(model)
    if isinstance(model, PeftModel):
        raise ValueError(
            f"The model is a {type(model).__name__} with adapters {sorted(model.peft_config)}, not a base model. To "
            "add another adapter call model.add_adapter(NAME, config); to begin anew take the base, model.unload()."
        )


def resolve_targets(model: nn.Module, config: DowserConfig) -> dict[str, Target]:
    """Find the weights that a config targets.

    Args:
        model: the base model; it may carry adapters already.
        config: the adapter's config; read only.

    Returns:
        Targets by name, in the order of the model: modules first, then fused parameters.

    Raises:
        ValueError: no default exists for this model, nothing is matched, a weight is read without a call of its
            module, a target parameter is not fused, a weight is tied to that of another module or not contiguous, or
            `last_layers` cannot be met.
        TypeError: a target module is neither a linear layer nor an embedding, or its dtype cannot train.
    """
    model = uncompiled(model)
    parameters = _target_parameters(model, config)
    by_default = config.target_modules is None
    if by_default:
        names = _default_targets(model)
        if config.layers_to_transform is not None:
            names = _in_layers(names, config.layers_to_transform)
        config = copy.copy(config)
        config.target_modules = asked = names
    else:
        asked = config.target_modules  # "all-linear" means less where modules of another adapter train as a whole
        config = cast(DowserConfig, _maybe_include_all_linear_layers(copy.copy(config), model))
        if config.target_modules is not asked:
            config.target_modules = _less_whole(config)
    names = _matching(model, config)
    if config.nnz_pattern is None:  # a saved adapter may have values there all the same, and be merged
        names = _called(model, names, by_name=str(asked).lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND)
    if not names and config.layers_to_transform is not None:
        anywhere = copy.copy(config)
        anywhere.layers_to_transform = anywhere.layers_pattern = None
        _in_layers(set(_matching(model, anywhere)), config.layers_to_transform)  # names the layers that are not there
    if names or not parameters or config.target_modules:
        _check_matched(asked or set(), names, model)
    if config.last_layers is not None:
        kept = set(_in_last_layers([*names, *parameters], config.last_layers))
        names = [name for name in names if name in kept]
        parameters = {name: target for name, target in parameters.items() if name in kept}
    targets = {name: _target(name, model.get_submodule(name)) for name in names} | parameters
    if config.ensure_weight_tying or by_default:  # layers that share weights are adapted alike
        targets = _with_ties(model, targets)
    _check_untied(model, targets)
    _check_contiguous(targets)
    return targets


def fused_parameters(model: nn.Module) -> dict[str, Target]:
    """The parameters that hold the matrices of several experts, by name, as `target_parameters` can name them."""
    found = {}
    for path, module in usual_modules(model).items():
        if isinstance(module, _ConvNd):
            continue  # a kernel has three dimensions too
        name = re.sub(r"\.base_layer\b", "", path)
        for parameter, weight in module.named_parameters(recurse=False):
            if len(shape_of(weight)) == 3 and weight.is_floating_point() and weight.element_size() > 1:
                found[f"{name}.{parameter}"] = Target(f"{name}.{parameter}", module, parameter)
    return found


def layer_of(name: str) -> str:
    """The name of the layer that a module belongs to: 'model.layers.3' for 'model.layers.3.mlp.up_proj'."""
    found = _LAYER_INDEX.search(name)
    return name[: found.end(1)] if found else name


def _adaptable_names(model: nn.Module) -> list[str]:
    """Module names, less those inside adapters that are there already."""
    names, inside = [], ()
    for name, module in usual_modules(model).items():
        if not name or (inside and name.startswith(inside)):
            continue
        names.append(name)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or "base_layer" in module._modules:
            inside = (*inside, name + ".")
    return names


def _matching(model: nn.Module, config: DowserConfig) -> list[str]:
    """The modules that a config names."""
    return [name for name in _adaptable_names(model) if check_target_module_exists(config, name)]


def _called(model: nn.Module, names: list[str], by_name: bool) -> list[str]:
    """The modules that are called; others are left out with a warning, and refused if `by_name` asks for them alone."""
    read = {name: reader for name in names if (reader := reader_of(model, name)) is not None}
    if not read:
        return names
    called = [name for name in names if name not in read]
    reason = (
        f"{' and '.join(sorted(set(read.values())))} may read their weights without calling them, so an adapter would "
        "change nothing before a merge"
    )
    refused = sorted({_leaf(name) for name in read} - {_leaf(name) for name in called}) if by_name else []
    if refused:
        raise ValueError(
            f"Target modules {[name for name in read if _leaf(name) in refused]} cannot be trained: {reason}. Take "
            f"{refused} out of target_modules, or put them into exclude_modules."
        )
    warnings.warn(f"Target modules {list(read)} are left out: {reason}.", UserWarning, stacklevel=2)
    return called


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _less_whole(config: DowserConfig) -> set[str]:
    """The targets less the modules that train as a whole: by PEFT all whose names end so, 'pre_classifier' too."""
    whole = tuple(config.modules_to_save or ())
    return {name for name in config.target_modules or () if not name.endswith(whole)}


def _default_targets(model: nn.Module) -> set[str]:
    """The linears inside the numbered layers of the language model."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} is not a transformers model, "
            "so there is no default."
        )
    text = _text_part(model)
    whole = uncompiled(model if model.config.is_encoder_decoder else text)
    modules = {name: uncompiled(module) for name, module in usual_modules(model).items()}
    start = next(f"{name}." if name else "" for name, module in modules.items() if module is whole)
    towers = tuple(
        f"{name}."
        for name, module in modules.items()
        if name and _is_tower(module, model) and all(inner is not text for inner in module.modules())
    )
    linears = {
        name
        for name in _adaptable_names(model)
        if name.startswith(start)
        and _LAYER_INDEX.search(name)
        and _ROUTERS.isdisjoint(name.split("."))
        and _is_linear(model.get_submodule(name))
        and reader_of(model, name) is None
    }
    # A model of images or sound alone is all tower.
    names = {name for name in linears if not name.startswith(towers)} or linears
    if not names:
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} has no linear modules in "
            "numbered layers."
        )
    return names


def _target_parameters(model: nn.Module, config: DowserConfig) -> dict[str, Target]:
    """The fused parameters that a config names, less those of excluded modules and other layers."""
    if not config.target_parameters:
        return {}
    asked = sorted(config.target_parameters)
    fused = fused_parameters(model)
    named = {key: [name for name in fused if f".{name}".endswith(f".{key}")] for key in asked}
    unmatched = [key for key, names in named.items() if not names]
    if unmatched:
        matrices = [
            key for key in unmatched if any(f".{name}".endswith(f".{key}") for name, _ in model.named_parameters())
        ]
        if matrices:
            raise ValueError(
                f"target_parameters {matrices} are not the fused weights of experts, which have three dimensions. Name "
                "the module of a matrix in target_modules."
            )
        known = sorted({_short(name) for name in fused})
        raise NoMatchingPeftModuleError(
            f"target_parameters {unmatched} not found in the base model. "
            + (f"Its fused weights of experts are {known}." if known else "It has no fused weights of experts.")
        )
    chosen = copy.copy(config)
    chosen.target_modules = set(asked)
    found = {name: target for name, target in fused.items() if check_target_module_exists(chosen, name)}
    for name, target in found.items():
        if not _is_taken_by_expert(target):
            raise TypeError(
                f"target_parameters: '{_short(name)}' is used by {type(target.module).__name__} as a whole, neither "
                "expert by expert nor by an experts implementation of transformers, so no delta can be added to it. "
                "Leave it out of target_parameters."
            )
    return found


def _is_taken_by_expert(target: Target) -> bool:
    """Whether a stand-in can follow what a module does with a fused parameter, see `base.fused`."""
    if is_experts(target.module):
        return True
    try:
        return f"self.{target.parameter}[" in inspect.getsource(type(target.module).forward)
    except (OSError, TypeError):  # made without a file
        return True


def _short(name: str) -> str:
    """A parameter's name inside its layer: 'mlp.experts.down_proj'."""
    return name.removeprefix(layer_of(name) + ".")


def _text_part(model: PreTrainedModel) -> nn.Module:
    """The part that has the config of the text, which writes it where a part reads and another writes."""
    config = model.config.get_text_config(decoder=True)
    parts = (module for module in model.modules() if getattr(module, "config", None) is config)
    return next(parts, model)


def _is_tower(module: nn.Module, model: PreTrainedModel) -> bool:
    """Whether a part of a model reads images or sound, and no text."""
    if isinstance(module, PreTrainedModel):
        return "text" not in (module.input_modalities or ())
    return getattr(module, "config", model.config) is getattr(model.config, "vision_config", None)


def _is_linear(module: nn.Module) -> bool:
    """Whether calling this multiplies with its weight, adds its bias, and does nothing else; or it is quantized."""
    module = _unwrapped(module)
    if isinstance(module, nn.Linear) and _is_narrow(module.weight):
        return True  # by whatever library; `_target` says so
    return is_plain(module) or is_falcons(module) or backend_of(module) is not None


def _is_narrow(weight: Tensor) -> bool:
    """Whether no delta can be added to a weight: it holds integers, or floats of eight bits."""
    return not weight.is_floating_point() or weight.element_size() < 2


def _is_lookup(module: nn.Module) -> bool:
    """Whether this is an embedding that gives the rows of its weight, perhaps times a scale, and does nothing else."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:  # the latter rewrites its weight
        return False
    return type(module).forward is nn.Embedding.forward or is_scaled_embedding(module)


def _unwrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return cast(nn.Module, module._modules.get("base_layer", module))


def _target(name: str, module: nn.Module) -> Target:
    module = _unwrapped(module)
    if not _is_linear(module) and not _is_lookup(module):
        fused = [_short(f"{name}{key}") for key in fused_parameters(module) if key.count(".") == 1]
        raise TypeError(
            f"Target module '{name}' is a {type(module).__name__}. Target modules must be torch.nn.Linear or "
            "transformers' Conv1D, with no other forward than theirs, or a torch.nn.Embedding that only looks up rows; "
            "change target_modules or exclude_modules."
            + (f" The fused weights of its experts are adapted by target_parameters={fused}." if fused else "")
        )
    if backend_of(module) is None:
        weight = cast(nn.Linear, module).weight
        if not isinstance(weight, nn.Parameter):
            raise TypeError(
                f"Target module '{name}' computes its weight from other tensors, as weight normalization, pruning and "
                "other parametrizations of torch do, so a merge could not write it. Make the weight a parameter first "
                "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm, "
                "torch.nn.utils.prune.remove), or leave the module out of target_modules."
            )
        if _is_narrow(weight):
            raise TypeError(
                f"Target module '{name}' has a weight of {weight.dtype}, and PEFT knows no library that has quantized "
                "it so. Load the base in floating point, or quantize it with bitsandbytes, torchao or HQQ."
            )
    return Target(name, module)


def _with_ties(model: nn.Module, targets: dict[str, Target]) -> dict[str, Target]:
    """The targets, each weight once: under the first of the modules that use it, which has the others as its ties."""
    users: dict[int, list[str]] = {}
    for name in _adaptable_names(model):
        weight = getattr(_unwrapped(model.get_submodule(name)), "weight", None)
        users.setdefault(id(weight), []).append(name)
    found = {}
    for name, target in targets.items():
        weight = getattr(target.module, target.parameter, None)  # None in HQQ's layers, which share nothing
        first, *others = [name] if weight is None or target.is_fused else users[id(weight)]
        if others and first not in found:
            ties = tuple(_target(other, model.get_submodule(other)) for other in others)
            found[first] = replace(_target(first, model.get_submodule(first)), tied=ties)
        elif not others:
            found[name] = target
    return found


def _check_untied(model: nn.Module, targets: dict[str, Target]) -> None:
    """Refuse a target whose weight another module uses as well: that module would not see the delta until a merge."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(re.sub(r"\.base_layer\b", "", usual_name(name)))
    for name, target in targets.items():
        weight = getattr(target.module, target.parameter, None)  # None in HQQ's layers, which share nothing
        known = {use.tensor_name for use in target.uses}
        others = sorted({*names.get(id(weight), []), *_ties(model, target)} - known)
        if others:
            raise ValueError(
                f"The weight of target module '{name}' is tied: it is {others} too, which would stay as it is until a "
                "merge changes both. Set ensure_weight_tying=True to give all of them one delta, leave the module "
                "out, or untie the model first: give the module a copy of its weight and set tie_word_embeddings=False "
                "in the model's config."
            )


def _check_contiguous(targets: dict[str, Target]) -> None:
    """Refuse weights whose flat positions are not their places in memory, so that a merge could not write them."""
    for name, target in targets.items():
        if not target.is_quantized and not getattr(target.module, target.parameter).is_contiguous():
            raise ValueError(
                f"The weight of target module '{name}' is not contiguous in memory, as a transposed tensor is not. "
                f"Give the module a contiguous one first: module.{target.parameter}.data = "
                f"module.{target.parameter}.data.contiguous()."
            )


def _ties(model: nn.Module, target: Target) -> set[str]:
    """What an offloaded weight is tied to: accelerate keeps a placeholder for each name, so only transformers knows."""
    weight = getattr(target.module, target.parameter, None)
    if weight is None or not weight.is_meta or not isinstance(model, PreTrainedModel):
        return set()
    # Of the pairs that the weights were loaded with, those that the config still ties.
    still = still_tied_weights(model)
    pairs = [{one, other} for one, other in tied_weights(model).items() if one in still]
    return set().union(*(pair for pair in pairs if target.tensor_name in pair))


def _check_matched(targets: set[str] | list[str] | str, names: list[str], model: nn.Module) -> None:
    """Name the targets that match nothing: an error where nothing at all is left, otherwise a warning."""
    asked = [targets] if isinstance(targets, str) else sorted(targets)
    known = _adaptable_names(model)
    if not names:
        leaves = sorted({_leaf(name) for name in known if _is_linear(model.get_submodule(name))})
        raise NoMatchingPeftModuleError(
            f"Target modules {asked} not found in the base model, or all of them are excluded. Its linear modules are "
            f"called {leaves}; change target_modules or exclude_modules."
        )
    if isinstance(targets, str):
        return
    suffixes = {name[at:] for name in known for at in _starts_of_parts(name)}
    unmatched = [target for target in asked if target not in suffixes]
    fused = sorted({_short(name) for name in fused_parameters(model) for key in unmatched if name.endswith(f".{key}")})
    if fused:
        raise ValueError(
            f"target_modules {unmatched}: the model has no such linear modules, but fused weights of experts, {fused}. "
            f"Take the names out of target_modules, and set target_parameters={fused} to train those weights."
        )
    if unmatched:
        warnings.warn(
            f"The following target_modules matched nothing and are ignored: {unmatched}.", UserWarning, stacklevel=2
        )


def _starts_of_parts(name: str) -> list[int]:
    """Where the dot-separated parts of a module name begin."""
    return [0] + [at + 1 for at, letter in enumerate(name) if letter == "."]


def _in_layers(names: set[str], layers: list[int] | int) -> set[str]:
    """Those in the layers of the given indices."""
    wanted = {layers} if isinstance(layers, int) else set(layers)
    indices = {name: int(found[1]) for name in names if (found := _LAYER_INDEX.search(name))}
    last = max(indices.values(), default=-1)
    if unknown := sorted(wanted - set(indices.values())):
        raise ValueError(f"layers_to_transform names layers {unknown}, but the model has layers 0 to {last}.")
    return {name for name, index in indices.items() if index in wanted}


def _in_last_layers(names: list[str], last_layers: int) -> list[str]:
    """Those in the last layers of their own layer list."""
    indices: dict[str, int] = {}
    for name in names:
        if found := _LAYER_INDEX.search(name):
            stack = name[: found.start(1)]
            indices[stack] = max(indices.get(stack, 0), int(found[1]))
    kept = []
    for name in names:
        found = _LAYER_INDEX.search(name)
        if found and int(found[1]) > indices[name[: found.start(1)]] - last_layers:
            kept.append(name)
    if names and not indices:
        raise ValueError("last_layers needs targets in numbered layers, but none of the targets is in one.")
    too_many = [stack for stack, last in indices.items() if last_layers > last + 1]
    if too_many:
        raise ValueError(
            f"last_layers={last_layers}, but '{too_many[0].rstrip('.')}' has only {indices[too_many[0]] + 1} layers."
        )
    return kept


def embedding_tensors(model: nn.Module) -> Iterator[str]:
    """Names of the tensors of the embeddings."""
    for name, module in embedding_modules(model):
        yield from (f"{name}.{key}" for key in module.state_dict())


def embedding_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The embeddings and the output head, which PEFT counts among them, with their names in the model."""
    base: Any = next((module for module in model.modules() if hasattr(module, "get_input_embeddings")), None)
    if base is None:
        return []
    try:
        found = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (NotImplementedError, AttributeError):
        return []
    return [(name, module) for name, module in model.named_modules() if any(module is one for one in found)]
