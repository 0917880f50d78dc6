# ruff: noqa: F401
"""The one place for what PEFT does not promise to keep: private names, and the list of its methods.

Each name has its reason next to it; `tests/scenarios/test_private_names.py` reports names that have moved.
`DowserModel` also overrides private methods of `BaseTuner`; the same test compares them.
"""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel, mapping
from peft.tuners.lora import conversion  # how one layer becomes a LoRA layer, see `convert_exactly`
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,  # what "all-linear" means
    check_adapters_to_merge,  # leaves out adapters that are merged already, and warns as for LoRA
    check_target_module_exists,  # how a config names modules
)
from peft.utils import PeftType, register_peft_method
from peft.utils.other import (
    AuxiliaryTrainingWrapper,  # around modules that train as a whole, and around trainable tokens
    _get_submodules,  # a module with its parent, in which a wrapper takes its place
    _set_adapter,  # activates the modules that train as a whole, not only the layers of this package
    get_pattern_key,  # how `ratio_pattern` matches, the same as LoRA's `rank_pattern`
)
from peft.utils.quantization_utils import (
    QuantizationBackend,  # reads and writes quantized weights
    get_quantization_kwargs,  # how torchao quantizes a weight again
    resolve_quantization_backend,  # which library has quantized a layer
)
from torch import Tensor
from transformers.utils.hub import PushToHubMixin  # whose upload follows the card, see `keep_cards`

NAME = "DOWSER"


def ensure_peft_type() -> None:
    """Make `PeftType.DOWSER` exist; nothing happens if it exists already, even if PEFT itself has added it.

    PEFT has no entry point for methods of other packages: `register_peft_method` accepts only members of this enum.
    """
    if NAME in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)


def register(config_cls: type, model_cls: type) -> None:
    """Make PEFT find our classes under `PeftType.DOWSER`; a reload of the package replaces them.

    Raises:
        RuntimeError: this PEFT already has another method of that name.
    """
    peft_type = PeftType[NAME]
    known = mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if known is not None and known.__module__.partition(".")[0] != __package__:
        raise RuntimeError(
            f"This PEFT already has a method DOWSER, from '{known.__module__}'. Use that method, or a PEFT without it; "
            "peft-dowser does not replace it."
        )
    # PEFT refuses to register a method twice.
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING.pop(peft_type, None)
    mapping.PEFT_TYPE_TO_TUNER_MAPPING.pop(peft_type, None)
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop(peft_type, None)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)


def keep_cards(config_cls: type) -> None:
    """Let `PeftModel.push_to_hub` complete the card of a Dowser adapter last; nothing else changes.

    transformers replaces the card from `save_pretrained` by its template, or by the card on the Hub.
    """

    def upload(model: PeftModel, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        config: Any = model.peft_config.get("default")  # saved in the folder itself; others have their own folders
        if isinstance(config, config_cls):
            model.create_or_update_model_card(str(working_dir))
            config.complete_card(Path(working_dir))
        return PushToHubMixin._upload_modified_files(model, working_dir, *args, **kwargs)

    setattr(PeftModel, "_upload_modified_files", upload)  # noqa: B010


def adapters_of(wrapper: AuxiliaryTrainingWrapper) -> Collection[str]:
    """The adapters that have a copy of the wrapped module, or of tokens of it."""
    return wrapper._adapters


def saved_names_in(wrapper: AuxiliaryTrainingWrapper, adapter_name: str) -> dict[str, str]:
    """The names of an adapter's tensors in the wrapper, by their names in the adapter's file."""
    return wrapper.adapter_state_dict_load_map(adapter_name)


def convert_exactly(factors: Callable[[BaseTunerLayer, float, str], tuple[Tensor, Tensor, int] | None]) -> None:
    """Let `convert_to_lora` and `save_as_lora` take exact factors of a layer, where `factors` gives some.

    PEFT approximates every delta by its largest singular values, also one that is a product of two factors already.
    """
    original: Any = conversion._convert_module_to_lora
    original = getattr(original, "_approximate", original)  # a reload of the package replaces ours

    @wraps(original)
    def convert(module: BaseTunerLayer, rank: float, adapter_name: str = "default") -> tuple[Tensor, Tensor, int]:
        exact = factors(module, rank, adapter_name)
        return original(module, rank=rank, adapter_name=adapter_name) if exact is None else exact

    convert._approximate = original  # type: ignore[attr-defined]
    conversion._convert_module_to_lora = convert


@contextmanager
def bare_base(model: Any) -> Iterator[None]:
    """Run a model with its own weights: without adapters of any PEFT method, and without their whole modules."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    # Not `enable_adapters`, which changes `requires_grad`.
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
