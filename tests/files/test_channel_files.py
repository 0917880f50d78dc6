"""Files of input channels: what merges, describes, compares, plans and shows them, and how small they are."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import (
    adapted,
    assert_same_bits,
    base_bits,
    bits,
    config,
    edit_config,
    edit_tensors,
    gpt2,
    logits,
    saved,
    tiny_llama,
)
from peft import PeftModel, convert_to_lora, get_peft_model, save_as_lora
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peft_dowser import DeltaFormatError, DowserConfig, diff, export_lora, inspect, merge, plan, verify
from peft_dowser.cli import main
from peft_dowser.layers.layer import dowser_layers

FILE = "adapter_model.safetensors"
CHANNELS = {"granularity": "input_channel", "channels": 4}
MODULE = "model.layers.0.mlp.down_proj"
VALUES, CODE = (f"base_model.model.{MODULE}.dowser_{part}" for part in ("values.weight", "index.code"))

over_bases = pytest.mark.parametrize("base", [tiny_llama, gpt2], ids=["llama", "gpt2"])


def channels_in(folder: Path, module: str, size: int) -> list[int]:
    """The numbers in the index code of a file, bit by bit: 4 of 32 are a mask, 4 of 64 Elias-Fano."""
    code = load_file(folder / FILE)[f"base_model.model.{module}.dowser_index.code"].tolist()
    if size == 32:
        return [at for at in range(32) if code[at // 8] >> at % 8 & 1]
    low, high = int.from_bytes(bytes(code[:4]), "little"), int.from_bytes(bytes(code[4:]), "little")
    ones = [at for at in range(8 * len(code[4:])) if high >> at & 1]
    return [(one - number << 4) + (low >> 4 * number & 15) for number, one in enumerate(ones)]


# What is in a file


def test_a_file_holds_values_by_channel_and_a_code_over_the_inputs(tmp_path: Path) -> None:
    """As FORMAT.md says it, read with nothing of this package."""
    model = saved(tmp_path, **CHANNELS)
    tensors = load_file(tmp_path / FILE)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(tensors) == 28 and settings["granularity"] == "input_channel" and settings["channels"] == 4
    layers = {layer.module_name: layer for layer in dowser_layers(model)}
    for name, entry in settings["manifest"]["modules"].items():
        out, size = entry["shape"]
        assert entry["channel_dim"] == 1 and entry["nnz"] == settings["nnz_pattern"][name] == 4 * out
        values = tensors[f"base_model.model.{name}.dowser_values.weight"]
        assert torch.equal(values, layers[name].values("default")) and values.shape == (out, 4)
        assert channels_in(tmp_path, name, size) == layers[name].index("default").decoded().tolist()


def test_a_stored_transpose_has_its_channels_in_the_rows(tmp_path: Path) -> None:
    saved(tmp_path, gpt2(), **CHANNELS)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())["manifest"]["modules"]
    assert {entry["channel_dim"] for entry in entries.values()} == {0}
    assert entries["transformer.h.0.attn.c_attn"]["shape"] == [32, 96]
    values = load_file(tmp_path / FILE)["base_model.model.transformer.h.0.attn.c_attn.dowser_values.weight"]
    assert values.shape == (96, 4)


def test_single_weights_have_no_dimension_in_their_manifest(tmp_path: Path) -> None:
    saved(tmp_path)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())["manifest"]["modules"]
    assert all("channel_dim" not in entry for entry in entries.values())


@pytest.mark.slow
def test_a_bfloat16_file_takes_at_most_2_02_bytes_per_trained_weight(tmp_path: Path) -> None:
    """At rho = 0.1, on a model of 100 M parameters, with everything in the folder."""
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=4_000))
    base = empty.bfloat16().to_empty(device="cpu")
    for number, parameter in enumerate(base.parameters()):
        parameter.data.fill_(0.001 * number)
    given = {"granularity": "input_channel", "update_ratio": 0.1, "score": "random", "save_dtype": "bfloat16"}
    model = get_peft_model(base, config(**given))
    assert 90e6 < base.num_parameters() < 110e6
    model.save_pretrained(tmp_path)
    trained = sum(layer.values("default").numel() for layer in dowser_layers(model))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size / trained <= 2.02


# Merge and verify


@over_bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_streamed_merge_is_the_merge_in_memory_bit_for_bit(
    base: Callable[..., PreTrainedModel], dtype: torch.dtype, tmp_path: Path
) -> None:
    base(dtype).save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", base(dtype), **CHANNELS)
    counts = merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", max_shard_size=20_000)
    expected = PeftModel.from_pretrained(base(dtype), tmp_path / "adapter").merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert_same_bits(base_bits(found), base_bits(expected))
    assert counts == json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["nnz_pattern"]
    assert verify(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged") == []


def test_verify_names_what_a_merged_model_has_elsewhere(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", **CHANNELS)
    merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    edit_tensors(tmp_path / "merged" / "model.safetensors", lambda t: t[f"{MODULE}.weight"][3, 5].add_(1))
    (problem,) = verify(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert f"1 of 2048 entries of tensor '{MODULE}.weight' are not base + delta." in problem
    edit_tensors(tmp_path / "adapter" / FILE, lambda t: t[VALUES][3, 1].add_(1))
    (problem,) = verify(tmp_path / "adapter", tmp_path / "base")
    assert "the values are not those that its manifest describes" in problem


def damaged_granularity(folder: Path, granularity: str, with_manifest: bool) -> None:
    def change(found: dict) -> dict:
        found |= {"granularity": granularity, "channels": None}
        return found if with_manifest else {key: value for key, value in found.items() if key != "manifest"}

    edit_config(folder, change)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("granularity", ["weight", "input_channel"])
def test_every_command_refuses_the_config_of_the_other_granularity(
    granularity: str, with_manifest: bool, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    own = "weight" if granularity == "input_channel" else "input_channel"
    saved(tmp_path / "adapter", granularity=own, update_ratio=0.25)
    saved(tmp_path / "good", granularity=own, update_ratio=0.25)
    damaged_granularity(tmp_path / "adapter", granularity, with_manifest)
    message = "its config|floating-point values of shape|has no manifest"
    assert [problem for problem in verify(tmp_path / "adapter", tmp_path / "base")]
    for run in (
        lambda: merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base"),
        lambda: inspect(tmp_path / "adapter"),
        lambda: inspect(tmp_path / "adapter", tmp_path / "base"),
        lambda: diff(tmp_path / "adapter", tmp_path / "good"),
        lambda: diff(tmp_path / "good", tmp_path / "adapter"),
        lambda: export_lora(tmp_path / "adapter", tmp_path / "lora"),
    ):
        with pytest.raises(DeltaFormatError, match=message):
            run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "good"]


# Inspect, diff, report


@over_bases
def test_inspect_describes_channels(base: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = saved(tmp_path / "adapter", base(), **CHANNELS)
    found = inspect(tmp_path / "adapter", tmp_path / "base")
    assert (found["granularity"], found["bytes"]) == ("input_channel", (tmp_path / "adapter" / FILE).stat().st_size)
    rows = {row["module"]: row for row in found["modules"]}
    for layer in dowser_layers(model):
        row, values = rows[layer.module_name], layer.values("default").detach()
        weight = layer.get_base_layer().weight
        assert row["shape"] == tuple(weight.shape) and row["trained"] == values.numel()
        assert row["ratio"] == values.numel() / weight.numel()
        assert row["delta_norm"] == pytest.approx(float(values.double().norm()))
        assert row["bytes"] == values.nbytes + row["index_bits"] // 8
        dense = layer.get_delta_weight("default")
        entries = weight.detach().bfloat16()
        lost = ((entries.float() + dense).bfloat16() == entries) & (dense != 0)
        assert row["vanished"] == int(lost.sum()) / values.numel()


def test_inspect_of_a_file_without_a_manifest(tmp_path: Path) -> None:
    saved(tmp_path, **CHANNELS)
    edit_config(tmp_path, lambda found: {key: value for key, value in found.items() if key != "manifest"})
    assert [row["trained"] for row in inspect(tmp_path)["modules"]] == [
        4 * out for out in (32, 64, 64, 32, 32, 32, 32) * 2
    ]


@over_bases
def test_diff_compares_the_dense_deltas(base: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    one = saved(tmp_path / "a", base(), seed=1, granularity="input_channel", update_ratio=0.4)
    other = saved(tmp_path / "b", base(), seed=2, granularity="input_channel", update_ratio=0.3)
    single = saved(tmp_path / "c", base(), seed=3, update_ratio=0.3)
    for second, folder in ((other, "b"), (single, "c")):
        found = diff(tmp_path / "a", tmp_path / folder)
        for left, right in zip(dowser_layers(one), dowser_layers(second), strict=True):
            a, b = left.get_delta_weight("default").double(), right.get_delta_weight("default").double()
            overlap = found[left.module_name]
            assert overlap.shared == int(((a != 0) & (b != 0)).sum())
            assert overlap.only_a == int(((a != 0) & (b == 0)).sum())
            assert overlap.only_b == int(((a == 0) & (b != 0)).sum())
            assert overlap.conflicts == int((a * b < 0).sum())
            assert overlap.product == pytest.approx(float((a * b).sum()))


def test_a_report_shows_channels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from peft_dowser.report.page import report
    from peft_dowser.report.plot import mask_density

    saved(tmp_path / "a", **CHANNELS)
    report(tmp_path / "a", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "granularity" in page and "input_channel" in page
    figure = mask_density(tmp_path / "a", "model.layers.0.self_attn.q_proj")
    above = next(axes for axes in figure.axes if axes.get_ylabel() == "trained")
    heights = above.lines[0].get_ydata()
    chosen = channels_in(tmp_path / "a", "model.layers.0.self_attn.q_proj", 32)
    assert [at for at, height in enumerate(heights) if height == 1] == chosen and sum(heights) == 4


def test_the_card_says_what_trains(tmp_path: Path) -> None:
    saved(tmp_path / "a", **CHANNELS)
    assert "4 input channels of each module" in (tmp_path / "a" / "README.md").read_text()
    saved(tmp_path / "b", granularity="input_channel", update_ratio=0.2)
    assert "0.2 of the input channels" in (tmp_path / "b" / "README.md").read_text()


# Plan


def size_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@over_bases
@pytest.mark.parametrize(
    "given", [{"channels": 4}, {"update_ratio": 0.3}, {"channels": 4, "ratio_pattern": {"down_proj": 0.5, "c_fc": 0.5}}]
)
@pytest.mark.filterwarnings("ignore:ratio_pattern has keys that match none")
def test_a_plan_counts_the_real_tensors(base: Callable[..., PreTrainedModel], given: dict, tmp_path: Path) -> None:
    known = base().config
    known.architectures = [type(base()).__name__]
    if base is gpt2 and "ratio_pattern" in given:
        given = given | {"ratio_pattern": {"c_fc": 0.5}}
    elif "ratio_pattern" in given:
        given = given | {"ratio_pattern": {"down_proj": 0.5}}
    chosen = config(granularity="input_channel", score="random", save_dtype="bfloat16", **given)
    found = plan(known, chosen, dtype="float32")
    model = get_peft_model(base(), chosen)
    indices = [layer.index("default") for layer in dowser_layers(model)]
    assert found.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found.values == found.gradients == 4 * found.trained
    assert found.positions == size_of(tensor for index in indices for tensor in index.buffers())
    model.save_pretrained(tmp_path)
    written = (tmp_path / FILE).read_bytes()
    assert found.file == len(written) - 8 - int.from_bytes(written[:8], "little")


def test_a_plan_refuses_more_channels_than_there_are() -> None:
    known = tiny_llama().config
    known.architectures = ["LlamaForCausalLM"]
    with pytest.raises(ValueError, match=r"channels=33, but module 'model\.layers\.0\.self_attn\.q_proj' has only 32"):
        plan(known, config(granularity="input_channel", channels=33))


# As LoRA


LOAD = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, base = sys.argv[1], sys.argv[2]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
assert "peft_dowser" not in sys.modules
layers = [module for module in model.modules() if hasattr(module, "lora_A")]
assert layers and all(set(layer.scaling.values()) == {1} for layer in layers)
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[3])["ids"]).logits}, sys.argv[4])
"""


