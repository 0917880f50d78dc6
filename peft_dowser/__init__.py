"""Model-Dowser for Hugging Face PEFT: fine-tune the weights that matter least, and forget less.

Importing this package registers the method with PEFT; then `get_peft_model(model, DowserConfig(...))`, TRL's trainers,
`save_pretrained`, `from_pretrained` and `merge_and_unload` work as they do for LoRA. It also lets `push_to_hub` keep
the model cards of Dowser adapters, and the methods that load one undo what they did where they fail; nothing else of
PEFT changes.
"""

from ._peft import ensure_peft_type

ensure_peft_type()  # before config.py, whose class refers to PeftType.DOWSER

from . import arithmetic, metrics, postmerge, scores  # noqa: E402
from ._peft import keep_cards, register  # noqa: E402
from ._version import __version__  # noqa: E402, F401
from .codec import DeltaFormatError  # noqa: E402
from .config import DowserConfig  # noqa: E402
from .extract import extract  # noqa: E402
from .forgetting import ForgettingCallback  # noqa: E402
from .hotswap import hotswap  # noqa: E402
from .layer import DowserLayer  # noqa: E402
from .loading import watch_loads  # noqa: E402
from .merging import merge, verify  # noqa: E402
from .model import DowserModel  # noqa: E402
from .patch import Patch  # noqa: E402
from .probe import probe  # noqa: E402
from .spider import SpiderCallback  # noqa: E402
from .statistics import ProbeStatistics  # noqa: E402

__all__ = [
    "DeltaFormatError",
    "DowserConfig",
    "DowserLayer",
    "DowserModel",
    "ForgettingCallback",
    "Patch",
    "ProbeStatistics",
    "SpiderCallback",
    "arithmetic",
    "extract",
    "hotswap",
    "merge",
    "metrics",
    "postmerge",
    "probe",
    "scores",
    "verify",
]

register(DowserConfig, DowserModel)
keep_cards(DowserConfig)
watch_loads()
