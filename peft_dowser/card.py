"""The model card of a saved adapter: how it is loaded, and what it is."""

import math
import re
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

TAGS = {"dowser", "sparse", "peft"}

# What the card calls the numbers of `ForgettingCallback`.
MEASURED = "measured in training"

# A card may come from a stranger: no more of it is read.
_LONGEST_CARD = 100_000

# By name it would be another package: nobody has registered "peft-dowser" on PyPI. When the repository has an address,
# or the name is registered, this line says so.
INSTALL = "pip install ./peft-dowser"

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


def measured(folder: Path) -> dict[str, float]:
    """What the card in a folder says was measured in training, by name; empty where it does not say so."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        ours = re.search(f"{_BEGIN}(.*?){_END}", file.read(_LONGEST_CARD), re.DOTALL)
    line = re.search(f"^- {MEASURED}: (.*)$", ours[1], re.MULTILINE) if ours else None
    pairs = re.findall(r"(\w{1,40}) (-?[0-9.]+(?:e[+-]?[0-9]+)?)(?:, |$)", line[1]) if line else []
    return {name: number for name, text in pairs if (number := _number(text)) is not None}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:  # 1.2.3
        return None
    return number if math.isfinite(number) else None


def _hide_local_base(card: ModelCard) -> None:
    """Leave out a base that is a local folder: its path means nothing to others, and tells them about this machine."""
    base = str(card.data.get("base_model") or "")
    if _is_local(base):
        card.data.pop("base_model")
        card.data["tags"] = [tag for tag in card.data.get("tags") or [] if base not in tag]


def _loading(task_type: str | None) -> str:
    # PEFT refuses other classes for a known task.
    known = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task_type or "", PeftModel)
    return _LOADING.replace("AutoPeftModel", f"Auto{known.__name__}").replace("INSTALL", INSTALL)


_LOADING = """\
## A sparse delta, made with peft-dowser

```python
import peft_dowser  # lets PEFT read the adapter
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("this repository, or its folder")
```

Without the first line PEFT raises `KeyError: 'DOWSER'`, also in code further down this card. This class does not load
every base (image-text models, for example); then load the base yourself and call
`PeftModel.from_pretrained(base, "this repository, or its folder")`.

Install peft-dowser from a copy of its source, in the folder above it: `INSTALL`. Do not install it by its name
alone: when this card was written, the name was not registered on PyPI, and what has it now may be another package."""


def _is_local(name: str) -> bool:
    """Whether this is a folder, or not a valid Hub id: a config may come from a stranger."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return bool(name)
    return name.startswith(".") or Path(name).exists()