def lora_logits(folder: Path, base: Path, ids: Tensor, work: Path) -> Tensor:
    """What PEFT's LoRA gives, in a process that never imports this package."""
    save_file({"ids": ids}, work / "ids.safetensors")
    arguments = [str(path) for path in (folder, base, work / "ids.safetensors", work / "logits.safetensors")]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(work / "logits.safetensors")["logits"]


IDS = torch.tensor([[1, 5, 9, 13, 40, 7], [1, 20, 3, 8, 8, 31]])


@pytest.mark.slow
@over_bases
@pytest.mark.parametrize("how", ["export_lora", "save_as_lora"])
def test_peft_without_this_package_gives_the_same_bits(
    base: Callable[..., PreTrainedModel], how: str, tmp_path: Path
) -> None:
    base().save_pretrained(tmp_path / "base")
    model = saved(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **CHANNELS).eval()
    if how == "export_lora":
        assert set(export_lora(tmp_path / "adapter", tmp_path / "lora").values()) == {4}
    else:
        save_as_lora(tmp_path / "lora", model, rank=4)
    found = lora_logits(tmp_path / "lora", tmp_path / "base", IDS, tmp_path)
    assert torch.equal(bits(found), bits(logits(model, IDS)))
    assert not torch.equal(found, logits(base(), IDS))


