"""What every test shares; that it lies here makes `models` and the other modules beside it importable."""

import os

import huggingface_hub.constants
import pytest

# Tests probe anew, and leave the cache of whoever runs them alone; programs that they start inherit this.
os.environ["DOWSER_CACHE"] = "off"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
