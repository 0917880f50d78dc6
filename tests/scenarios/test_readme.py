"""The code in every document runs as it stands, and every link leads somewhere.

Small local stand-ins lie under the names of the model and the data set.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from peft_dowser.layers.layer import dowser_layers

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(path for folder in ("", "peft_dowser", "examples") for path in (ROOT / folder).glob("**/*.md"))
DOCUMENTS = [path for path in dict.fromkeys(DOCUMENTS) if ".venv" not in path.parts and "results" not in path.parts]
README = ROOT / "README.md"
# Documents whose code needs more than a reader's folder, and the test that runs it.
ELSEWHERE = {"peft_dowser/files/PATCH.md": "tests/files/test_patching.py"}
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def run(path: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run the code of a document, block by block, with what stands for a machine of a reader."""
    for block in blocks(path):
        exec(block.replace('output_dir="out"', 'output_dir="out", report_to=[]'), names)
    return names


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the Hub ids of the documents are folders, and the README's code has run."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("reader")
        patch.chdir(folder)
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_llava")
        tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = Qwen3ForCausalLM(
            Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, **shape, **tokens)
        )
        base.save_pretrained("Qwen/Qwen3-0.6B")
        tokenizer.save_pretrained("Qwen/Qwen3-0.6B")
        settings = json.loads(Path("Qwen/Qwen3-0.6B/tokenizer_config.json").read_text())
        del settings["processor_class"]  # that of an image-text model; this one reads text
        Path("Qwen/Qwen3-0.6B/tokenizer_config.json").write_text(json.dumps(settings))
        Path("trl-lib/Capybara").mkdir(parents=True)
        turns = [{"role": "user", "content": "rev ab?"}, {"role": "assistant", "content": "ba"}]
        Path("trl-lib/Capybara/train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
        Path("examples").symlink_to(ROOT / "examples")
        run(README, {})
        return folder


@pytest.mark.filterwarnings("ignore")
def test_the_readme_trains_asks_merges_and_exports(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert {"adapter_model.safetensors", "tokenizer.json"} <= {path.name for path in (trained / "my-adapter").iterdir()}
    merged = AutoModelForCausalLM.from_pretrained(trained / "my-model")
    assert not dowser_layers(merged)
    assert (trained / "my-model" / "tokenizer.json").is_file()
    assert json.loads((trained / "my-lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "README.md" and name not in ELSEWHERE])
def test_the_code_of_a_document_runs(name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not blocks(ROOT / name):
        return
    monkeypatch.chdir(trained)
    base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
    shards = "fully_shard" in (ROOT / name).read_text()
    if shards:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        run(ROOT / name, {"base": base, "trainer": trainer_of(base)})
    finally:
        if shards:
            dist.destroy_process_group()


def trainer_of(base: Any) -> Any:
    """A trainer to which a document adds its callbacks."""
    from transformers import Trainer, TrainingArguments

    return Trainer(base, TrainingArguments("out", use_cpu=True, report_to=[]))


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_two_lines_of_a_new_user_stand_in_it() -> None:
    venv = "python -m venv .venv && . .venv/bin/activate && pip install"
    assert f'    {venv} ".[examples]" && python examples/quickstart.py\n' in README.read_text()
    assert f'    {venv} -e ".[test]" && pytest -n 2 --dist loadfile\n' in README.read_text()
