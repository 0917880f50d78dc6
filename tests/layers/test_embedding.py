"""Embeddings as targets: rows of W + D, statistics of one-hot inputs, exactness; and weights that are tied."""

import warnings
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from models import IDS, adapted, config, logits, tied_llama, tiny_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from peft_dowser import DowserLayer, probe
from peft_dowser.config import Score
from peft_dowser.layers.linear_op import summed_rows

EMBEDDING = "model.embed_tokens"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def gemma(dtype: torch.dtype = torch.float32) -> Gemma3ForCausalLM:
    """A model whose embeddings are scaled."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 64}
    settings = Gemma3TextConfig(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False, **sizes)
    return Gemma3ForCausalLM(settings).to(dtype).eval()


def with_embedding(base: nn.Module | None = None, **overrides) -> PeftModel:
    choice = {"target_modules": ["embed_tokens", "up_proj"], "score": "magnitude", "update_ratio": 0.3}
    return adapted(base, **(choice | overrides))


def embedding(model: nn.Module) -> DowserLayer:
    return next(m for m in model.modules() if isinstance(m, DowserLayer) and m.module_name == EMBEDDING)


# The op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_summed_rows_against_the_dense_sum(dtype: torch.dtype, index: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 5, generator=generator).to(dtype)
    dense = weight.clone()
    values, positions = [], []
    for nnz in (45, 0, 17, 1):
        at = torch.randperm(45, generator=generator)[:nnz].sort().values
        delta = torch.randn(nnz, generator=generator)
        values.append(delta)
        positions.append(at.to(index))
        wide = dense.to(torch.promote_types(dtype, torch.float32)).view(-1)
        wide[at] += delta
        dense = wide.view(9, 5).to(dtype)
    for rows in ([0], [8], [0, 3, 4, 8], list(range(9)), []):
        chosen = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(summed_rows(weight, chosen, values, positions), dense[chosen])


@pytest.mark.parametrize("padding", [None, 8, 2])
def test_gradients_are_those_of_the_dense_embedding(padding: int | None) -> None:
    base = tiny_llama()
    base.model.embed_tokens.padding_idx = padding
    layer = embedding(with_embedding(base, target_modules=["embed_tokens"]))
    index, values = layer.index("default"), layer.values("default")
    loss_weights = torch.randn(*IDS.shape, 32, generator=torch.Generator().manual_seed(1))
    (layer(IDS) * loss_weights).sum().backward()
    dense = layer.weight.detach().clone().view(-1)
    dense[index.decoded()] += values.detach()
    dense = dense.view(64, 32).requires_grad_(True)
    (F.embedding(IDS, dense, padding) * loss_weights).sum().backward()
    assert torch.allclose(values.grad, dense.grad.view(-1)[index.decoded()], atol=1e-6)


# The tuner


@pytest.mark.parametrize("make", [tiny_llama, gemma])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapted_and_merged_models_give_the_same_bits(make, dtype: torch.dtype) -> None:
    base = make(dtype)
    before = base.get_submodule(EMBEDDING).weight.detach().clone()
    bare = logits(base)
    model = with_embedding(base)
    trained = logits(model)
    assert not torch.equal(trained, bare)
    model.merge_adapter()
    assert torch.equal(logits(model), trained)
    model.unmerge_adapter()
    assert torch.equal(embedding(model).weight, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model.merge_and_unload()), trained)


def test_only_the_chosen_entries_train_and_a_saved_adapter_gives_the_same_bits(tmp_path: Path) -> None:
    model = with_embedding().train()
    layer = embedding(model)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    start = layer.values("default").detach().clone()
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(layer.values("default"), start)
    assert torch.equal(layer.weight, before)
    model.eval().save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), logits(model))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_that_peft_saved_with_the_embeddings_loads_too(tmp_path: Path) -> None:
    model = with_embedding()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), logits(model))


def test_hooks_of_the_embedding_run() -> None:
    plain, hooked = with_embedding(), tiny_llama()
    seen = []
    hooked.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model = with_embedding(hooked)
    seen.clear()
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    assert len(seen) == 1
    assert torch.equal(seen[0], IDS)


def test_embeddings_are_never_targets_by_default() -> None:
    model = get_peft_model(tiny_llama(), config())
    assert not any(m.module_name == EMBEDDING for m in model.modules() if isinstance(m, DowserLayer))


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_an_embedding_that_does_more_than_look_up_is_refused(max_norm: float | None) -> None:
    class Shifted(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input + 1)

    base = tiny_llama()
    base.model.embed_tokens = Shifted(64, 32) if max_norm is None else nn.Embedding(64, 32, max_norm=max_norm)
    with pytest.raises(TypeError, match=r"'model.embed_tokens' is a .*Embedding that only looks up rows"):
        with_embedding(base)


# The probe


def test_statistics_are_those_of_one_hot_inputs() -> None:
    """Against the twin in which the embedding is a linear layer on one-hot vectors."""

    class OneHot(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.linear = nn.Linear(*weight.shape, bias=False)
            self.linear.weight.data = weight.T.contiguous()

        def forward(self, ids: Tensor) -> Tensor:
            return self.linear(F.one_hot(ids, 64).float())

    prompts = [torch.tensor([1, 5, 5, 9]), torch.tensor([1, 7, 20, 3, 3, 3, 60])]
    found = probe(tiny_llama(), config(target_modules=["embed_tokens"], score="gradient"), prompts=prompts)
    twin = tiny_llama()
    twin.model.embed_tokens = OneHot(twin.model.embed_tokens.weight.detach())
    expected = probe(twin, config(target_modules=["embed_tokens.linear"], score="gradient"), prompts=prompts)
    one, other = found.modules[EMBEDDING], expected.modules[EMBEDDING + ".linear"]
    for name in ("sensitivity", "activity", "energy", "gradient"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-6), name
    assert one.activity[0, 5] == 0.5


@pytest.mark.parametrize("score", get_args(Score))
def test_every_score_chooses_the_exact_share(score: str) -> None:
    model = get_peft_model(tiny_llama(), config(target_modules=["embed_tokens"], score=score, update_ratio=0.3))
    assert embedding(model).values("default").numel() == round(0.3 * 64 * 32)


# Tied weights


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_target_is_refused(name: str) -> None:
    base = tied_llama()
    other = {"lm_head": "model.embed_tokens", "embed_tokens": "lm_head"}[name]
    with pytest.raises(ValueError, match=rf"is tied: it is shared with \['{other}.weight'\], which.*untie"):
        get_peft_model(base, config(target_modules=[name]))
    assert not any(isinstance(module, DowserLayer) for module in base.modules())


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_target_of_an_offloaded_base_is_refused(name: str) -> None:
    base = cpu_offload(tied_llama(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"is tied: it is shared with \['.*.weight'\]"):
        with_embedding(base, target_modules=[name])


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_not_tied_in_an_offloaded_base_is_adapted(tied: bool) -> None:
    base = cpu_offload(tied_llama() if tied else tiny_llama(), execution_device=torch.device("cpu"))
    model = with_embedding(base, target_modules=["up_proj"] if tied else ["embed_tokens", "lm_head"])
    trained = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), trained, atol=1e-5)


def test_an_untied_target_merges_and_reloads_with_the_same_bits(tmp_path: Path) -> None:
    base = tied_llama()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    model = with_embedding(base, target_modules=["embed_tokens", "lm_head"])
    trained = logits(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), trained)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), trained)


def test_the_other_weights_of_a_tied_model_merge_and_reload_with_the_same_bits(tmp_path: Path) -> None:
    model = with_embedding(tied_llama(), target_modules=["up_proj"])
    trained = logits(model)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), trained)


# Names


@pytest.mark.parametrize("name", ["double", "half", "training", "", "a.b"])
def test_a_name_that_torch_cannot_give_an_adapter_is_refused(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of some of these names
        with pytest.raises(ValueError, match=f"'{name}' cannot be the name of an adapter.*Choose another name"):
            get_peft_model(tiny_llama(), config(), adapter_name=name)
        model = get_peft_model(tiny_llama(), config())
        with pytest.raises(ValueError, match="cannot be the name of an adapter"):
            model.add_adapter(name, config())
    assert list(model.peft_config) == ["default"]


def test_a_weight_that_is_no_parameter_meanwhile() -> None:
    """FSDP1 (`use_orig_params`) puts the gathered weight into a plain attribute while a forward runs."""
    model = with_embedding()
    expected = logits(model)
    base = embedding(model).get_base_layer()
    weight = base.weight
    del base._parameters["weight"]
    base.__dict__["weight"] = weight.detach()
    assert torch.equal(logits(model), expected)
