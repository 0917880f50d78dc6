"""`push_to_hub` with the model card: transformers puts its template over the one that `save_pretrained` has written.

Beside `_registry` the one place that changes PEFT: one method of `PeftModel`.
"""

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.utils.hub import PushToHubMixin

from .config import DowserConfig


def keep_cards() -> None:
    """Let `PeftModel.push_to_hub` complete the card of a Dowser adapter last; nothing else changes."""
    setattr(PeftModel, "_upload_modified_files", _upload_with_card)  # noqa: B010


def _upload_with_card(model: PeftModel, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    config = model.peft_config.get("default")  # the one in the folder itself; others have folders of their own
    if isinstance(config, DowserConfig):
        model.create_or_update_model_card(str(working_dir))
        config.complete_card(Path(working_dir))
    return PushToHubMixin._upload_modified_files(model, working_dir, *args, **kwargs)
