"""The model card of a saved adapter: how it is loaded, and what it is."""

import re
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

TAGS = {"dowser", "sparse", "peft"}

_BEGIN, _END = "<!-- peft-dowser: begin -->", "<!-- peft-dowser: end -->"


def complete_card(folder: Path, task_type: str | None, facts: dict[str, str]) -> None:
    """Write at the top of the card from PEFT how the adapter is loaded and what it is; other text stays.

    Args:
        folder: folder of the adapter. Nothing happens if it has no card.
        task_type: from the adapter's config; it decides the class that loads the adapter.
        facts: what the card lists, by name.
    """
    path = folder / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path)
    card.data["tags"] = sorted(TAGS.union(card.data.get("tags") or []))
    _hide_local_base(card)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if weights.is_file():
        facts = facts | {"size": f"{weights.stat().st_size:,} bytes"}
    if _is_local(facts.get("base model", "")):
        facts = facts | {"base model": ""}
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    section = "\n".join([_BEGIN, _loading(task_type), "", *lines, _END])
    text = re.sub(f"{_BEGIN}.*?{_END}\n*", "", card.text, flags=re.DOTALL)
    card.text = f"{section}\n\n{text.lstrip()}"
    card.save(path)


def _hide_local_base(card: ModelCard) -> None:
    """Leave out a base that is a local folder: its path means nothing to others, and tells them about this machine."""
    base = str(card.data.get("base_model") or "")
    if _is_local(base):
        card.data.pop("base_model")
        card.data["tags"] = [tag for tag in card.data.get("tags") or [] if base not in tag]


def _loading(task_type: str | None) -> str:
    # PEFT refuses other classes for a known task.
    known = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task_type or "", PeftModel)
    return _LOADING.replace("AutoPeftModel", f"Auto{known.__name__}")


_LOADING = """\
## A sparse delta, made with peft-dowser

```python
import peft_dowser  # pip install peft-dowser; lets PEFT read the adapter
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("this repository, or its folder")
```

Without the first line PEFT raises `KeyError: 'DOWSER'`, also in code further down this card. This class does not load
every base (image-text models, for example); then load the base yourself and call
`PeftModel.from_pretrained(base, "this repository, or its folder")`."""


def _is_local(name: str) -> bool:
    """Whether this is a folder, or not a valid Hub id: a config may come from a stranger."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return bool(name)
    return name.startswith(".") or Path(name).exists()
