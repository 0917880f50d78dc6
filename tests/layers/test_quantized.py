"""Bases quantized by bitsandbytes, torchao and HQQ: probe, train, save, load, merge and restore.

The libraries are no dependency of the tests: whichever is installed is tested, and continuous integration installs all.
"""

import copy
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from cases import every_granularity
from models import IDS, CountedOps, config, logits, set_values, tiny_llama
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from peft_dowser import DowserLayer
from peft_dowser.base.storage import backend_of, unpack
from peft_dowser.delta.layout import Granularity
from peft_dowser.evaluation.rehearsal import rehearse
from peft_dowser.layers.layer import dowser_layers
from peft_dowser.layers.quantized import QuantizedLinear

pytestmark = [
    pytest.mark.quantized,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # bitsandbytes computes 8-bit products in float16 and says so.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
LIBRARIES = {"8-bit": "bitsandbytes", "4-bit": "bitsandbytes", "torchao": "torchao", "hqq": "hqq"}
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed"),
    )
    for kind, library in LIBRARIES.items()
]
TINY_LLAVA = Path(__file__).parents[2] / "examples" / "tiny_llava"
MERGING = "ignore:Merging into a base quantized by"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden=64).save_pretrained(path)
    return str(path)


def load(folder: str, kind: str) -> nn.Module:
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        wanted = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "hqq":
        return with_hqq(AutoModelForCausalLM.from_pretrained(folder).eval())
    elif kind == "8-bit":
        wanted = BitsAndBytesConfig(load_in_8bit=True)
    else:
        wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=wanted, device_map="cpu", dtype=torch.float32
    )
    for module in model.modules():
        unpack(module)  # so that one kernel computes with and without an adapter
    return model.eval()


