"""The table in README.md next to the script of capabilities is what its script finds."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "features"))

import capabilities  # noqa: E402

README = (ROOT / "examples" / "features" / "README.md").read_text()
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
MARKS = {
    "4-bit base (bitsandbytes)": [
        pytest.mark.quantized,
        pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed"),
    ]
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in capabilities.CAPABILITIES])
def test_the_readme_says_what_was_tried(name: str) -> None:
    row = capabilities.table({name: capabilities.CAPABILITIES[name]}).splitlines()[-1]
    assert row in README.splitlines()


def test_no_other_sparse_method_has_what_dowser_lacks() -> None:
    table = README.partition(capabilities.BEGIN)[2].partition(capabilities.END)[0].splitlines()[2:]
    assert len(table) == len(capabilities.CAPABILITIES)
    lacking = [row.split("|")[1].strip() for row in table if row.split("|")[-2].strip() == "no"]
    assert lacking == ["`PeftMixedModel` with LoRA"]  # PEFT's list of mixable methods is closed
