"""Which weights of a model a config means."""

import copy
import inspect
import warnings
from collections.abc import Mapping
from functools import partial
from typing import cast

from peft import PeftModel
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, NoMatchingPeftModuleError
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .._peft import _maybe_include_all_linear_layers, check_target_module_exists, get_quantization_kwargs
from .._transformers import is_experts
from ..config import DowserConfig
from .compiled import modules_by_name, uncompiled
from .default_targets import default_modules
from .distributed import shape_of
from .module_names import LAYER_INDEX, adaptable_names, name_in_layer, name_without_adapter, unwrapped
from .target import LINEAR, TARGETABLE, Target, fused_target, is_narrow, target_kind, target_of
from .ties import check_untied, with_ties
from .weight_readers import reader_of


def check_is_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        given = repr(model[:100]) if isinstance(model, str) else f"a {type(model).__name__}"
        raise TypeError(
            f"model must be a loaded model, got {given}. Load it first, for example with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )


def check_is_base(model: object) -> None:
    check_is_model(model)
    if isinstance(model, PeftModel):
        raise ValueError(
            f"The model is a {type(model).__name__} with adapters {sorted(model.peft_config)}, not a base model. To "
            "add another adapter call model.add_adapter(NAME, config); to begin anew take the base, model.unload()."
        )


def resolve_targets(model: nn.Module, config: DowserConfig) -> dict[str, Target]:
    """Find the weights that a config targets, by name in the order of the model: modules first, then fused parameters.

    The model may carry adapters already; the config is read only.

    Raises:
        ValueError: no default exists for this model, nothing is matched, a weight is read without a call of its module,
            a target parameter is not fused, a weight is shared with another module or not contiguous, `last_layers`
            cannot be met, or input channels are to train of a weight that has none.
        TypeError: a target module is neither a linear layer nor an embedding, or its dtype cannot train.
    """
    model = uncompiled(model)
    parameters = _fused_targets(model, config)
    by_default = config.target_modules is None
    if by_default:
        names = default_modules(model)
        if config.layers_to_transform is not None:
            names = _in_layers(names, config.layers_to_transform)
        config = copy.copy(config)
        config.target_modules = asked = names
    else:
        asked = config.target_modules  # "all-linear" means less where modules of another adapter train as a whole
        config = cast(DowserConfig, _maybe_include_all_linear_layers(copy.copy(config), model))
        if config.target_modules is not asked:
            config.target_modules = _without_whole(config)
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
    find = partial(_target, model)
    targets = {name: find(name) for name in names} | parameters
    if config.ensure_weight_tying or by_default:  # layers that share weights are adapted alike
        targets = with_ties(model, targets, find)
    check_untied(model, targets)
    _check_contiguous(targets)
    if config.granularity == "input_channel":
        _check_channels(targets)
    return targets


def fused_parameters(model: nn.Module) -> dict[str, Target]:
    """The parameters that hold the matrices of several experts, by name, as `target_parameters` can name them."""
    found = {}
    for path, module in modules_by_name(model).items():
        if isinstance(module, _ConvNd):
            continue  # a kernel has three dimensions too
        name = name_without_adapter(path)
        for parameter, weight in module.named_parameters(recurse=False):
            if len(shape_of(weight)) == 3 and not is_narrow(weight):
                found[f"{name}.{parameter}"] = fused_target(f"{name}.{parameter}", module, parameter)
    return found


def _matching(model: nn.Module, config: DowserConfig) -> list[str]:
    return [name for name in adaptable_names(model) if check_target_module_exists(config, name)]


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
    warnings.warn(f"Target modules {list(read)} are left out: {reason}.", stacklevel=2)
    return called


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _without_whole(config: DowserConfig) -> set[str]:
    """The `target_modules` without the modules that train as a whole.

    PEFT takes for these every module whose name ends so: 'pre_classifier', too, for 'classifier'.
    """
    whole = tuple(config.modules_to_save or ())
    return {name for name in config.target_modules or () if not name.endswith(whole)}


def _fused_targets(model: nn.Module, config: DowserConfig) -> dict[str, Target]:
    """The fused parameters that a config names, without the parameters of excluded modules and other layers."""
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
        known = sorted({name_in_layer(name) for name in fused})
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
                f"target_parameters: '{name_in_layer(name)}' is used by {type(target.module).__name__} as a whole, "
                "neither expert by expert nor by an experts implementation of transformers, so no delta can be added "
                "to it. Leave it out of target_parameters."
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


def _target(model: nn.Module, name: str) -> Target:
    module = unwrapped(model.get_submodule(name))
    kind = target_kind(module)
    if kind is None:
        fused = [name_in_layer(f"{name}{key}") for key in fused_parameters(module) if key.count(".") == 1]
        raise TypeError(
            f"Target module '{name}' is a {type(module).__name__}. Target modules must be {TARGETABLE}; "
            "change target_modules or exclude_modules."
            + (f" The fused weights of its experts are adapted by target_parameters={fused}." if fused else "")
        )
    if kind != "quantized":
        _check_trainable(name, cast(nn.Linear, module).weight)
    return target_of(name, module, get_quantization_kwargs(model).get("get_apply_tensor_subclass"))


def _check_trainable(name: str, weight: object) -> None:
    if not isinstance(weight, nn.Parameter):
        raise TypeError(
            f"Target module '{name}' computes its weight from other tensors, as weight normalization, pruning and "
            "other parametrizations of torch do, so a merge could not write it. Make the weight a parameter first "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm, "
            "torch.nn.utils.prune.remove), or leave the module out of target_modules."
        )
    if is_narrow(weight):
        raise TypeError(
            f"Target module '{name}' has a weight of {weight.dtype}, and PEFT knows no library that has quantized "
            "it so. Load the base in floating point, or quantize it with bitsandbytes, torchao or HQQ."
        )


def _check_contiguous(targets: Mapping[str, Target]) -> None:
    """Refuse weights whose flat positions are not their places in memory, so that a merge could not write them."""
    for name, target in targets.items():
        if target.kind != "quantized" and not getattr(target.module, target.parameter).is_contiguous():
            raise ValueError(
                f"The weight of target module '{name}' is not contiguous in memory, as a transposed tensor is not. "
                f"Give the module a contiguous one first: module.{target.parameter}.data = "
                f"module.{target.parameter}.data.contiguous()."
            )


def _check_channels(targets: Mapping[str, Target]) -> None:
    """Refuse weights that have no input channels, or others in each module that shares them."""
    for name, target in targets.items():
        if any(use.channel_dim is None or use.channel_dim != target.channel_dim for use in target.uses):
            what = {"fused": "holds the matrices of experts", "embedding": "is an embedding, whose inputs are tokens"}
            why = what.get(target.kind, "is shared with an embedding, whose inputs are tokens")
            raise ValueError(
                f"granularity='input_channel': target '{name}' {why}, so it has no input channels to choose. Take it "
                "out of target_modules and target_parameters, or train single weights of it with granularity='weight'; "
                "for whole tokens there is trainable_token_indices."
            )


def _check_matched(modules: set[str] | list[str] | str, names: list[str], model: nn.Module) -> None:
    """Name the `target_modules` that match nothing: an error where nothing at all is left, otherwise a warning."""
    asked = [modules] if isinstance(modules, str) else sorted(modules)
    known = adaptable_names(model)
    if not names:
        linears = [name for name in known if target_kind(unwrapped(model.get_submodule(name))) in LINEAR]
        leaves = sorted({_leaf(name) for name in linears})
        raise NoMatchingPeftModuleError(
            f"Target modules {asked} not found in the base model, or all of them are excluded. Its linear modules are "
            f"called {leaves}; change target_modules or exclude_modules."
        )
    if isinstance(modules, str):
        return
    suffixes = {name[at:] for name in known for at in _starts_of_parts(name)}
    unmatched = [key for key in asked if key not in suffixes]
    endings = tuple(f".{key}" for key in unmatched)
    fused = sorted({name_in_layer(name) for name in fused_parameters(model) if name.endswith(endings)})
    if fused:
        raise ValueError(
            f"target_modules {unmatched}: the model has no such linear modules, but fused weights of experts, {fused}. "
            f"Take the names out of target_modules, and set target_parameters={fused} to train those weights."
        )
    if unmatched:
        warnings.warn(f"The following target_modules matched nothing and are ignored: {unmatched}.", stacklevel=2)


def _starts_of_parts(name: str) -> list[int]:
    return [0] + [at + 1 for at, letter in enumerate(name) if letter == "."]


def _in_layers(names: set[str], layers: list[int] | int) -> set[str]:
    wanted = {layers} if isinstance(layers, int) else set(layers)
    indices = {name: int(found[1]) for name in names if (found := LAYER_INDEX.search(name))}
    last = max(indices.values(), default=-1)
    if unknown := sorted(wanted - set(indices.values())):
        raise ValueError(f"layers_to_transform names layers {unknown}, but the model has layers 0 to {last}.")
    return {name for name, index in indices.items() if index in wanted}


def _in_last_layers(names: list[str], last_layers: int) -> list[str]:
    """The names in the last layers of their own list of layers."""
    numbered = [found for name in names if (found := LAYER_INDEX.search(name))]
    if names and not numbered:
        raise ValueError("last_layers needs targets in numbered layers, but none of the targets is in one.")
    counts: dict[str, int] = {}  # layers by list
    for found in numbered:
        stack = found.string[: found.start(1)]
        counts[stack] = max(counts.get(stack, 0), int(found[1]) + 1)
    for stack, count in counts.items():
        if last_layers > count:
            raise ValueError(f"last_layers={last_layers}, but '{stack.rstrip('.')}' has only {count} layers.")
    return [at.string for at in numbered if int(at[1]) >= counts[at.string[: at.start(1)]] - last_layers]
