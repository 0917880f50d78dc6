"""`merge` and `verify`: the merged checkpoint has the bits of a merge in memory, or there is none."""

import json
import logging
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import SHAPE, assert_same_bits, config, edit_tensors, gpt2, llava, seeded, set_values, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_dowser import DeltaFormatError, extract, merge, verify
from peft_dowser.cli import main
from peft_dowser.files import checkpoint as checkpoints
from peft_dowser.files import merging

pytestmark = pytest.mark.usefixtures("offline")

SHARDS = "20KB"
UP = "model.layers.1.mlp.up_proj"


def qwen2_vl() -> Qwen2VLForConditionalGeneration:
    """Its config says whether embeddings are tied, that of its text model does not."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**SHAPE, "num_key_value_heads": 2, "vocab_size": 64, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=5))


def roberta() -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(RobertaConfig(**SHAPE, vocab_size=64, max_position_embeddings=32))


def pair(
    folder: Path,
    make: Callable[[], PreTrainedModel] = tiny_llama,
    dtype: torch.dtype = torch.float32,
    shards: str = SHARDS,
    std: float = 0.05,
    **overrides,
) -> tuple[str, str]:
    """A base and an adapter, saved."""
    base, adapter = str(folder / "base"), str(folder / "adapter")
    model = seeded(make).to(dtype)
    model.save_pretrained(base, max_shard_size=shards)
    model.name_or_path = base
    tuned = get_peft_model(model, config(score="random", **overrides))
    set_values(tuned, std)
    tuned.save_pretrained(adapter, save_embedding_layers=False)
    return base, adapter


def merged_in_memory(base: str, adapter: str, folder: Path, make: Callable = tiny_llama) -> dict[str, Tensor]:
    """What `merge_and_unload` and `save_pretrained` write."""
    model = type(seeded(make)).from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def stored(folder: Path | str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whatever its files."""
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def printed(capsys: pytest.CaptureFixture) -> str:
    """What was printed, less the progress bars."""
    return capsys.readouterr().out


# Bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny_llama, llava, qwen2_vl, gpt2])
def test_the_command_writes_the_bits_of_a_merge_in_memory(
    make: Callable, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, adapter = pair(tmp_path, make, dtype)
    output = tmp_path / "merged"
    assert main(["merge", adapter, "-o", str(output), "--max-shard-size", SHARDS]) == 0
    assert re.fullmatch(rf"\d+ modules, [\d,]+ values, [\d.]+ kB: {output}\n", printed(capsys))
    expected = merged_in_memory(base, adapter, tmp_path / "memory", make)
    assert_same_bits(stored(output), expected)
    assert expected.keys() == stored(base).keys()
    assert main(["verify", adapter, "--merged", str(output)]) == 0
    assert printed(capsys) == f"OK: '{adapter}' fits its base, and '{output}' is their sum.\n"
    assert verify(adapter, merged=tmp_path / "memory") == []
    changed = [name for name, tensor in stored(base).items() if not torch.equal(tensor, expected[name])]
    assert changed


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_the_output_is_a_model(make: Callable, tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, make, torch.bfloat16)
    merge(adapter, tmp_path / "merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(merged(tokens).logits, model(tokens).logits)


def test_one_file_and_many_have_the_same_tensors(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, shards="1GB")
    merge(adapter, tmp_path / "one")
    merge(adapter, tmp_path / "many", max_shard_size=SHARDS)
    assert not (tmp_path / "one/model.safetensors.index.json").exists()
    assert_same_bits(stored(tmp_path / "many"), load_file(tmp_path / "one/model.safetensors"))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    paths = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in paths]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(base).values())
    for path in paths:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {index["weight_map"][key] for key in file.keys()} == {path.name}
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]
            assert sum(sizes) <= 20_000 or len(sizes) == 1


def test_the_base_may_be_elsewhere(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path)
    moved = Path(base).rename(tmp_path / "moved")
    with pytest.raises(OSError, match=re.escape(f"'{base}' is neither a folder nor a model on the Hub")) as caught:
        merge(adapter, tmp_path / "merged")
    assert str(caught.value).startswith(f"Adapter '{adapter}' names its base model '{base}', which cannot be read: ")
    hint = " If the base has moved, give the base (base=, or --base on the command line)."
    assert str(caught.value).endswith(hint)
    merge(adapter, tmp_path / "merged", base=moved)
    assert verify(adapter, base=moved, merged=tmp_path / "merged") == []


