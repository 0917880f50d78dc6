"""Model-Dowser for Hugging Face PEFT: fine-tune the weights that matter least, and forget less.

Importing this package registers the method with PEFT; then `get_peft_model(model, DowserConfig(...))`, TRL's trainers,
`save_pretrained`, `from_pretrained` and `merge_and_unload` work as they do for LoRA. It also lets `push_to_hub` keep
the model cards of Dowser adapters, and lets the methods that load an adapter undo what they did when they fail. Nothing
else in PEFT changes.
"""

from ._peft import ensure_peft_type

ensure_peft_type()  # before config.py, whose class refers to PeftType.DOWSER

from . import baselines, delta, evaluation  # noqa: E402
from ._peft import convert_exactly, keep_cards, register  # noqa: E402
from ._tested import report_untested  # noqa: E402
from ._version import __version__  # noqa: E402, F401
from .config import DowserConfig  # noqa: E402
from .delta.codec import DeltaFormatError  # noqa: E402
from .evaluation.forgetting import ForgettingCallback  # noqa: E402
from .evaluation.rehearsal import RehearsalCallback  # noqa: E402
from .files.extraction import extract  # noqa: E402
from .files.inspection import diff, inspect  # noqa: E402
from .files.lora_export import export_lora  # noqa: E402
from .files.merging import merge, verify  # noqa: E402
from .files.patching import read_patch, write_patch  # noqa: E402
from .files.planning import plan  # noqa: E402
from .layers.layer import DowserLayer, exact_factors  # noqa: E402
from .probing.run import probe  # noqa: E402
from .probing.statistics import ProbeStatistics  # noqa: E402
from .tuner.loading import watch_loads  # noqa: E402
from .tuner.model import DowserModel  # noqa: E402
from .tuner.switching import Patch, hotswap  # noqa: E402

__all__ = [
    "DeltaFormatError",
    "DowserConfig",
    "DowserLayer",
    "DowserModel",
    "ForgettingCallback",
    "Patch",
    "ProbeStatistics",
    "RehearsalCallback",
    "baselines",
    "delta",
    "diff",
    "evaluation",
    "export_lora",
    "extract",
    "hotswap",
    "inspect",
    "merge",
    "plan",
    "probe",
    "read_patch",
    "verify",
    "write_patch",
]

register(DowserConfig, DowserModel)
convert_exactly(exact_factors)
keep_cards(DowserConfig)
watch_loads()
report_untested()


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__version__"]
