"""The one place that touches PEFT's closed list of methods.

PEFT has no entry point for methods from outside: `register_peft_method` accepts only members of the enum `PeftType`.
"""

from typing import Any

from peft import mapping
from peft.utils import PeftType

NAME = "DOWSER"
PREFIX = "dowser_"


def ensure_peft_type() -> None:
    """Make `PeftType.DOWSER` exist. Harmless when it does already, also when PEFT itself brings it."""
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
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = PREFIX