def test_values_of_other_dtypes(tmp_path: Path) -> None:
    for number, dtype in enumerate(["float16", "bfloat16"]):
        base, adapter = pair(tmp_path / str(number), dtype=torch.bfloat16, save_dtype=dtype)
        merge(adapter, tmp_path / f"merged{number}")
        assert_same_bits(stored(tmp_path / f"merged{number}"), merged_in_memory(base, adapter, tmp_path / dtype))


def untied_gpt2() -> GPT2LMHeadModel:
    model = gpt2()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize(("dtype", "named"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_a_base_that_is_loaded_in_another_dtype_is_announced(dtype: torch.dtype, named: str, tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, dtype=dtype)
    path = Path(base) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": named}))
    with pytest.warns(UserWarning, match=rf"in {dtype}, and its config says torch\.{named}, in which they are loaded"):
        merge(adapter, tmp_path / "merged")
    assert {tensor.dtype for tensor in stored(tmp_path / "merged").values()} == {dtype}
    model = seeded(tiny_llama).to(dtype)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    assert_same_bits(stored(tmp_path / "merged"), merged.state_dict())


def test_embeddings_and_an_untied_head_are_merged(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, untied_gpt2, torch.bfloat16, target_modules=["lm_head", "wte", "c_fc"])
    merge(adapter, tmp_path / "merged")
    expected = merged_in_memory(base, adapter, tmp_path / "memory", gpt2)
    assert_same_bits(stored(tmp_path / "merged"), expected)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert not torch.equal(expected[name], stored(base)[name])


@pytest.mark.parametrize("target", ["lm_head", "wte"])
def test_a_tied_target_is_refused(tmp_path: Path, target: str) -> None:
    base, adapter = pair(tmp_path, untied_gpt2, shards="1GB", target_modules=[target])
    path = Path(base) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    name = {"lm_head": "lm_head", "wte": "transformer.wte"}[target]
    refuse(f"The weight of target module '{name}' is tied", adapter, tmp_path / "merged")
    assert any("is tied" in problem for problem in verify(adapter))


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
def test_trained_biases_and_modules_are_written_too(tmp_path: Path) -> None:
    for name, make, choice in [
        ("biases", gpt2, {"bias": "all"}),
        ("modules", tiny_llama, {"modules_to_save": ["lm_head", "norm"]}),
        ("modules of modules", roberta, {"task_type": "SEQ_CLS"}),  # PEFT saves its classifier, which has two linears
    ]:
        folder = tmp_path / name
        base, adapter = pair(folder, make, torch.bfloat16, **choice)
        edit_tensors(
            Path(adapter) / "adapter_model.safetensors",
            lambda tensors: {key: value if "dowser" in key else value + 0.5 for key, value in tensors.items()},
        )
        merge(adapter, folder / "merged")
        assert_same_bits(stored(folder / "merged"), merged_in_memory(base, adapter, folder / "memory", make))
        assert verify(adapter, merged=folder / "merged") == []


def test_a_module_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    _, adapter = pair(tmp_path, tiny_llama, modules_to_save=["lm_head", "norm"])
    edit_tensors(
        Path(adapter) / "adapter_model.safetensors",
        lambda tensors: {key: value for key, value in tensors.items() if ".norm." not in key},
    )
    message = (
        "lacks 1 tensors of modules that the adapter trains as a whole, or of their tokens (modules_to_save, "
        "trainable_token_indices): 'model.norm.weight'"
    )
    refuse(message, adapter, tmp_path / "merged")
    assert any(message in problem for problem in verify(adapter))


def test_what_goes_with_the_weights_is_copied(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path)
    tokenizers = ("tokenizer.json", "merges.txt", "source.spm", "bpe.codes", "tokenization_own.py")
    for name in (*tokenizers, "chat_template.jinja", "adapter_config.json", "notes.md"):
        (Path(base) / name).write_text(name)
    (Path(base) / "additional_chat_templates").mkdir()
    (Path(base) / "additional_chat_templates/tools.jinja").write_text("tools")
    for name in ("tokenizer.json", "config.json", "generation_config.json", "code.py", "trainer_state.json"):
        (Path(adapter) / name).write_text("of the adapter")
    merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged/tokenizer.json").read_text() == "of the adapter"  # it was trained with this one
    assert sorted(str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*")) == [
        "additional_chat_templates",
        "additional_chat_templates/tools.jinja",
        "bpe.codes",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "source.spm",
        "tokenization_own.py",
        "tokenizer.json",
    ]
    assert (tmp_path / "merged/config.json").read_bytes() == (Path(base) / "config.json").read_bytes()


def test_tensors_that_the_model_does_not_know_are_kept(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, shards="1GB")
    extra = {"model.extra.weight": torch.tensor([1.0, float("nan")]), "scalar": torch.tensor(3)}
    edit_tensors(Path(base) / "model.safetensors", lambda tensors: tensors | extra)
    merge(adapter, tmp_path / "merged")
    found = stored(tmp_path / "merged")
    assert found.keys() == stored(base).keys()
    assert found["scalar"] == 3


def test_of_two_tensors_for_one_name_the_one_that_is_loaded_is_merged(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, shards="1GB")
    twice = stored(base)[f"{UP}.weight"].clone()
    short = f"{UP}.weight".removeprefix("model.")
    edit_tensors(Path(base) / "model.safetensors", lambda tensors: tensors | {short: twice})
    merge(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert_same_bits(merged.state_dict(), merged_in_memory(base, adapter, tmp_path / "memory"))


# Side effects


def test_files_are_named_as_transformers_names_them_and_split_at_the_size(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, shards="1GB")
    merge(adapter, tmp_path / "merged", max_shard_size=5000)
    sizes = [[tensor.nbytes for tensor in load_file(path).values()] for path in (tmp_path / "merged").glob("*-of-*")]
    assert all(len(size) == 1 or sum(size) <= 5000 for size in sizes)
    assert any(size[0] > 5000 for size in sizes)
    # In the order of the merged files, which transformers would otherwise take from the model.
    with safe_open(Path(base) / "model.safetensors", framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(
        tmp_path / "saved", max_shard_size=5000, state_dict=state
    )
    expected = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    found = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert found["weight_map"] == expected["weight_map"]
    assert found["metadata"]["total_size"] == expected["metadata"]["total_size"]


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = pair(tmp_path, lambda: tiny_llama(layers=6), shards="1GB")
    live, peak, total = 0, 0, 0
    read = merging.MergedCheckpoint.read

    def release(size: int) -> None:
        nonlocal live
        live -= size

    def counted(self: merging.MergedCheckpoint, key: str) -> Tensor:
        nonlocal live, peak, total
        tensor = read(self, key)
        live += tensor.nbytes
        total += tensor.nbytes
        peak = max(peak, live)
        weakref.finalize(tensor, release, tensor.nbytes)
        return tensor

    monkeypatch.setattr(merging.MergedCheckpoint, "read", counted)
    merge(adapter, tmp_path / "merged", max_shard_size="20KB")
    largest = 4 * 32 * 64
    assert largest < peak <= 20_000 + largest
    assert peak < total / 5
    assert live == 0


def test_the_base_and_global_state_stay_as_they_are(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path)
    bytes_before = {path: path.read_bytes() for path in Path(base).iterdir()}
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    merge(adapter, tmp_path / "merged")
    verify(adapter, merged=tmp_path / "merged")
    after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert {path: path.read_bytes() for path in Path(base).iterdir()} == bytes_before


def test_vanished_values_are_reported_as_by_a_merge_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, adapter = pair(tmp_path, dtype=torch.bfloat16, std=1e-4)
    said = []
    for run in (
        lambda: merge(adapter, tmp_path / "merged"),
        lambda: merged_in_memory(base, adapter, tmp_path / "memory"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="peft_dowser"):
            run()
        said.append([record.getMessage() for record in caplog.records if record.name.startswith("peft_dowser")])
    assert said[0] == said[1]
    assert re.fullmatch(r"\d+ of \d+ merged values \(.* %\) are too small to change a weight .*", said[0][0])


# Faults


def refuse(message: str, adapter: str, output: Path, **options) -> None:
    """Merging fails with this message and creates nothing."""
    existed = output.exists()
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        merge(adapter, output, **options)
    assert output.exists() == existed


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path)
    path = sorted(Path(base).glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])
    refuse(f"'{path}' ({path.stat().st_size} bytes) is not a readable safetensors file", adapter, tmp_path / "merged")


def test_a_base_that_is_no_safetensors_checkpoint_is_refused(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, shards="1GB")
    (Path(base) / "model.safetensors").rename(Path(base) / "pytorch_model.bin")
    refuse("holds neither model.safetensors nor model.safetensors.index.json", adapter, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:The following target_modules matched nothing")
def test_a_foreign_base_is_refused(tmp_path: Path) -> None:
    _, adapter = pair(tmp_path)
    for number, (make, message) in enumerate(
        [
            (
                lambda: tiny_llama(hidden=4),
                "there are 205 values, but the weight has only 32 entries. It was made for another base",
            ),
            (lambda: tiny_llama(hidden=16), "has a weight of shape (16, 32) here, the adapter was made for [32, 64]"),
            (lambda: tiny_llama(layers=1), "has values for 7 modules that are not targets in this model"),
            (gpt2, "not found in the base model"),
        ]
    ):
        base = str(tmp_path / str(number))
        seeded(make).save_pretrained(base)
        refuse(message, adapter, tmp_path / "merged", base=base)
        assert any(message in problem for problem in verify(adapter, base=base))


def test_a_base_of_another_shape_than_its_config_is_refused(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, shards="1GB")
    edit_tensors(Path(base) / "model.safetensors", lambda tensors: tensors | {f"{UP}.weight": torch.zeros(64, 31)})
    message = f"The target weight '{UP}.weight' is F32 of shape (64, 31) in '{base}'; it must be one of F16, BF16"
    refuse(message, adapter, tmp_path / "merged")
    edit_tensors(
        Path(base) / "model.safetensors",
        lambda tensors: {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()},
    )
    refuse("is F8_E4M3 of shape", adapter, tmp_path / "merged")
    assert len(verify(adapter)) == 14
    edit_tensors(
        Path(base) / "model.safetensors",
        lambda tensors: {key: value.float() for key, value in tensors.items() if UP not in key},
    )
    refuse(f"'{base}' has no tensor for the target weight '{UP}.weight'", adapter, tmp_path / "merged")


def test_target_weights_that_are_tied_to_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair(tmp_path)
    tie = {f"{UP}.weight": f"{UP.replace('up', 'gate')}.weight"}
    monkeypatch.setattr(
        merging,
        "open_checkpoint",
        lambda *args: tied(checkpoints.open_checkpoint(*args), tie),
    )
    refuse(f"1 of its target weights are tied to others of them in '{base}'", adapter, tmp_path / "merged")


def tied(checkpoint: checkpoints.Checkpoint, names: dict[str, str]) -> checkpoints.Checkpoint:
    """A checkpoint in which some tensors are stored under another name only."""
    for name, other in names.items():
        del checkpoint.tensors[name]
        checkpoint.tied[name] = other
    return checkpoint


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path)
    for folder in (base, adapter):
        before = sorted(Path(folder).iterdir())
        refuse(f"'{folder}' is not an empty folder; choose another output", adapter, Path(folder))
        assert sorted(Path(folder).iterdir()) == before
    (tmp_path / "empty").mkdir()
    merge(adapter, tmp_path / "empty")


def test_an_adapter_that_names_no_base_is_refused(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path)
    path = Path(adapter) / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"revision": "v2"}))
    refuse(f"was made for revision 'v2' of '{base}'; download that", adapter, tmp_path / "merged")
    path.write_text(json.dumps(saved | {"base_model_name_or_path": None}))
    refuse(
        "does not name its base model; give the base (base=, or --base on the command line).",
        adapter,
        tmp_path / "merged",
    )
    assert verify(adapter, base=base) == []


