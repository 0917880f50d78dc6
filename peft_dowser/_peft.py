# ruff: noqa: F401
"""The one place that touches what PEFT does not promise to keep: private names, and the list of its methods.

Each name has its reason beside it; `tests/scenarios/test_private_names.py` names those that have moved. `DowserModel`
overrides private methods of `BaseTuner` besides, which the same test compares.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, mapping
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,  # what "all-linear" means
    check_adapters_to_merge,  # leaves out what is merged already, and warns as for LoRA
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
from transformers.utils.hub import PushToHubMixin  # whose upload follows the card, see `keep_cards`

NAME = "DOWSER"


def ensure_peft_type() -> None:
    """Make `PeftType.DOWSER` exist. Harmless when it does already, also when PEFT itself brings it.

    PEFT has no entry point for methods from outside: `register_peft_method` accepts only members of this enum.
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
        RuntimeError: this PEFT already has a method of that name that is not ours.
    """
    peft_type = PeftType[NAME]
    known = mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if known is not None and known.__module__.partition(".")[0] != __package__:
        raise RuntimeError(
            f"This PEFT already has a method DOWSER, from '{known.__module__}'. Use that one, or a PEFT without it; "
            "peft-dowser does not replace it."
        )
    # PEFT registers a method once only.
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING.pop(peft_type, None)
    mapping.PEFT_TYPE_TO_TUNER_MAPPING.pop(peft_type, None)
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop(peft_type, None)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)


def keep_cards(config_cls: type) -> None:
    """Let `PeftModel.push_to_hub` complete the card of a Dowser adapter last; nothing else changes.

    transformers puts its template, or the card on the Hub, over the card that `save_pretrained` has written.
    """

    def upload(model: PeftModel, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        config: Any = model.peft_config.get("default")  # the one in the folder itself; others have their own folders
        if isinstance(config, config_cls):
            model.create_or_update_model_card(str(working_dir))
            config.complete_card(Path(working_dir))
        return PushToHubMixin._upload_modified_files(model, working_dir, *args, **kwargs)

    setattr(PeftModel, "_upload_modified_files", upload)  # noqa: B010


def adapters_of(wrapper: AuxiliaryTrainingWrapper) -> Collection[str]:
    """The adapters that have a copy of a module that trains as a whole, or tokens of it."""
    return wrapper._adapters


def saved_names_in(wrapper: AuxiliaryTrainingWrapper, adapter_name: str) -> dict[str, str]:
    """The names, in the wrapper, of the tensors that a file of the adapter has, by their names in the file."""
    return wrapper.adapter_state_dict_load_map(adapter_name)


@contextmanager
def bare_base(model: Any) -> Iterator[None]:
    """Run a model by its own weights, whatever PEFT methods have adapted it, or train modules of it as a whole."""
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