@over_bases
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_an_export_is_a_lora_adapter_with_the_same_outputs(
    base: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = saved(tmp_path / "adapter", base(), **CHANNELS).eval()
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("a template")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 4, 4)
    assert not any(settings[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"))
    files = ["adapter_config.json", FILE, "chat_template.jinja", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == files
    again = PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    assert torch.equal(bits(logits(again)), bits(logits(model)))
    torch.testing.assert_close(logits(again.merge_and_unload()), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [64, 65])
def test_an_export_says_that_its_rank_is_large(channels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes))
    saved(tmp_path / "adapter", base, **CHANNELS | {"channels": channels}, target_modules=["down_proj"])
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    messages = [record.message for record in caplog.records if record.name == "peft_dowser.files.lora_export"]
    assert messages == [
        "The LoRA adapter has rank 65 in every module, as the largest needs it; servers take it where their limit "
        "allows (vLLM: --max-lora-rank). Train with channels=16 for a LoRA adapter of rank 16."
    ] * (channels > 64)


@over_bases
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_modules_of_other_ranks_are_filled_up_with_zeros(base: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = saved(tmp_path / "adapter", base(), granularity="input_channel", update_ratio=0.2, scope="model").eval()
    counts = export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert counts == {layer.module_name: layer.index("default").count for layer in dowser_layers(model)}
    assert len(set(counts.values())) > 1
    tensors = load_file(tmp_path / "lora" / FILE)
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {max(counts.values())}
    again = PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def test_an_export_of_some_modules_adapts_no_others(tmp_path: Path) -> None:
    """q_proj of one layer: its last part alone would match both."""
    given = CHANNELS | {"target_modules": ["q_proj", "o_proj"], "last_layers": 1}
    model = saved(tmp_path / "adapter", **given).eval()
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    assert len(load_file(tmp_path / "lora" / FILE)) == 4
    assert torch.equal(bits(logits(again)), bits(logits(model)))
    assert sum(".lora_A." in name for name, _ in again.named_parameters()) == 2


@pytest.mark.parametrize(
    "whole", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 7]}, {"bias": "dowser_only"},
              {"bias": "all"}],
)  # fmt: skip
def test_whole_tensors_are_exported_too(whole: dict, tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        settings = tiny_llama().config
        settings.attention_bias = True
        torch.manual_seed(0)
        return LlamaForCausalLM(settings).eval()

    model = adapted(base(), score="random", **CHANNELS, **whole)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".dowser_" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    again = PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    assert torch.equal(bits(logits(again)), bits(logits(model)))


@pytest.mark.filterwarnings("ignore:Adapter 'default' is saved as it was trained")
def test_a_conversion_takes_the_scale_and_an_export_does_not(tmp_path: Path) -> None:
    model = saved(tmp_path / "adapter", **CHANNELS).eval()
    model.base_model.set_scale("default", 0.5)
    _, scaled = convert_to_lora(model, rank=4)
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    exported = load_file(tmp_path / "lora" / FILE)
    assert scaled.keys() == exported.keys()
    assert all(torch.equal(scaled[name], exported[name] * (0.5 if "lora_B" in name else 1)) for name in scaled)


@pytest.mark.parametrize(("rank", "found"), [(4, 4), (7, 4), (1.0, 4), (3, 3)])
def test_a_conversion_is_exact_from_the_rank_of_the_channels_on(rank: float, found: int, tmp_path: Path) -> None:
    model = adapted(score="random", **CHANNELS)
    save_as_lora(tmp_path, model, rank=rank)
    tensors = load_file(tmp_path / FILE)
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {found}
    for layer in dowser_layers(model):
        factors = [tensors[f"base_model.model.{layer.module_name}.lora_{part}.weight"] for part in "AB"]
        error = (factors[1] @ factors[0] - layer.get_delta_weight("default")).norm()
        assert bool(error == 0) == (rank != 3)
    if rank != 3:
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        assert torch.equal(bits(logits(again)), bits(logits(model)))


def test_bfloat16_values_stay_bfloat16(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", save_dtype="bfloat16", **CHANNELS)
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / FILE).values()} == {torch.bfloat16}