@pytest.mark.parametrize("size", ["much", "5 apples"])
def test_a_shard_size_that_is_none_is_refused(size: str, tmp_path: Path) -> None:
    _, adapter = pair(tmp_path)
    refuse("size", adapter, tmp_path / "merged", max_shard_size=size)


def test_a_sum_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    _, adapter = pair(tmp_path, dtype=torch.float16, std=1e6)
    with pytest.raises(ValueError, match=r"merging would write \d+ values that are not finite in torch\.float16"):
        merge(adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
@pytest.mark.parametrize("step", ["write_tensors", "copy_companions"])
def test_an_interrupted_merge_leaves_nothing(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = pair(tmp_path)
    calls = []
    original = getattr(merging, step)

    def interrupted(*args, **kwargs) -> None:
        calls.append(args)
        if len(calls) == 3 or step != "write_tensors":
            raise error
        original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(merging, step, interrupted)
        merge(adapter, tmp_path / "merged", max_shard_size=SHARDS)
    assert calls
    assert list((tmp_path / "merged").iterdir()) == []
    merge(adapter, tmp_path / "merged", max_shard_size=SHARDS)


def test_the_config_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while the files get their names leaves a folder that does not load."""
    _, adapter = pair(tmp_path)
    rename, order = Path.rename, []

    def recorded(self: Path, target: Path) -> Path:
        order.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", recorded)
    merge(adapter, tmp_path / "merged")
    assert order[-1] == tmp_path / "merged/config.json"


@pytest.mark.parametrize("moment", [1, 2])
def test_of_two_processes_with_one_output_one_is_refused(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one begins after the first has looked at the folder, and is still writing, or has ended already."""
    _, adapter = pair(tmp_path)
    output = tmp_path / "merged"
    looks, look = [], merging.check_output

    def meanwhile(folder: Path) -> None:
        look(folder)
        looks.append(1)
        if len(looks) == 1 and moment == 1:
            (folder / ".unfinished").mkdir(parents=True)
        elif len(looks) == 1:
            merge(adapter, folder)

    monkeypatch.setattr(merging, "check_output", meanwhile)
    message = "another process is writing into it, or was killed" if moment == 1 else "is not an empty folder"
    with pytest.raises(FileExistsError, match=message):
        merge(adapter, output)
    assert (output / "config.json").exists() == (moment == 2)


def test_of_two_processes_that_claim_one_output_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = pair(tmp_path)
    output, mkdir = tmp_path / "merged", Path.mkdir

    def merged_before(path: Path, *args, **kwargs) -> None:
        if path.name == ".unfinished":
            monkeypatch.undo()
            merge(adapter, output)
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", merged_before)
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        merge(adapter, output)
    assert verify(adapter, merged=output) == []


def test_what_a_killed_merge_has_left_is_named(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path)
    (tmp_path / "merged" / ".unfinished").mkdir(parents=True)
    for write in (lambda folder: merge(adapter, folder), lambda folder: extract(base, "tuned", folder)):
        with pytest.raises(FileExistsError, match=r"has a folder '\.unfinished'.* was killed while it did.* delete"):
            write(tmp_path / "merged")


# verify


def flip(tensors: dict[str, Tensor], part: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Tensors in which the one of that name is another."""
    (name,) = [key for key in tensors if part in key]
    return tensors | {name: change(tensors[name].clone())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: flip(t, f"{UP}.dowser_values", lambda v: v.fill_(float("nan"))), "values that are not finite"),
        (lambda t: flip(t, f"{UP}.dowser_values", lambda v: v[1:]), "expected 205 floating-point values"),
        (lambda t: flip(t, f"{UP}.dowser_values", lambda v: v.int()), "the file has torch.int32"),
        (lambda t: flip(t, f"{UP}.dowser_index", lambda v: v.fill_(255)), "the index code selects"),
        (lambda t: flip(t, f"{UP}.dowser_index", lambda v: v[1:]), "the index code of 205 of 2048 positions takes"),
        (lambda t: {k: v for k, v in t.items() if f"{UP}.dowser_index" not in k}, "has 27; missing: "),
        (lambda t: t | {"base_model.model.x.dowser_values.weight": torch.ones(3)}, "that this adapter does not have: "),
        (lambda t: t | {"base_model.model.x.lora_A.weight": torch.ones(3)}, "neither a Dowser tensor nor a tensor of"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(3)}, "has shape (3,), the model's has (64, 32)"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.full((64, 32), float("inf"))}, "not finite"),
    ],
)
def test_a_damaged_adapter_is_refused_by_both(
    change: Callable, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, adapter = pair(tmp_path)
    edit_tensors(Path(adapter) / "adapter_model.safetensors", change)
    capsys.readouterr()
    assert main(["verify", adapter]) == 2
    (line,) = printed(capsys).splitlines()
    assert message in line
    with pytest.raises(DeltaFormatError, match=re.escape(message)):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_verify_reports_every_problem(tmp_path: Path) -> None:
    _, adapter = pair(tmp_path)
    edit_tensors(
        Path(adapter) / "adapter_model.safetensors",
        lambda tensors: {key: value / 0 if "up_proj.dowser_values" in key else value for key, value in tensors.items()},
    )
    assert [re.search(r"module '(.*)'", problem)[1] for problem in verify(adapter)] == [UP.replace("1", "0"), UP]


def test_an_adapter_without_counts_in_its_config_is_read(tmp_path: Path) -> None:
    _, adapter = pair(tmp_path)
    path = Path(adapter) / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"nnz_pattern": None}))
    assert verify(adapter) == []
    path.write_text(json.dumps(saved | {"nnz_pattern": {**saved["nnz_pattern"], UP: 7}}))
    assert f"module '{UP}' has 7 values, its manifest says 205" in verify(adapter)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: flip(t, UP, lambda v: v.view(-1).index_fill(0, torch.tensor([3]), 9).view(64, 32)), "1 of 2048"),
        (lambda t: flip(t, UP, lambda v: v.half()), "is torch.float16 of shape (64, 32), expected torch.float32"),
        (lambda t: {key: value for key, value in t.items() if UP not in key}, f"lacks the tensor '{UP}.weight'."),
    ],
)
def test_a_model_that_is_not_the_sum_is_found(change: Callable, message: str, tmp_path: Path) -> None:
    _, adapter = pair(tmp_path)
    merge(adapter, tmp_path / "merged")
    edit_tensors(tmp_path / "merged/model.safetensors", change)
    (problem,) = verify(adapter, merged=tmp_path / "merged")
    assert message in problem


def test_a_tied_tensor_that_is_stored_by_itself_is_compared_too(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, gpt2, shards="1GB")
    merge(adapter, tmp_path / "merged")
    head = stored(base)["transformer.wte.weight"]
    edit_tensors(tmp_path / "merged/model.safetensors", lambda tensors: tensors | {"lm_head.weight": head})
    assert verify(adapter, merged=tmp_path / "merged") == []
    edit_tensors(tmp_path / "merged/model.safetensors", lambda tensors: tensors | {"lm_head.weight": head + 1})
    (problem,) = verify(adapter, merged=tmp_path / "merged")
    assert problem.endswith("2048 of 2048 entries of tensor 'lm_head.weight' are not base + delta.")


def test_the_base_itself_is_not_the_sum(tmp_path: Path) -> None:
    base, adapter = pair(tmp_path)
    assert len(verify(adapter, merged=base)) == 14


@pytest.mark.parametrize("command", [["merge", "-o", "merged"], ["verify"]])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_model.safetensors", None, "holds no adapter_model.safetensors."),
        ("adapter_model.safetensors", "{", "is not a readable safetensors file"),
        ("adapter_config.json", None, "holds no adapter_config.json."),
        ("adapter_config.json", "{", "is not a configuration that PEFT can read"),
        ("adapter_config.json", '{"peft_type": "LORA"}', "holds a LORA adapter, not a Dowser adapter."),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    command: list[str],
    name: str,
    content: str | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, adapter = pair(tmp_path)
    (Path(adapter) / name).unlink()
    if content is not None:
        (Path(adapter) / name).write_text(content)
    capsys.readouterr()
    assert main([*command, adapter]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("peft-dowser: ")
    assert message in line
    assert not Path("merged").exists()


def test_hub_ids_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = pair(tmp_path)
    folders = {"some/base": base, "some/adapter": adapter}
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda name, allow_patterns: folders[name])
    merge("some/adapter", tmp_path / "merged", base="some/base")
    assert verify(adapter, base, tmp_path / "merged") == []
    assert (tmp_path / "merged/config.json").exists()
