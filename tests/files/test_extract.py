"""`extract`: two checkpoints become an adapter, which gives the fine-tuned model back bit for bit."""

import json
import re
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import SHAPE, assert_same_bits, config, edit_tensors, gpt2, llava, seeded, t5, tiny_llama
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from peft_dowser import extract
from peft_dowser.baselines import postmerge
from peft_dowser.delta import safe_files as files
from peft_dowser.delta.seeds import derived_seed

pytestmark = pytest.mark.usefixtures("offline")
FILE = "model.safetensors"


def tune(model: nn.Module, part: str = "_proj.weight", change: float = 0.1) -> nn.Module:
    """Change the weights of that name a little, all of them in their own proportion."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data *= 1 + change * torch.randn(parameter.shape, generator=generator).clamp(-4, 4)
    return model


def save(model: nn.Module, folder: Path, **options) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


def pair(folder: Path, dtype: torch.dtype = torch.float32, **options) -> tuple[str, str]:
    """A base and a fine-tuned checkpoint."""
    tuned = tune(tiny_llama(dtype))
    return save(tiny_llama(dtype), folder / "base", **options), save(tuned, folder / "tuned", **options)


def merged(base: str, adapter: Path, **options) -> dict[str, Tensor]:
    model = LlamaForCausalLM.from_pretrained(base, dtype="auto", **options)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


def deltas(adapter: Path, base: str) -> dict[str, Tensor]:
    """The dense deltas of a saved adapter by module."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter))
    return {
        layer.module_name: layer.get_delta_weight("default")
        for layer in model.modules()
        if hasattr(layer, "get_delta_weight")
    }


def difference(base: str, tuned: str) -> dict[str, Tensor]:
    """W - W* of the target modules, in their order."""
    one, other = LlamaForCausalLM.from_pretrained(base), LlamaForCausalLM.from_pretrained(tuned)
    modules = [name for name, module in one.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name]
    return {m: (other.get_submodule(m).weight - one.get_submodule(m).weight).detach() for m in modules}


# The whole difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["top_delta", "dare", "graft"])
def test_the_whole_difference_gives_the_tuned_model_back(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, dtype)
    counts = extract(base, tuned, tmp_path / "adapter", update_ratio=1.0, method=method)
    assert_same_bits(merged(base, tmp_path / "adapter"), tune(tiny_llama(dtype)).state_dict())
    assert list(counts) == list(difference(base, tuned))


def test_a_large_change_comes_back_to_the_rounding_of_a_float(tmp_path: Path) -> None:
    base, tuned = save(tiny_llama(), tmp_path / "base"), save(tune(tiny_llama(seed=5)), tmp_path / "tuned")
    with pytest.warns(UserWarning, match="outside the target weights"):
        extract(base, tuned, tmp_path / "adapter", update_ratio=1.0)
    found, expected = merged(base, tmp_path / "adapter"), tune(tiny_llama(seed=5)).state_dict()
    for name, change in difference(base, tuned).items():
        weight, wanted = found[f"{name}.weight"].double(), expected[f"{name}.weight"].double()
        bound = 2**-24 * change.double().abs() + 2**-23 * wanted.abs()
        assert bool(((weight - wanted).abs() <= bound).all())
        assert (weight != wanted).double().mean() < 0.4  # two unrelated models; measured: a third


@pytest.mark.parametrize("sharded", ["base", "tuned", "both"])
def test_shards_are_read(sharded: str, tmp_path: Path) -> None:
    sizes = {side: "20KB" if sharded in (side, "both") else "1GB" for side in ("base", "tuned")}
    base = save(tiny_llama(), tmp_path / "base", max_shard_size=sizes["base"])
    tuned = save(tune(tiny_llama()), tmp_path / "tuned", max_shard_size=sizes["tuned"])
    assert {side for side in sizes if (tmp_path / side / "model.safetensors.index.json").exists()} == (
        {"base", "tuned"} if sharded == "both" else {sharded}
    )
    extract(base, tuned, tmp_path / "adapter", update_ratio=1.0)
    assert_same_bits(merged(base, tmp_path / "adapter"), tune(tiny_llama()).state_dict())