def test_the_command_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "adapter", **CHANNELS)
    assert main(["export-lora", str(tmp_path / "adapter"), "-o", str(tmp_path / "lora")]) == 0
    size = f"{(tmp_path / 'lora' / FILE).stat().st_size / 1000:.1f} kB"
    assert capsys.readouterr().out == f"LoRA of rank 4 for 14 modules, {size}: {tmp_path / 'lora'}\n"


def test_an_export_that_cannot_be_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "single")
    with pytest.raises(
        ValueError, match=r"trains single weights of module .*, which a LoRA adapter cannot hold exactly"
    ):
        export_lora(tmp_path / "single", tmp_path / "lora")
    saved(tmp_path / "a", **CHANNELS)
    with pytest.raises(OSError, match="a"):
        export_lora(tmp_path / "a", tmp_path / "single")
    with pytest.raises(OSError):
        export_lora(tmp_path / "absent", tmp_path / "lora")
    edit_config(tmp_path / "a", lambda found: {key: value for key, value in found.items() if key != "manifest"})
    with pytest.raises(DeltaFormatError, match="has no manifest, so the shapes of its weights are unknown"):
        export_lora(tmp_path / "a", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [32, 63]}, "index code"),
        ({"shape": [64, 32]}, "whole input channels|index code|floating-point values of shape"),
        (
            {"shape": [33, 64]},
            r"Adapter .*module 'model\.layers\.0\.mlp\.down_proj'.*128 values, which are not whole input",
        ),
        (
            {"shape": [2, 32, 64]},
            r"gives module .* the input channels 1, which a weight of shape \[2, 32, 64\] does not",
        ),
        ({"channel_dim": 0}, "floating-point values of shape|index code|whole input channels"),
        ({"channel_dim": 2}, r"the input channels 2, which a weight of shape \[32, 64\] does not have"),
        ({"channel_dim": True}, "the input channels True"),
        ({"channel_dim": "1"}, "the input channels 1"),
        ({"channel_dim": -1}, "the input channels -1"),
        ({"channel_dim": [1]}, r"the input channels \[1\]"),
        ({"nnz": 127}, "has 128 values, its manifest says 127"),
        ({"code_sha256": "00"}, "not the one that the manifest"),
    ],
)
def test_a_manifest_that_lies_is_refused_without_a_base(change: dict, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "a", **CHANNELS)
    saved(tmp_path / "good", seed=1, **CHANNELS)
    edit_config(tmp_path / "a", lambda found: found["manifest"]["modules"][MODULE].update(change))
    with pytest.raises(DeltaFormatError, match=message):
        export_lora(tmp_path / "a", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    with pytest.raises((DeltaFormatError, ValueError), match=message + "|other shapes"):
        diff(tmp_path / "a", tmp_path / "good")


def test_a_config_of_channels_survives_json(tmp_path: Path) -> None:
    given = config(**CHANNELS, ratio_pattern={"up_proj": 0.3})
    given.save_pretrained(str(tmp_path))
    again = DowserConfig.from_pretrained(tmp_path)
    assert (again.granularity, again.channels, again.ratio_pattern) == ("input_channel", 4, {"up_proj": 0.3})
