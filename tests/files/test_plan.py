"""The plan of a fine-tuning beside the real thing."""

import gc
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import config, tiny_llama
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    WhisperConfig,
)

from peft_dowser import DowserConfig, DowserLayer, probe
from peft_dowser.cli import main
from peft_dowser.config import PROBED_SCORES
from peft_dowser.files.planning import ProbeCost, bytes_per_weight, kept_bytes, plan


def architecture():
    known = tiny_llama().config
    known.architectures = ["LlamaForCausalLM"]
    return known


def size_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(3, 27).view(2, 12)
    output = model(input_ids=ids, labels=ids)  # kept, and the logits with it, as a Trainer does
    output.loss.backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("given", [{"update_ratio": 0.1}, {"update_ratio": 0.37, "ratio_pattern": {"up_proj": 0.02}}])
def test_planned_state_is_that_of_the_real_tensors(dtype: str, optimizer: str, given: dict, tmp_path: Path) -> None:
    found = plan(architecture(), config(**given), optimizer=optimizer, dtype=dtype)
    base = tiny_llama(dtype=getattr(torch, dtype))
    assert found.parameters == base.num_parameters()
    assert found.weights == size_of(base.parameters())
    model = get_peft_model(base, config(score="magnitude", save_dtype="bfloat16", **given))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    real = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](trained, lr=1e-3)
    step(model, real)
    indices = [layer.index("default") for layer in model.modules() if isinstance(layer, DowserLayer)]
    assert found.adapted == sum(math.prod(index.layout.shape) for index in indices)
    assert found.trained == sum(parameter.numel() for parameter in trained)
    assert found.values == size_of(trained)
    assert found.gradients == size_of(parameter.grad for parameter in trained)
    assert found.positions == size_of(tensor for index in indices for tensor in index.buffers())
    assert found.optimizer == size_of(tensor for state in real.state.values() for tensor in state.values())
    model.save_pretrained(tmp_path)
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert found.file == len(written) - 8 - int.from_bytes(written[:8], "little")


@pytest.mark.quantized
def test_planned_state_of_the_8_bit_optimizer_is_the_real_one() -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    values = nn.Parameter(torch.randn(10_000))
    optimizer = optim.AdamW8bit([values])
    values.grad = torch.randn(10_000)
    optimizer.step()
    state = optimizer.state[values]
    per_weight = size_of(state[key] for key in ("state1", "state2", "absmax1", "absmax2")) / 10_000
    without = bytes_per_weight(0.1, "sgd", "float32")
    assert bytes_per_weight(0.1, "adamw_8bit", "float32") - without == pytest.approx(0.1 * per_weight, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "given", [{}, {"granularity": "input_channel"}, {"granularity": "input_channel", "channels": 9}]
)
def test_planned_activations_are_what_autograd_keeps(dtype: str, given: dict) -> None:
    found = plan(architecture(), config(**given), dtype=dtype, batch=2, tokens=12)
    model = get_peft_model(tiny_llama(dtype=getattr(torch, dtype)), config(score="magnitude", **given)).train()
    owned = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    ids = torch.arange(3, 27).view(2, 12)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    assert found.activations == sum(storage.nbytes() for key, storage in kept.items() if key not in owned)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # as torch 2.10 does itself
