"""Probes of encoder-decoders with prompts whose decoder reads tokens of its own, against plain autograd."""

import pytest
import torch
from models import config
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

from peft_dowser import probe
from peft_dowser.delta.seeds import derived_seed

R = 3
SPECIAL = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes, **SPECIAL))


def t5_gemma() -> nn.Module:
    """Its forward takes `logits_to_keep`."""
    part = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    return T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=part, decoder=part, vocab_size=64))


def bart() -> nn.Module:
    half = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in half.items()}
    return BartForConditionalGeneration(
        BartConfig(d_model=16, vocab_size=64, max_position_embeddings=32, bos_token_id=2, **sizes, **SPECIAL)
    )


# Builder, and a module of the last layer of its decoder.
MODELS = {
    "t5": (t5, "decoder.block.1.layer.2.DenseReluDense.wo"),
    "t5_gemma": (t5_gemma, "model.decoder.layers.1.mlp.down_proj"),
    "bart": (bart, "model.decoder.layers.1.fc2"),
}


def built(family: str) -> tuple[nn.Module, str]:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    builder, name = MODELS[family]
    model = builder().eval().double()
    torch.set_rng_state(state)
    return model, name


def ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))


PADDED = torch.tensor([[1, 1, 1, 0]])
# Prompts, and how many tokens of the decoder of each are real.
PROMPTS = {
    "shorter": ([{"input_ids": ids(n), "decoder_input_ids": ids(4, n)} for n in (5, 7)], [4, 4]),
    "longer": ([{"input_ids": ids(n), "decoder_input_ids": ids(9, n)} for n in (5, 7)], [9, 9]),
    "as long": ([{"input_ids": ids(n), "decoder_input_ids": ids(n, 9)} for n in (5, 7)], [5, 7]),
    "padded encoder": (
        [{"input_ids": ids(4, n), "attention_mask": PADDED, "decoder_input_ids": ids(6, n)} for n in (1, 2)],
        [6, 6],
    ),
    "padded decoder": (
        [{"input_ids": ids(n), "decoder_input_ids": ids(4, n), "decoder_attention_mask": PADDED} for n in (5, 7)],
        [3, 3],
    ),
}


def sensitivity(model: nn.Module, name: str, prompt: dict[str, Tensor], number: int, real: int) -> Tensor:
    """Mean over Rademacher vectors and real tokens of |d(xi^T f)/dz|, f the logits at the last of these tokens."""
    outputs = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(**prompt).logits[0, real - 1]
    hook.remove()
    generator = torch.Generator().manual_seed(derived_seed(0, "rademacher", number))
    signs = [2.0 * torch.randint(2, (64,), generator=generator, dtype=torch.int8) - 1 for _ in range(R)]
    grads = [torch.autograd.grad((logits * xi).sum(), outputs[0], retain_graph=True)[0][0] for xi in signs]
    return torch.stack(grads).abs().mean(0)[:real].mean(0)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("size", [1, 2])
def test_f_is_taken_at_the_last_token_of_the_decoder(size: int, kind: str, family: str) -> None:
    (model, name), (prompts, real) = built(family), PROMPTS[kind]
    given = config(num_rademacher=R, probe_batch_size=size, target_modules=[name])
    found = probe(model, given, prompts=prompts).modules[name].sensitivity
    for number, prompt in enumerate(prompts):
        expected = sensitivity(model, name, prompt, number, real[number])
        torch.testing.assert_close(found[number].double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("size", [1, 2])
def test_the_gradient_is_that_of_the_next_tokens_of_the_decoder(size: int, kind: str) -> None:
    (model, name), (prompts, real) = built("t5"), PROMPTS[kind]
    given = config(score="gradient", num_rademacher=R, probe_batch_size=size, target_modules=[name])
    found = probe(model, given, prompts=prompts).modules[name].gradient
    losses = []
    for prompt, count in zip(prompts, real, strict=True):
        written = prompt["decoder_input_ids"][0, :count]
        losses.append(nn.functional.cross_entropy(model(**prompt).logits[0, : count - 1], written[1:]))
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(found.double(), model.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-8)


def test_a_gradient_needs_the_tokens_of_the_decoder() -> None:
    model, name = built("bart")  # makes them itself, of those of the encoder
    prompts = [ids(5)[0]]
    assert name in probe(model, config(target_modules=[name]), prompts=prompts).modules
    with pytest.raises(ValueError, match="needs prompts with decoder_input_ids"):
        probe(model, config(target_modules=[name], score="gradient"), prompts=prompts)


def test_padding_that_would_be_mistaken_is_refused() -> None:
    model, name = built("t5")
    prompt = {"input_ids": ids(4), "attention_mask": PADDED, "decoder_input_ids": ids(4, 1)}
    with pytest.raises(ValueError, match=r"as many tokens for the encoder as for the decoder.*Leave the padding out"):
        probe(model, config(target_modules=[name]), prompts=[prompt])
    prompt["decoder_attention_mask"] = PADDED
    assert name in probe(model, config(target_modules=[name]), prompts=[prompt]).modules
