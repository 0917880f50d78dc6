"""The README's code runs as it stands, with small local stand-ins under the names of its model and data set."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from peft_dowser.layers.layer import dowser_layers

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the Hub ids of the README are folders."""
    monkeypatch.chdir(tmp_path)
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
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_the_code_blocks_run_one_after_the_other(hub: Path) -> None:
    names: dict = {}
    for block in BLOCKS:
        exec(block.replace('output_dir="out"', 'output_dir="out", use_cpu=True, bf16=False, report_to=[]'), names)
    assert {path.name for path in Path("my-adapter").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert (hub / "my-model" / "model.safetensors").is_file()
    assert (hub / "qwen.safetensors").is_file()
    trained = sum(parameter.numel() for parameter in names["model"].parameters() if parameter.requires_grad)
    assert trained == sum(round(0.25 * layer.weight.numel()) for layer in dowser_layers(names["model"]))


def test_the_two_lines_of_a_new_user_stand_in_it() -> None:
    venv = "python -m venv .venv && . .venv/bin/activate && pip install"
    assert f'    {venv} ".[examples]" && python examples/quickstart.py\n' in README
    assert f'    {venv} -e ".[test]" && pytest\n' in README
