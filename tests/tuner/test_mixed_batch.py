"""Batches that mix adapters, against one forward per adapter."""

import pytest
import torch
from models import config, set_values, tiny_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

IDS = torch.tensor([[1, 5, 9, 13, 40, 7], [1, 20, 3, 8, 8, 31], [1, 2, 3, 4, 5, 6], [1, 50, 51, 52, 53, 54]])
NAMES = ["other", "__base__", "default", "other"]


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(tiny_llama(torch.float64), config())
    model.add_adapter("other", config(update_ratio=0.3, seed=1, target_modules=["q_proj", "up_proj", "embed_tokens"]))
    set_values(model)
    return model.eval()


def alone(model: PeftModel, name: str, ids: Tensor) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(input_ids=ids).logits
    model.set_adapter(name)
    return model(input_ids=ids).logits


def test_every_row_is_that_of_its_adapter(model: PeftModel) -> None:
    expected = torch.cat([alone(model, name, IDS[row : row + 1]) for row, name in enumerate(NAMES)])
    model.set_adapter("default")
    found = model(input_ids=IDS, adapter_names=NAMES).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (found[0] - alone(model, "default", IDS[:1])).abs().max() > 1e-3
    torch.testing.assert_close(model(input_ids=IDS).logits, alone(model, "default", IDS))


class Routed(nn.Module):
    """Sends half of the tokens of a batch to its layer, which so sees rows of tokens of any samples."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return rows.index_add(0, torch.arange(0, len(rows), 2), self.expert(rows[::2])).view_as(x)


@pytest.mark.parametrize("targets", [None, ["fc1"], "all-linear"])
@pytest.mark.parametrize("tokens", [1, 4, 6])
def test_layers_that_see_one_row_per_token(targets: list | str | None, tokens: int) -> None:
    """OPT's feed-forward layers; `tokens` is also as many as there are rows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = OPTForCausalLM(OPTConfig(vocab_size=64, word_embed_proj_dim=16, **sizes)).double()
    model = get_peft_model(base, config(score="random", target_modules=targets)).eval()
    model.add_adapter("other", config(score="random", seed=1, target_modules=targets))
    set_values(model)
    ids = IDS[:, :tokens]
    expected = torch.cat([alone(model, name, ids[row : row + 1]) for row, name in enumerate(NAMES)])
    torch.testing.assert_close(model(input_ids=ids, adapter_names=NAMES).logits, expected, rtol=1e-10, atol=1e-10)


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    model = get_peft_model(Routed(), config(score="random", target_modules=["expert"], task_type=None))
    set_values(model)
    x = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match="must have one name for each of the 4 rows, got 2"):
        model(x, adapter_names=["default", "__base__"])


def test_the_gradient_of_an_adapter_comes_from_its_rows(model: PeftModel) -> None:
    for name in ("default", "other"):
        model.set_requires_grad(name, True)
    model(input_ids=IDS, adapter_names=NAMES).logits[2].sum().backward()
    for name, parameter in model.named_parameters():
        if ".dowser_values." in name:
            assert bool(parameter.grad.any()) == (".default." in name)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_mixes_and_merges_nothing(model: PeftModel, beams: int) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    found = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(input_ids=IDS[row : row + 1], **options)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=IDS[row : row + 1], **options)
        width = min(expected.shape[1], found.shape[1])
        assert torch.equal(found[row, :width], expected[0, :width])


def test_modules_to_save_are_mixed_too() -> None:
    model = get_peft_model(tiny_llama(torch.float64), config(modules_to_save=["lm_head"])).eval()
    set_values(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    names = ["__base__", "default", "default", "__base__"]
    expected = torch.cat([alone(model, name, IDS[row : row + 1]) for row, name in enumerate(names)])
    torch.testing.assert_close(model(input_ids=IDS, adapter_names=names).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_names_are_refused_where_the_backward_would_run_layers_again(model: PeftModel) -> None:
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(
        ValueError, match=r"runs layers again, without the names. Call model.gradient_checkpointing_dis"
    ):
        model(input_ids=IDS, adapter_names=NAMES)
    with torch.no_grad():
        model(input_ids=IDS, adapter_names=NAMES)
    model.gradient_checkpointing_disable()
    model(input_ids=IDS, adapter_names=NAMES).logits.sum().backward()


def test_names_that_a_batch_cannot_have_are_refused(model: PeftModel) -> None:
    with pytest.raises(ValueError, match=r"unknown adapters \['nope'\]; the model has \['default', 'other'\]"):
        model(input_ids=IDS, adapter_names=["nope"] * 4)
    with pytest.raises(ValueError, match="one name for each of the 4 rows, got 2"):
        model(input_ids=IDS, adapter_names=["default", "other"])
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match=r"are merged .* Call unmerge_adapter\(\) before a forward with adapter_names"):
        model(input_ids=IDS, adapter_names=NAMES)
