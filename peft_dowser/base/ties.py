"""Weights that several modules share: one delta for all of them, or a refusal."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from .._transformers import still_tied_weights, tied_weights
from .compiled import uncompiled_name
from .module_names import adaptable_names, name_without_adapter, unwrapped
from .target import Target


def with_ties(model: nn.Module, targets: Mapping[str, Target], find: Callable[[str], Target]) -> dict[str, Target]:
    """The targets, each weight once: under the first of the modules that use it, which has the others as its ties.

    `find` gives the target of a module by name.
    """
    users: dict[int, list[str]] = {}
    for name in adaptable_names(model):
        weight = getattr(unwrapped(model.get_submodule(name)), "weight", None)
        users.setdefault(id(weight), []).append(name)
    found = {}
    for name, target in targets.items():
        alone = target.weight is None or target.kind == "fused"
        first, *others = [name] if alone else users[id(target.weight)]
        if others and first not in found:
            found[first] = replace(find(first), tied=tuple(find(other) for other in others))
        elif not others:
            found[name] = target
    return found


def check_untied(model: nn.Module, targets: Mapping[str, Target]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name_without_adapter(uncompiled_name(name)))
    for name, target in targets.items():
        known = {use.tensor_name for use in target.uses}
        others = sorted({*names.get(id(target.weight), []), *_offloaded_ties(model, target)} - known)
        if others:
            raise ValueError(
                f"The weight of target module '{name}' is tied: it is shared with {others}, which would not see the "
                "delta until a merge. Set ensure_weight_tying=True to give all of them one delta, leave the module "
                "out, or untie the model first: give the module a copy of its weight and set tie_word_embeddings=False "
                "in the model's config."
            )


def _offloaded_ties(model: nn.Module, target: Target) -> set[str]:
    """What an offloaded weight is tied to: accelerate keeps a placeholder for each name, so only transformers knows."""
    if target.weight is None or not target.weight.is_meta or not isinstance(model, PreTrainedModel):
        return set()
    # Of the pairs that the weights were loaded with, those that the config still ties.
    still = still_tied_weights(model)
    pairs = [{one, other} for one, other in tied_weights(model).items() if one in still]
    return set().union(*(pair for pair in pairs if target.tensor_name in pair))