def test_a_hub_id_in_the_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair(tmp_path, max_shard_size="20KB")
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return {"some/base": base, "some/tuned": tuned}[name]

    monkeypatch.setattr("peft_dowser.files.checkpoint.snapshot_download", snapshot)
    extract("some/base", "some/tuned", tmp_path / "adapter", update_ratio=1.0)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    assert_same_bits(merged(base, tmp_path / "adapter"), tune(tiny_llama()).state_dict())
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    assert asked[:2] == [
        ["config.json", "model.safetensors", "model.safetensors.index.json"],
        sorted(set(index["weight_map"].values())),
    ]


# What is kept


def test_top_delta_keeps_the_largest_of_each_matrix(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    counts = extract(base, tuned, tmp_path / "adapter")
    found = deltas(tmp_path / "adapter", base)
    for name, change in difference(base, tuned).items():
        count = round(0.1 * change.numel())
        assert counts[name] == count
        smallest = change.abs().view(-1).sort(descending=True).values[count - 1]
        assert torch.equal(found[name], torch.where(change.abs() >= smallest, change, 0))


def test_graft_keeps_the_largest_of_all(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    counts = extract(base, tuned, tmp_path / "adapter", update_ratio=0.02, method="graft")
    changes, found = difference(base, tuned), deltas(tmp_path / "adapter", base)
    sizes = torch.cat([change.abs().view(-1) for change in changes.values()])
    count = round(0.02 * len(sizes))
    smallest = sizes.sort(descending=True).values[count - 1]
    assert sum(counts.values()) == count
    assert len(set(counts.values())) > 4
    for name, change in changes.items():
        expected = torch.where(change.abs() >= smallest, change, 0)
        assert torch.equal(found[name], expected) if name in found else not expected.any()


def test_dare_has_a_seed_and_a_draw_for_every_module(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    kept = []
    for number, seed in enumerate((7, 7, 8)):
        folder = tmp_path / f"adapter{number}"
        extract(base, tuned, folder, update_ratio=0.3, method="dare", seed=seed)
        kept.append({name: delta != 0 for name, delta in deltas(folder, base).items()})
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not any(torch.equal(kept[0][name], kept[2][name]) for name in kept[0])
    queries = [mask for name, mask in kept[0].items() if "q_proj" in name]
    assert not torch.equal(*queries)
    for name, change in difference(base, tuned).items():
        expected = postmerge.dare(torch.zeros_like(change), change, 0.3, derived_seed(7, "dare", name))
        assert torch.equal(kept[0][name].view(-1).nonzero().view(-1), expected.positions.long())


def test_scale_is_wise_ft(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    extract(base, tuned, tmp_path / "adapter", update_ratio=1.0, scale=0.25)
    found = deltas(tmp_path / "adapter", base)
    for name, change in difference(base, tuned).items():
        assert torch.equal(found[name], 0.25 * change)


def test_entries_and_modules_that_did_not_change_take_no_room(tmp_path: Path) -> None:
    base = save(tiny_llama(), tmp_path / "base")
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, :5] += 1
    tuned = save(model, tmp_path / "tuned")
    assert extract(base, tuned, tmp_path / "adapter", update_ratio=1.0) == {"model.layers.1.mlp.up_proj": 5}
    assert_same_bits(merged(base, tmp_path / "adapter"), model.state_dict())


def test_targets_can_be_chosen(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    with pytest.warns(UserWarning, match="^10 tensors outside the target weights differ and are not in the adapter: "):
        counts = extract(base, tuned, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    assert [name.rpartition(".")[2] for name in counts] == ["q_proj", "up_proj"] * 2
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert saved["target_modules"] == ["q_proj", "up_proj"]
    assert deltas(tmp_path / "adapter", base).keys() == counts.keys()


# The files


def test_the_files_are_those_of_save_pretrained(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    extract(base, tuned, tmp_path / "extracted", update_ratio=0.2, seed=3)
    trained = get_peft_model(LlamaForCausalLM.from_pretrained(base), config(score="random", update_ratio=0.2, seed=3))
    trained.save_pretrained(tmp_path / "trained")
    shapes, configs = [], []
    for folder in ("extracted", "trained"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", framework="pt") as file:
            shapes.append(
                {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in file.keys()}
            )
            assert file.metadata() == {"format": "pt"}
        configs.append(json.loads((tmp_path / folder / "adapter_config.json").read_text()))
    assert shapes[0] == shapes[1]
    about_the_base = [
        {
            name: (entry["shape"], entry["nnz"], entry["base_sample"])
            for name, entry in one["manifest"]["modules"].items()
        }
        for one in configs
    ]
    assert about_the_base[0] == about_the_base[1]
    different = {key for key in configs[1].keys() - {"manifest"} if configs[0][key] != configs[1][key]}
    assert configs[0].keys() == configs[1].keys()
    assert different == {"score", "num_probes", "num_rademacher", "probe_length"}  # those of the helper
    assert configs[0]["base_model_name_or_path"] == base


def test_the_adapter_loads_trains_and_saves_like_any_other(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    counts = extract(base, tuned, tmp_path / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert model.get_nb_trainable_parameters()[0] == sum(counts.values())
    before = load_file(tmp_path / "adapter/adapter_model.safetensors")
    model.save_pretrained(tmp_path / "again")
    assert_same_bits(load_file(tmp_path / "again/adapter_model.safetensors"), before)


# Other architectures


def classifier() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE, vocab_size=64, pad_token_id=0))


FAMILIES = [
    (llava, "language_model.layers.", None),  # transformers renames its tensors on load
    (gpt2, ".h.", "CAUSAL_LM"),  # tied head; weights stored transposed
    (t5, "block.", "SEQ_2_SEQ_LM"),
    (classifier, "_proj.weight", None),
]


@pytest.mark.parametrize(("make", "part", "task"), FAMILIES, ids=[make.__name__ for make, _, _ in FAMILIES])
def test_other_architectures(make: Callable, part: str, task: str | None, tmp_path: Path) -> None:
    changed = seeded(make)
    for module in changed.modules():
        if (weight := getattr(module, "weight", None)) is not None and weight.dim() == 2:
            weight.requires_grad_("Embedding" not in type(module).__name__)
    for name, parameter in changed.named_parameters():
        if part in name and parameter.dim() == 2 and parameter.requires_grad and "relative" not in name:
            parameter.data *= 1.25
    base, tuned = save(seeded(make), tmp_path / "base"), save(changed, tmp_path / "tuned")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(base, tuned, tmp_path / "adapter", update_ratio=1.0)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"] == task
    model = PeftModel.from_pretrained(type(changed).from_pretrained(base), str(tmp_path / "adapter"))
    assert_same_bits(model.merge_and_unload().state_dict(), changed.state_dict())


def test_a_base_model_without_its_head_is_renamed_as_on_load(tmp_path: Path) -> None:
    """A checkpoint of `LlamaModel` whose config names `LlamaForCausalLM`: transformers adds the prefix."""
    base, tuned = pair(tmp_path)
    path = tmp_path / "tuned/model.safetensors"
    save_file({key.removeprefix("model."): value for key, value in load_file(path).items()}, path)
    extract(base, tuned, tmp_path / "adapter", update_ratio=1.0)
    assert_same_bits(merged(base, tmp_path / "adapter"), tune(tiny_llama()).state_dict())


def test_tied_tensors_are_the_same_whatever_their_name(tmp_path: Path) -> None:
    base, tuned = save(seeded(gpt2), tmp_path / "base"), save(tune(seeded(gpt2), ".c_fc.weight"), tmp_path / "tuned")
    path = tmp_path / "tuned/model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, path)
    extract(base, tuned, tmp_path / "adapter")


# What is said


def test_other_tensors_that_differ_are_named_once(tmp_path: Path) -> None:
    model = tune(tiny_llama())
    model.model.norm.weight.data[0] += 1
    model.lm_head.weight.data[0] += 1
    base, tuned = save(tiny_llama(), tmp_path / "base"), save(model, tmp_path / "tuned")
    with pytest.warns(UserWarning) as caught:
        extract(base, tuned, tmp_path / "adapter")
    assert [str(warning.message) for warning in caught] == [
        "2 tensors outside the target weights differ and are not in the adapter: 'lm_head.weight', 'model.norm.weight'."
    ]
    assert caught[0].filename == __file__


def test_embeddings_of_another_size_are_named(tmp_path: Path) -> None:
    model = tune(tiny_llama())
    with torch.random.fork_rng():
        model.resize_token_embeddings(70, mean_resizing=False)
    base, tuned = save(tiny_llama(), tmp_path / "base"), save(model, tmp_path / "tuned")
    with pytest.warns(UserWarning, match=r"2 tensors .*: 'lm_head.weight', 'model.embed_tokens.weight'\."):
        extract(base, tuned, tmp_path / "adapter", update_ratio=1.0)


def test_nothing_global_changes(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    for method in ("dare", "graft"):
        extract(base, tuned, tmp_path / method, method=method)
    after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_the_bar_counts_the_pairs_that_are_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, tuned = pair(tmp_path)
    for method, total in (("top_delta", 14), ("graft", 70)):
        capsys.readouterr()
        extract(base, tuned, tmp_path / method, method=method)
        assert f"{total}/{total}" in capsys.readouterr().err


# Mistakes


def refuse(message: str, folder: Path, base: str | None = None, tuned: str | None = None, **options) -> None:
    """Extracting fails with this message, and writes nothing."""
    output = folder / "adapter"
    with pytest.raises((ValueError, OSError, TypeError), match=re.escape(message)):
        extract(base or str(folder / "base"), tuned or str(folder / "tuned"), output, **options)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_ratio": 0}, "DowserConfig: update_ratio must be a number in (0, 1], got 0."),
        ({"update_ratio": float("nan")}, "DowserConfig: update_ratio must be a number in (0, 1], got nan."),
        ({"seed": -1}, "DowserConfig: seed must be an integer of at least 0, got -1."),
        ({"method": "ties"}, "method must be one of top_delta, dare, graft, got 'ties'."),
        ({"scale": 0.0}, "scale must be a finite number other than 0, got 0.0."),
        ({"scale": float("inf")}, "scale must be a finite number other than 0, got inf."),
        ({"scale": 1e40}, "scale=1e+40 is too large: values are no longer finite in float32."),
        ({"target_modules": ["norm"]}, "Target module 'model.norm' is a LlamaRMSNorm. Target modules must"),
    ],
)
def test_arguments_are_checked(options: dict, message: str, tmp_path: Path) -> None:
    pair(tmp_path)
    refuse(message, tmp_path, **options)


def test_targets_that_match_nothing_are_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    with pytest.raises(NoMatchingPeftModuleError, match=r"Target modules \['nope'\] not found in the base model"):
        extract(base, tuned, tmp_path / "adapter", target_modules=["nope"])


def test_the_same_checkpoint_twice_is_refused(tmp_path: Path) -> None:
    base, _ = pair(tmp_path)
    (tmp_path / "link").symlink_to(base)
    for other in (base, str(tmp_path / "link"), f"{base}/"):
        refuse(f"base and tuned are the same checkpoint, '{base}'.", tmp_path, tuned=other)
    refuse("base and tuned are the same checkpoint, 'some/model'.", tmp_path, base="some/model", tuned="some/model")


def test_models_that_do_not_differ_are_refused(tmp_path: Path) -> None:
    base, copy = save(tiny_llama(), tmp_path / "base"), save(tiny_llama(), tmp_path / "tuned")
    refuse(f"'{copy}' and '{base}' do not differ in what 'top_delta' keeps of 14 modules.", tmp_path)


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    before = sorted((tmp_path / "base").iterdir())
    with pytest.raises(FileExistsError, match=re.escape(f"'{base}' is not an empty folder; choose another output")):
        extract(base, tuned, base)
    assert sorted((tmp_path / "base").iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        extract(base, tuned, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    extract(base, tuned, tmp_path / "empty")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    pair(tmp_path)
    other = save(seeded(gpt2), tmp_path / "gpt2")
    refuse(
        f"is a LlamaForCausalLM and '{other}' a GPT2LMHeadModel; the fine-tuned model must have", tmp_path, tuned=other
    )
    deeper = save(tiny_llama(layers=3), tmp_path / "deeper")
    for sides in ({"base": deeper}, {"tuned": deeper}):
        refuse("have different architectures: 9 tensors, such as 'model.layers.2.", tmp_path, **sides)
    wider = save(tiny_llama(hidden=64), tmp_path / "wider")
    refuse(
        "The target weight 'model.layers.0.self_attn.q_proj.weight' is F32 of shape (32, 32) in "
        f"'{tmp_path / 'base'}' and F32 of shape (64, 64) in '{wider}'; it must be the same in both, of one of F16, ",
        tmp_path,
        tuned=wider,
    )


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    pair(tmp_path)
    half = save(tune(tiny_llama(torch.bfloat16)), tmp_path / "half")
    refuse(
        f"F32 of shape (32, 32) in '{tmp_path / 'base'}' and BF16 of shape (32, 32) in '{half}'", tmp_path, tuned=half
    )
    for side in ("base", "tuned"):
        edit_tensors(
            tmp_path / side / FILE,
            lambda tensors: {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()},
        )
    refuse("it must be the same in both, of one of F16, BF16, F32, F64.", tmp_path)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_missing_weight_is_refused(side: str, tmp_path: Path) -> None:
    pair(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(tmp_path / side / FILE, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    refuse(f"'{tmp_path / side}' has no tensor for the target weight '{name}': the checkpoint is incomplete", tmp_path)


@pytest.mark.parametrize("method", ["top_delta", "graft"])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_weights_that_are_not_finite_are_refused(side: str, method: str, tmp_path: Path) -> None:
    pair(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(
        tmp_path / side / FILE,
        lambda tensors: tensors | {name: tensors[name].index_fill(0, torch.tensor([2]), float("nan"))},
    )
    message = f"'{tmp_path / side}': tensor '{name}' has 64 entries that are not finite."
    refuse(message, tmp_path, method=method)


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "holds neither model.safetensors nor model.safetensors.index.json. Load the model and write it with "
            "save_pretrained(), which makes one of them.",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{"), "is not a readable safetensors file"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "names no architecture, so its model class is unknown.",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["Nope"]}'),
            "is a Nope, which this version of transformers does not know.",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    side: str, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    pair(tmp_path)
    damage(tmp_path / side)
    refuse(message, tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(content: str, tmp_path: Path) -> None:
    pair(tmp_path, max_shard_size="20KB")
    path = tmp_path / "tuned/model.safetensors.index.json"
    path.write_text(content)
    refuse(f"'{path}' is not an index of a sharded checkpoint", tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    _, tuned = pair(tmp_path, max_shard_size="20KB")
    first, *rest = sorted((tmp_path / "tuned").glob("model-*.safetensors"))
    first.unlink()
    refuse(f"'{tuned}' lacks 1 of its {len(rest) + 1} shards, such as '{first.name}'.", tmp_path)


@pytest.mark.parametrize("name", ["no/such/folder", "nobody/has-this-model"])
def test_a_checkpoint_that_cannot_be_found_is_refused(name: str, tmp_path: Path) -> None:
    pair(tmp_path)
    refuse(f"'{name}' is neither a folder nor a model on the Hub that can be read (", tmp_path, tuned=name)


def test_a_disk_that_takes_no_more_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = pair(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_little(*args, **kwargs) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_file(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(files, "save_file", save_little)
    with pytest.raises(OSError, match=r"adapter_model\.safetensors' cannot be written \(.*File too large"):
        extract(base, tuned, tmp_path / "adapter")
    assert not list((tmp_path / "adapter").iterdir())