def test_experts_are_planned_in_every_dtype() -> None:
    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    settings |= {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 32}
    experts = Qwen3MoeConfig(vocab_size=128, intermediate_size=128, architectures=["Qwen3MoeForCausalLM"], **settings)
    chosen = config(target_parameters=["mlp.experts.gate_up_proj"])
    narrow, wide = (plan(experts, chosen, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert wide.weights == 2 * narrow.weights
    assert narrow.activations < wide.activations < 2 * narrow.activations


def test_gradient_checkpointing_keeps_the_inputs_of_the_layers() -> None:
    found = plan(architecture(), config(), dtype="float32", batch=2, tokens=12, gradient_checkpointing=True)
    model = tiny_llama()
    assert found.activations == kept_bytes(model, ["model.layers.0.mlp.up_proj.weight"], 2, 12, 4, checkpointing=True)
    without = plan(architecture(), config(), dtype="float32", batch=2, tokens=12)
    assert found.activations < without.activations / 3
    # One layer of the two is recomputed at a time, and the largest matrix has 32 x 64 entries.
    assert found.temporary - 2 * 4 * 32 * 64 == pytest.approx((without.activations - found.activations) / 2, abs=1)


def peak_of(work: Callable[[], None], path: Path) -> int:
    """Bytes of tensors, at their peak, beyond those that were there before."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(event["args"]["Total Allocated"] for event in events) - before


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.10
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocabulary", [64, 20_000])
def test_a_step_takes_what_is_planned(vocabulary: int, dtype: str, tmp_path: Path) -> None:
    known = architecture()
    known.vocab_size, known.hidden_size = vocabulary, 128
    found = plan(known, config(), dtype=dtype, batch=2, tokens=12)
    base = LlamaForCausalLM._from_config(known, dtype=getattr(torch, dtype))
    model = get_peft_model(base, config(score="magnitude")).train()
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    step(model, optimizer)  # makes the optimizer's state
    optimizer.zero_grad()
    measured = peak_of(lambda: step(model, optimizer), tmp_path / "trace.json")
    planned = found.gradients + found.activations + found.temporary
    assert 0.75 * planned < measured < 1.02 * planned


def test_torchs_adamw_takes_a_copy_of_the_values_unless_it_is_fused(tmp_path: Path) -> None:
    values = [nn.Parameter(torch.randn(20_000)) for _ in range(3)]
    for parameter in values:
        parameter.grad = torch.ones_like(parameter)
    found = {}
    for name in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(values, **{name: True})
        optimizer.step()
        found[name] = peak_of(optimizer.step, tmp_path / f"{name}.json")
    assert size_of(values) <= found["foreach"] < 1.01 * size_of(values)
    assert found["fused"] < 0.01 * size_of(values)
    planned = plan(architecture(), config(), tokens=1)
    assert planned.update == planned.values
    assert planned.total - planned.activations - planned.temporary == sum(
        (planned.weights, planned.values, planned.gradients, planned.optimizer, planned.positions)
    )
    assert plan(architecture(), config(), optimizer="adamw_8bit").update == 0
    small = replace(planned, activations=0, temporary=0)
    assert small.total == planned.total - planned.activations - planned.temporary + planned.update


def test_ddp_copies_the_gradients(tmp_path: Path) -> None:
    alone, together = plan(architecture(), config()), plan(architecture(), config(), ddp=True)
    assert (alone.buckets, together.buckets) == (0, alone.gradients)
    assert together.total == alone.total + alone.gradients
    architecture().save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--ddp"]) == 0


@pytest.mark.parametrize(("quantization", "additive"), [("none", False), ("4bit", False), ("8bit", True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_products_of_a_step_are_counted(quantization: str, additive: bool, checkpointing: bool) -> None:
    """Against those that run; a base with a hook runs itself, as one of 8 bits does."""
    base = nn.Sequential(nn.Linear(16, 32, bias=False)).to(torch.bfloat16)
    if additive:
        base[0].register_forward_hook(lambda module, args, output: None)
    model = get_peft_model(base, config(score="random", target_modules=["0"], task_type=None))
    x = torch.randn(12, 16, dtype=torch.bfloat16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        run = partial(checkpoint, model, use_reentrant=False) if checkpointing else model
        run(x).sum().backward()
    full = 2 * 16 * 32 * 12
    planned = plan(architecture(), config(), quantization=quantization, gradient_checkpointing=checkpointing)
    one = plan(architecture(), config()).step_flops / 3
    assert planned.step_flops / one == counter.get_total_flops() / full


@pytest.mark.parametrize("score", PROBED_SCORES)
def test_planned_probes_are_the_real_ones(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes, and in the prompts that run forward and backward."""
    base, given = tiny_llama(), config(score=score, num_probes=64, probe_length=32)
    cost = plan(architecture(), given).probes[score]
    tokens, directions = [], []
    grad = torch.autograd.grad

    def noted(output: torch.Tensor, starts: list[torch.Tensor], direction: torch.Tensor | None, **kwargs: Any) -> Any:
        directions.append(direction)
        return grad(output, starts, direction, **kwargs)

    base.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:-1].numel()))
    monkeypatch.setattr(torch.autograd, "grad", noted)
    found = probe(base, given)
    assert cost.backwards == 64 * len(directions)  # all prompts are in one batch
    assert cost.forwards <= sum(tokens) / 32 < 1.1 * cost.forwards
    modules = found.modules.values()
    assert cost.statistics == size_of(t for module in modules for t in vars(module).values() if t is not None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_probe_is_planned_as_so_many_tokens_of_training(checkpointing: bool) -> None:
    given = config(num_probes=64, num_rademacher=8, probe_length=64)
    found = plan(architecture(), given, gradient_checkpointing=checkpointing)
    products = {"dowser": 2 + 8, "shift": 2 + 8, "activity": 2, "wanda": 2, "gradient": 2 + 8 + 2}
    for score, count in products.items():  # the gradient of a loss takes two: of activations, and of weights
        cost = found.probes[score]
        assert cost.flops == 2.0 * found.adapted * 64 * 64 * count
        assert cost.training_tokens == round(64 * 64 * count / (4 if checkpointing else 3))
        assert cost.training_tokens == pytest.approx(cost.flops / (found.step_flops / 512), rel=1e-3)
    for score in ("random", "magnitude"):
        assert found.probes[score] == ProbeCost(0, 0, 0.0, 0, 0)


def test_an_encoder_does_not_write_its_prompts() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    found = plan(BertConfig(architectures=["BertForMaskedLM"], vocab_size=64, **sizes), config(), tokens=12)
    assert (found.probes["dowser"].forwards, found.probes["dowser"].backwards) == (4, 8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_products_of_a_step_with_channels_are_counted(checkpointing: bool) -> None:
    """All targets of a model, each with an input that requires a gradient."""
    given = {"granularity": "input_channel", "channels": 4}
    model, total = get_peft_model(tiny_llama(), config(score="random", **given)), 0
    for layer in model.modules():
        if isinstance(layer, DowserLayer):
            x = torch.randn(12, layer.in_features, requires_grad=True)
            with FlopCounterMode(display=False) as counter:
                run = partial(checkpoint, layer, use_reentrant=True) if checkpointing else layer
                run(x).sum().backward()
            total += counter.get_total_flops()
    assert plan(
        architecture(), config(**given), tokens=12, gradient_checkpointing=checkpointing
    ).step_flops == pytest.approx(total)


@pytest.mark.parametrize(("quantization", "bytes_per_weight"), [("8bit", 1), ("4bit", 0.5625)])
@pytest.mark.parametrize("tied", [True, False])
def test_linears_are_quantized_of_either_kind_and_the_head_is_not(
    quantization: str, bytes_per_weight: float, tied: bool
) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16}
    gpt2 = GPT2Config(architectures=["GPT2LMHeadModel"], **sizes, tie_word_embeddings=tied)
    matrices = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    others = (1 if tied else 2) * 64 * 32 + 16 * 32 + 2 * (96 + 32 + 128 + 32 + 4 * 32) + 2 * 32
    found = plan(gpt2, config(), quantization=quantization, tokens=16)
    assert (found.adapted, found.parameters) == (matrices, matrices + others)
    assert found.weights == 2 * others + bytes_per_weight * matrices


def test_a_model_that_does_not_read_tokens_alone_is_refused() -> None:
    sizes = {"d_model": 16, "num_mel_bins": 8, "vocab_size": 64, "pad_token_id": 0}
    layers = {f"{part}_{key}": 1 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    whisper = WhisperConfig(architectures=["WhisperForConditionalGeneration"], **sizes, **layers)
    with pytest.raises(ValueError, match="forward of WhisperForConditionalGeneration does not run with 12 token ids"):
        plan(whisper, config(), tokens=12)


def test_an_image_part_that_reads_its_weights_to_initialize_them_is_planned() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "tie_word_embeddings": True}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    gemma = Gemma3Config(architectures=["Gemma3ForConditionalGeneration"], text_config=text, vision_config=vision)
    found = plan(gemma, config(), tokens=12)
    assert found.adapted == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert found.parameters == Gemma3ForConditionalGeneration(gemma).num_parameters()


@pytest.mark.slow
def test_seven_billion_parameters_train_on_24_gigabytes() -> None:
    from transformers import LlamaConfig

    llama = LlamaConfig(architectures=["LlamaForCausalLM"])  # the defaults are those of Llama-7B
    found = plan(
        llama,
        DowserConfig(),
        optimizer="adamw_8bit",
        quantization="4bit",
        tokens=2048,
        gradient_checkpointing=True,
    )
    assert found.parameters == 6_738_415_616
    assert abs(found.trained - 0.1 * found.adapted) < 224  # every matrix is rounded
    assert found.total < 24e9
    assert plan(llama, DowserConfig(), tokens=2048).total > 24e9


def test_the_command_prints_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architecture().save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = plan(tmp_path, DowserConfig())
    assert printed == asdict(found) | {"total": found.total}
    assert main(["plan", str(tmp_path), "--json", "--target-modules", "all-linear"]) == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert main(["plan", str(tmp_path), "--update-ratio", "0.2", "--optimizer", "adamw_8bit"]) == 0
    table = capsys.readouterr().out
    assert "trained 4,100 of 20,480 adapted weights" in table  # every matrix is rounded
    assert main(["plan", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"  update       {found.update / 1e9:9.3f}  what a step of the optimizer takes beyond its state\n" in printed
    assert "counted for 1 x 512 tokens, a base in bfloat16, adamw, granularity 'weight'" in printed
    assert "adamw_8bit" in table
    numbers = {line.split("  ")[1].strip(): line.split()[-5:] for line in table.splitlines() if ", " in line[:20]}
    assert numbers["dowser, shift"] == ["128", "512", "0.0", "0.000", "13,653"]
    assert numbers["activity, wanda"] == ["128", "0", "0.0", "0.000", "2,731"]
    assert numbers["random, magnitude"] == ["0", "0", "0.0", "0.000", "0"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--optimizer", "adam"], "optimizer must be one of adamw, adamw_8bit, adafactor, sgd, got 'adam'"),
        (["--quantization", "2bit"], "quantization must be one of none, 8bit, 4bit"),
        (["--tokens", "0"], "batch and tokens must be at least 1"),
        (["--update-ratio", "2"], "update_ratio must be a number in"),
        (["--target-modules", "norm"], "Target module 'model.norm' is a LlamaRMSNorm."),
    ],
)
def test_what_cannot_be_planned(option: list[str], message: str, tmp_path: Path, capsys) -> None:
    architecture().save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), *option]) == 2
    assert message in capsys.readouterr().err
