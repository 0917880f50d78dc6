"""Modules that do not see (prompts, tokens, features): their statistics are those of each prompt alone."""

from collections.abc import Callable

import pytest
import torch
from models import config
from torch import Tensor, nn
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    LongformerConfig,
    LongformerModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

from peft_dowser import DowserConfig, probe
from peft_dowser.base.search import resolve_targets
from peft_dowser.delta.seeds import derived_seed

R = 2
SPECIAL = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def switch() -> nn.Module:
    """Experts of linear layers, which get the tokens that a router gives them."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    experts = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64}
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(vocab_size=64, **sizes, **experts, **SPECIAL)
    )


def fsmt() -> nn.Module:
    """Sequence first, all of it."""
    half = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in half.items()}
    vocabularies = {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64}
    return FSMTForConditionalGeneration(
        FSMTConfig(d_model=16, **sizes, **vocabularies, **SPECIAL, bos_token_id=2, use_cache=False)
    )


def xlnet() -> nn.Module:
    """Sequence first, all of it."""
    return XLNetModel(XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32, pad_token_id=0))


def longformer() -> nn.Module:
    """Sequence first in attention, and padded to a multiple of the window; it scales its queries in place."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LongformerModel(LongformerConfig(**sizes, vocab_size=64, attention_window=8, pad_token_id=1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "switch": switch,
    "fsmt": fsmt,
    "xlnet": xlnet,
    "longformer": longformer,
}


def prompts_of(family: str, lengths: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    prompts = [{"input_ids": torch.randint(3, 64, (1, length), generator=generator)} for length in lengths]
    if family in ("switch", "fsmt"):
        prompts = [prompt | {"decoder_input_ids": prompt["input_ids"]} for prompt in prompts]
    return prompts


def factors(
    model: nn.Module, names: list[str], prompt: dict[str, Tensor], number: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sensitivity and activity by module for one prompt alone, by plain autograd."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name in names:

        def see(module, args, output, name=name):
            seen[name] = (args[0].detach(), output)
            return output.clone()

        hooks.append(model.get_submodule(name).register_forward_hook(see))
    output = model(**prompt)
    f = output.logits[0, -1] if "logits" in output else output.last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(derived_seed(0, "rademacher", number))
    gains = dict.fromkeys(seen, 0)
    for _ in range(R):
        signs = 2.0 * torch.randint(2, tuple(f.shape), generator=generator, dtype=torch.int8) - 1
        grads = torch.autograd.grad((f * signs).sum(), [z for _, z in seen.values()], retain_graph=True)
        for name, grad in zip(seen, grads, strict=True):
            gains[name] = gains[name] + grad.abs().flatten(0, -2).sum(0) / R
    found = {}
    for name, (hidden, _) in seen.items():
        # Behind a router the tokens that an expert does not get count as zero.
        count = prompt["input_ids"].shape[1] if hidden.dim() == 2 else hidden.shape[:-1].numel()
        found[name] = (gains[name] / count, hidden.abs().flatten(0, -2).sum(0) / count)
    return found


@pytest.mark.parametrize("lengths", [[4, 4, 4, 4], [4, 7, 6, 5]], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_statistics_are_those_of_each_prompt_alone_whatever_the_batch_size(family: str, lengths: list[int]) -> None:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    torch.set_rng_state(state)
    prompts, names = prompts_of(family, lengths), list(resolve_targets(model, config()))
    expected = [factors(model, names, prompt, number) for number, prompt in enumerate(prompts)]
    for size in (1, 2, 4):
        found = probe(model, config(num_rademacher=R, probe_batch_size=size), prompts=prompts).modules
        assert set(found) == set().union(*expected)
        for name, module in found.items():
            for number, alone in enumerate(expected):
                nothing = (torch.zeros_like(module.sensitivity[0]), torch.zeros_like(module.activity[0]))
                gain, hidden = alone.get(name, nothing)
                torch.testing.assert_close(module.sensitivity[number], gain, rtol=1e-4, atol=1e-7)
                torch.testing.assert_close(module.activity[number], hidden, rtol=1e-4, atol=1e-7)


def test_routers_are_no_targets_by_default() -> None:
    names = list(resolve_targets(switch(), config()))
    assert "encoder.block.1.layer.1.mlp.experts.expert_0.wi" in names
    assert not [name for name in names if "router" in name]


def test_it_is_said_once_that_prompts_do_not_share_batches(caplog: pytest.LogCaptureFixture) -> None:
    probe(xlnet().eval(), config(probe_batch_size=4), prompts=prompts_of("xlnet", [5] * 4))
    (said,) = [record.getMessage() for record in caplog.records if "one prompt at a time" in record.getMessage()]
    assert "target modules, 'layer.0.ff.layer_1' the first, do not keep the prompts of a batch apart" in said


class Gate(nn.Module):
    """A layer that only prompts with a positive first feature pass."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, 0] > 0).nonzero().view(-1)
        return x.index_add(0, rows, self.expert(x[rows]))


def test_rows_that_only_later_prompts_mix_are_refused_not_guessed() -> None:
    torch.manual_seed(0)
    model = Gate()
    prompts = [{"x": torch.tensor([[first, 1.0, 2.0]])} for first in (1.0, -1.0, 2.0, 3.0)]
    with pytest.raises(ValueError, match=r"rows of shape \(1,\) in a batch of 2 prompts.*Set probe_batch_size=1"):
        probe(model, DowserConfig(target_modules=["expert"], probe_batch_size=2), prompts=prompts)
    found = probe(model, DowserConfig(target_modules=["expert"], probe_batch_size=1), prompts=prompts)
    expected = torch.stack([prompt["x"][0].abs() * (prompt["x"][0, 0] > 0) for prompt in prompts])
    assert torch.equal(found.modules["expert"].activity, expected)