def with_hqq(model: nn.Module) -> nn.Module:
    """What transformers did before its version 5, which cannot load HQQ."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent = model.model.get_submodule(name.rpartition(".")[0])
            wanted = BaseQuantizeConfig(nbits=8, group_size=64)
            quantized = HQQLinear(module, wanted, compute_dtype=torch.float32, device="cpu")
            setattr(parent, name.rpartition(".")[2], quantized)
    return model


def layers(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


@every_granularity
@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_are_those_of_the_dequantized_weights(folder: str, kind: str, granularity: Granularity) -> None:
    model = get_peft_model(load(folder, kind), config(granularity=granularity, score="magnitude", update_ratio=0.25))
    assert len(layers(model)) == 14
    for layer in layers(model):
        weight = backend_of(layer.base_layer).get_base_weight(layer.base_layer)  # type: ignore[union-attr]
        scores = weight.abs().view(-1) if granularity == "weight" else weight.abs().mean(0)
        chosen = scores[layer.index("default").decoded().long()]
        assert chosen.numel() == scores.numel() // 4
        assert chosen.max() <= scores.kthvalue(scores.numel() // 4).values


@every_granularity
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_a_trained_one_adds_its_product(
    folder: str, kind: str, granularity: Granularity
) -> None:
    base = load(folder, kind)
    before = logits(base)
    model = get_peft_model(base, config(granularity=granularity))
    assert torch.equal(logits(model), before)
    set_values(model)
    layer = layers(model)[0]
    x = torch.randn(5, layer.in_features)
    dense, at = torch.zeros(layer.out_features, layer.in_features), layer.index("default").decoded().long()
    (dense.view(-1) if granularity == "weight" else dense)[..., at] = layer.values("default").detach()
    expected = layer.base_layer(x) + x @ dense.T
    torch.testing.assert_close(layer(x), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


DEQUANTIZING = [kind for kind in KINDS if kind.values[0] in ("4-bit", "hqq")]


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DEQUANTIZING)
def test_one_product_with_w_plus_d_in_the_dtype_in_which_the_base_computes(
    folder: str, kind: str, compute_dtype: torch.dtype
) -> None:
    """With the bits of a dense layer of the dequantized weight plus the delta, and the gradients of its twin."""
    model = get_peft_model(load(folder, kind), config(score="random"))
    set_values(model)
    layer = layers(model)[0]
    layer.base_layer.compute_dtype = compute_dtype
    values, at = layer.values("default"), layer.index("default").decoded().long()
    dense = backend_of(layer.base_layer).get_base_weight(layer.base_layer).detach().clone()  # type: ignore[union-attr]
    dense.view(-1)[at] += values.detach()
    dense = dense.to(compute_dtype).requires_grad_()
    x, grad = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    expected = nn.functional.linear(x.to(compute_dtype), dense).float()
    expected.backward(grad)
    kept: list[Tensor] = []
    x.requires_grad_()
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor), CountedOps() as ops:
        output = layer(x)
    assert ops.counts["aten::mm"] == 1
    assert torch.equal(output, expected)
    assert max(tensor.numel() for tensor in kept) < dense.numel() / 4
    with CountedOps() as ops:
        output.backward(grad)
    assert ops.counts["aten::mm"] + ops.counts["aten::sparse_sampled_addmm"] == 2
    of_dense = dense.grad.view(-1)[at]  # type: ignore[union-attr]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[compute_dtype]
    torch.testing.assert_close(values.grad, of_dense.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad, (grad.to(compute_dtype) @ dense).float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_library_that_computes_with_integers_runs_itself(folder: str, kind: str) -> None:
    model = get_peft_model(load(folder, kind), config(score="random"))
    assert {layer.is_additive for layer in layers(model)} == {kind in ("8-bit", "torchao")}


@every_granularity
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_it_has_the_same_gradients(
    folder: str, kind: str, granularity: Granularity, reentrant: bool
) -> None:
    model = get_peft_model(load(folder, kind), config(granularity=granularity, score="random")).train()
    set_values(model)
    model.enable_input_require_grads()
    found = []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([layer.values("default").grad.clone() for layer in layers(model)])
    assert all(map(torch.equal, *found))


@every_granularity
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_saves_and_loads(folder: str, kind: str, granularity: Granularity, tmp_path: Path) -> None:
    model = get_peft_model(prepare_model_for_kbit_training(load(folder, kind)), config(granularity=granularity))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(layer.values("default").grad.any() for layer in layers(model))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(layer.values("default").dtype == torch.float32 for layer in layers(model))
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(load(folder, kind)), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


@every_granularity
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_the_base_in_floating_point_loads_without_a_warning(
    folder: str, kind: str, granularity: Granularity, tmp_path: Path
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), config(granularity=granularity, score="magnitude")
    )
    set_values(model)
    model.save_pretrained(tmp_path)
    base = load(folder, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base, tmp_path)
    for layer, original in zip(layers(loaded), dowser_layers(model), strict=True):
        assert torch.equal(layer.values("default"), original.values("default"))


@every_granularity
@pytest.mark.filterwarnings(MERGING)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_rounds_and_unmerging_restores_every_bit(folder: str, kind: str, granularity: Granularity) -> None:
    base = load(folder, kind)
    before = logits(base)
    model = get_peft_model(base, config(granularity=granularity, update_ratio=0.25))
    set_values(model)
    adapted = logits(model)
    model.merge_adapter()
    merged = logits(model)
    assert not torch.equal(merged, before)
    assert (merged - adapted).abs().max() < 0.7 * (adapted - before).abs().max()
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@every_granularity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings(MERGING, "ignore:Already following adapters were merged")
def test_what_is_merged_is_what_runs_also_in_layers_without_it(
    folder: str, kind: str, granularity: Granularity
) -> None:
    model = get_peft_model(
        load(folder, kind), config(granularity=granularity, target_modules=["q_proj"]), adapter_name="a"
    )
    model.add_adapter("b", config(granularity=granularity, target_modules=["up_proj"]))
    set_values(model)
    merged = logits(copy.deepcopy(model).merge_and_unload(adapter_names=["a"]))
    model.set_adapter("b")
    before = logits(model)
    model.merge_adapter(["a"])
    assert torch.equal(logits(model), merged)
    model.merge_adapter(["b"])
    assert all(set(layer.merged_adapters) == {"a", "b"} for layer in layers(model))
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


@every_granularity
@pytest.mark.filterwarnings(MERGING, "ignore:Already following adapters were merged")
@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_are_added_to_the_original_before_it_is_quantized_once(
    folder: str, kind: str, granularity: Granularity
) -> None:
    model = get_peft_model(load(folder, kind), config(granularity=granularity, score="random"))
    model.add_adapter("other", config(granularity=granularity, score="random", seed=1))
    set_values(model)
    apart, together = copy.deepcopy(model), copy.deepcopy(model)
    apart.merge_adapter(["default"])
    apart.merge_adapter(["other"])
    together.merge_adapter(["default", "other"])
    assert torch.equal(logits(apart), logits(together))
    apart.unmerge_adapter()
    assert torch.equal(logits(apart), logits(model))


@every_granularity
@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_announced_and_unloading_gives_a_quantized_model(
    folder: str, kind: str, granularity: Granularity
) -> None:
    model = get_peft_model(load(folder, kind), config(granularity=granularity, update_ratio=0.25))
    set_values(model)
    with pytest.warns(UserWarning, match="rounds every weight of the adapted matrices again"):
        merged = model.merge_and_unload()
    assert not any(isinstance(module, DowserLayer) for module in merged.modules())
    assert backend_of(merged.model.layers[0].self_attn.q_proj) is not None


@every_granularity
@pytest.mark.parametrize("kind", KINDS)
def test_generating_leaves_the_base_quantized_once(folder: str, kind: str, granularity: Granularity) -> None:
    model = get_peft_model(load(folder, kind), config(granularity=granularity))
    set_values(model)
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    assert torch.equal(logits(model), before)


@every_granularity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_trl_trains_it(folder: str, kind: str, granularity: Granularity, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAVA)
    texts = [{"input_ids": [1, *(3 + (7 * row + at) % 60 for at in range(8))]} for row in range(16)]
    trainer = SFTTrainer(
        model=load(folder, kind),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
        peft_config=config(granularity=granularity, score="random"),
    )
    layers = [module for module in trainer.model.modules() if isinstance(module, DowserLayer)]
    trainer.train()
    assert all(int(layer.values("default").count_nonzero()) for layer in layers)
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(folder, kind), tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval()), logits(trainer.model.eval()))


@every_granularity
@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_has_the_gradient_of_the_divergence(kind: str, granularity: Granularity, folder: str) -> None:
    model = get_peft_model(load(folder, kind), config(granularity=granularity, score="random", update_ratio=0.3))
    set_values(model)
    rehearse(model, [{"input_ids": row[None]} for row in IDS], 0.5)
    values = {name: p for name, p in model.named_parameters() if ".dowser_values." in name}
    found = {name: p.grad.clone() for name, p in values.items()}
    model.zero_grad()
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    for p in values.values():
        p.requires_grad_(True)
    now = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    (0.5 * (base.exp() * (base - now)).sum(-1).mean()).backward()
    for name, p in values.items():
        assert torch.allclose(found[name], p.grad, rtol=1e-3, atol=1e-6 * float(p.grad.abs().max()) + 1e-9)
