"""Tensors that a saved adapter trains as a whole, next to its deltas: which ones it may bring into a model.

PEFT loads every tensor whose name the model has, even the weights of the base. An adapter may bring the biases and the
modules that its config says it trains, and the embeddings, which PEFT saves where tokens were added.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from .._peft import AuxiliaryTrainingWrapper, saved_names_in
from ..base.compiled import uncompiled_name
from ..base.module_names import embedding_modules
from ..config import DowserConfig
from ..delta.format import PREFIX, base_name, is_delta
from ..files.checks import check_foreign, check_whole_tensor
from ..layers.layer import layers_with_adapter


def whole_tensors_in_model(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The whole tensors of a saved adapter under their names in a model, in the dtypes that they have there.

    `tensors` are those of the file, by their names there or in the model, and `state` has all tensors of the model,
    the layers in place, by name.
    """
    tensors = {key: tensor for key, tensor in tensors.items() if not is_delta(key)}
    where = f"Adapter '{adapter_name}'"
    names = _names_of(tensors, _brought(model, adapter_name, state))
    check_foreign([key for key in tensors if key not in names], where)
    # PEFT saves some of the embeddings twice, and the one that it loads comes last.
    found = {}
    for key in sorted(tensors, key=lambda key: key in state):
        own = state[names[key]]
        check_whole_tensor(tensors[key], own, key, where)
        found[names[key]] = tensors[key].to(own.dtype)
    return found


def check_replaced(model: nn.Module, adapter_name: str, replaced: Sequence[str]) -> None:
    names = _names_of(replaced, _brought(model, adapter_name, model.state_dict()))
    check_foreign([name for name in replaced if name not in names], f"Adapter '{adapter_name}'")


def check_whole_modules(model: nn.Module, config: DowserConfig) -> None:
    """Refuse modules and tokens to train as a whole that a model does not have, before any module is replaced.

    A name in `modules_to_save` that is not a module is ignored: PEFT itself adds names of heads that a model may have.
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
    embeddings = dict(embedding_modules(model)) if isinstance(tokens, list) else {}
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
        problem = f"{outside[:5]} are not tokens" if outside else "tokens are listed twice"
        raise ValueError(
            f"trainable_token_indices: {problem} in module '{name}', whose weight has {rows} rows. Resize the "
            "embeddings as they were when the adapter was made, or name each of its tokens once."
        )


def _brought(model: nn.Module, adapter_name: str, state: Iterable[str]) -> dict[str, str]:
    """What a file of an adapter may bring besides its deltas, as PEFT saves it: names in the model by `_plain` name.

    These are the biases that its config says it trains, modules and tokens that it trains as a whole, and the
    embeddings with all that PEFT has put around them. `state` has the names of all tensors of the model.
    """
    configs = cast(Mapping[str, DowserConfig], model.peft_config)
    bias = configs[adapter_name].bias
    others = [f".{name}." for name in configs if name != adapter_name]
    embeddings = tuple(f"{name}." for name, _ in embedding_modules(model))
    saved = saved_names(model, adapter_name)
    own = {*saved.values()}
    if bias == "dowser_only":
        own |= {f"{name}.base_layer.bias" for name in layers_with_adapter(model, adapter_name)}
    brought = {}
    for name in state:
        is_own = name in own or name.startswith(embeddings) or (bias == "all" and f".{name}".endswith(".bias"))
        if is_own and not is_delta(name) and not any(other in f"{name}." for other in others):
            plain = _plain(uncompiled_name(name).removesuffix(f".{adapter_name}"))
            brought[plain] = name
            brought.setdefault(_bare(plain), name)
    # Under their whole names, so that the original of a module is not taken for the adapter's copy.
    return brought | {PREFIX + key.removeprefix(PREFIX): name for key, name in saved.items()}


def _names_of(keys: Iterable[str], brought: Mapping[str, str]) -> dict[str, str]:
    """The names in the model of tensors in a file, without the tensors that the adapter does not train there.

    Where adapters wrap a module in only one of the saved model and this one, PEFT would find no place for its tensors.
    """
    known = set(brought.values())
    found = {}
    for key in keys:
        plain = _plain(uncompiled_name(key))
        kinds = (PREFIX + key.removeprefix(PREFIX), plain, _bare(plain))
        name = key if key in known else next((brought[kind] for kind in kinds if kind in brought), None)
        if name is not None:
            found[key] = name
    return found


def _plain(key: str) -> str:
    """A tensor's name without the adapter's name, which PEFT leaves in the names of tensors deeper in a module."""
    start, found, rest = key.removeprefix(PREFIX).partition(_COPY)
    return start + found + (rest.partition(".")[2] or rest)


def _bare(plain: str) -> str:
    """The tensor's name in the base, without what adapters have put around its module."""
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
