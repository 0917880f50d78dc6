"""The experiments for PEFT's MetaMathQA benchmark are what its script reads."""

import json
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from models import tiny_llama
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dowser import DowserConfig
from peft_dowser.base.search import resolve_targets

FOLDER = Path(__file__).parents[2] / "examples" / "method_comparison"
RATIOS = {
    "llama-3.2-3B-rho0.1": 0.1,
    "llama-3.2-3B-shift-rho0.1": 0.1,
    "llama-3.2-3B-q_v-rho0.026": 5 / 192,
    "llama-3.2-3B-q_v-channels32": 0.1,  # the default, in whose place are the channels
}
VALUES = {
    "llama-3.2-3B-rho0.1": 281_857_184,
    "llama-3.2-3B-shift-rho0.1": 281_857_184,
    "llama-3.2-3B-q_v-rho0.026": 9_175_040,
    "llama-3.2-3B-q_v-channels32": 3_670_016,
}
# Fields of the benchmark's `TrainConfig`, at PEFT's commit 5d602fdb; it refuses any other.
TRAINING_PARAMS = {
    "model_id",
    "dtype",
    "max_seq_length",
    "batch_size",
    "batch_size_eval",
    "max_steps",
    "eval_steps",
    "compile",
    "use_gc",
    "query_template",
    "seed",
    "grad_norm_clip",
    "optimizer_type",
    "optimizer_kwargs",
    "lr_scheduler",
    "use_amp",
    "autocast_adapter_dtype",
    "generation_kwargs",
    "attn_implementation",
    "init_kv_cache_prefix",
}


def read(name: str, file: str) -> dict:
    return json.loads((FOLDER / name / file).read_text())


def load(name: str) -> DowserConfig:
    """As the benchmark does it, without knowing the method."""
    found = PeftConfig.from_pretrained(str(FOLDER / name))
    assert isinstance(found, DowserConfig)
    return found


def test_every_experiment_of_the_folder_is_tested_and_in_the_readme() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/adapter_config.json")} == RATIOS.keys()
    readme = (FOLDER / "README.md").read_text()
    for name, count in VALUES.items():
        assert f"| `{name}` |" in readme
        assert f"| {count:,} |" in readme


@pytest.mark.parametrize("name", RATIOS)
def test_a_config_says_only_what_differs_from_the_defaults(name: str) -> None:
    written, default = read(name, "adapter_config.json"), DowserConfig().to_dict()
    assert written.keys() <= {field.name for field in fields(DowserConfig)}
    assert written.pop("peft_type") == "DOWSER"
    assert all(value != default[key] for key, value in written.items() if key != "update_ratio")
    config = load(name)
    config.check()
    assert config.update_ratio == RATIOS[name]
    assert config.task_type == "CAUSAL_LM"  # without it, `generate` forms W + D for every token
    assert config.probe_batch_size == 8  # or the peak of the memory is that of the probe
    json.dumps(config.to_dict())  # the benchmark stores it


@pytest.mark.parametrize("name", RATIOS)
def test_training_parameters_are_ones_that_the_benchmark_knows(name: str) -> None:
    written = read(name, "training_params.json")
    assert written.keys() <= TRAINING_PARAMS
    torch.optim.AdamW([torch.zeros(1)], **written["optimizer_kwargs"])


@pytest.mark.parametrize("name", RATIOS)
def test_the_number_of_values_is_that_of_the_readme(name: str) -> None:
    shapes = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shapes)
    config = load(name)
    targets = resolve_targets(model, config).values()
    if config.channels:
        assert sum(config.channels * target.shape[0] for target in targets) == VALUES[name]
    else:
        assert sum(round(config.update_ratio * target.numel) for target in targets) == VALUES[name]


@pytest.mark.parametrize("name", RATIOS)
def test_an_experiment_trains_a_bfloat16_llama(name: str, tmp_path: Path) -> None:
    config = load(name)
    config.num_probes, config.num_rademacher, config.probe_length = 4, 2, 12
    model = get_peft_model(tiny_llama(torch.bfloat16), config, autocast_adapter_dtype=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    tokens = torch.arange(3, 11)[None]
    with torch.inference_mode(), model.disable_adapter():
        before = model(input_ids=tokens, labels=tokens).loss.item()
    optimizer = torch.optim.AdamW(model.parameters(), **read(name, "training_params.json")["optimizer_kwargs"])
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert all(bool(parameter.any()) for parameter in trained)
    model.eval()
    with torch.inference_mode():
        model.generate(input_ids=tokens, max_new_tokens=2)
        with model.disable_adapter():
            assert model(input_ids=tokens, labels=tokens).loss.item() == before
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0


def test_the_command_of_the_readme_lets_a_script_read_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.search(r'python -c "(?P<code>.*)" -v --clean (?P<path>\S+)', (FOLDER / "README.md").read_text())
    assert found
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "from peft import PeftConfig\n"
        "assert __name__ == '__main__'\n"
        "ran.append((sys.argv[1:], PeftConfig.from_pretrained(sys.argv[-1]).update_ratio))\n"
    )
    experiment = tmp_path / found["path"]
    experiment.mkdir(parents=True)
    (experiment / "adapter_config.json").write_text((FOLDER / experiment.name / "adapter_config.json").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-c", "-v", "--clean", found["path"]])
    ran: list = []
    run_path = runpy.run_path
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: run_path(path, {"ran": ran}, run_name))
    exec(found["code"], {})
    assert ran == [(["-v", "--clean", "experiments/dowser/llama-3.2-3B-rho0.1"], 0.1)]
