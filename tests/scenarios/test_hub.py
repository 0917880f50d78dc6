"""A round trip through a Hub: push, load by name, inspect, merge, in a program of its own that is online."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import hub
from models import tiny_llama

PROGRAM = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from peft_dowser import DowserConfig
from peft_dowser.cli import main

ids = torch.arange(3, 19)[None]
base = AutoModelForCausalLM.from_pretrained("someone/base")
model = get_peft_model(base, DowserConfig(score="random", task_type="CAUSAL_LM"))
for parameter in model.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, std=0.05)
model.eval()
model.push_to_hub("someone/adapter", token="hf_none")
get_peft_model(AutoModelForCausalLM.from_pretrained("someone/base"), LoraConfig()).push_to_hub("someone/lora")
expected = model(input_ids=ids).logits
loaded = AutoPeftModelForCausalLM.from_pretrained("someone/adapter")
assert torch.equal(loaded(input_ids=ids).logits, expected)
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("someone/base"), "someone/adapter")
assert torch.equal(again(input_ids=ids).logits, expected)
assert main(["inspect", "someone/adapter", "--base", "someone/base"]) == 0
assert main(["verify", "someone/adapter"]) == 0
assert main(["merge", "someone/adapter", "-o", sys.argv[1]]) == 0
assert torch.equal(AutoModelForCausalLM.from_pretrained(sys.argv[1])(input_ids=ids).logits, expected)
"""


@pytest.mark.slow
def test_a_round_trip(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    with hub() as server:
        files = (tmp_path / "base").iterdir()
        server.repositories["someone/base"] = {path.name: path.read_bytes() for path in files}
        server.repositories["someone/adapter"] = {"README.md": b"---\nlicense: mit\n---\n\n# Mine\n"}
        settings = {"HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "merged")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
        assert done.returncode == 0, done.stderr
        pushed = server.repositories["someone/adapter"]
    assert pushed.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = pushed["README.md"].decode()
    for text in (
        "license: mit",
        "library_name: peft",
        "base_model: someone/base",
        "- base model: someone/base",
        "# Mine",
    ):
        assert text in card
    assert card.index("import peft_dowser") < card.index("# Mine")
    assert "peft_dowser" not in server.repositories["someone/lora"]["README.md"].decode()
    assert "base_model_name_or_path: someone/base" in done.stdout
