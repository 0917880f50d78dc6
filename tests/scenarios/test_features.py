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


# By column. PEFT's list of mixable methods is closed; the inputs of an embedding are tokens, which no channel is, and a
# product that is added to the output of the base layer is rounded twice.
LACKING = {
    "Dowser": ["`PeftMixedModel` with LoRA"],
    "Dowser, input channels": [
        "embeddings",
        "tied weights (`ensure_weight_tying`)",
        "tied weights, merged",
        "fused experts (`target_parameters`)",
        "`PeftMixedModel` with LoRA",
        "merged bfloat16 model gives the same bits",
    ],
}


@pytest.mark.parametrize("method", LACKING)
def test_what_dowser_lacks(method: str) -> None:
    table = README.partition(capabilities.BEGIN)[2].partition(capabilities.END)[0].splitlines()
    column = [cell.strip() for cell in table[0].split("|")].index(method)
    assert len(table) == 2 + len(capabilities.CAPABILITIES)
    lacking = [row.split("|")[1].strip() for row in table[2:] if row.split("|")[column].strip() == "no"]
    assert lacking == LACKING[method]
