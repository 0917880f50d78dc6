"""Small models and configs that many tests use."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dowser import DowserConfig, DowserLayer


def tiny_llama(
    dtype: torch.dtype = torch.float32, layers: int = 2, seed: int = 0, hidden: int = 32
) -> LlamaForCausalLM:
    """A random Llama in eval mode; one seed gives one model."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=64,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )
    torch.set_rng_state(generator_state)
    return model.to(dtype).eval()


def config(**overrides) -> DowserConfig:
    """A config whose probe takes milliseconds."""
    small = {"num_probes": 4, "num_rademacher": 2, "probe_length": 12, "task_type": "CAUSAL_LM"}
    return DowserConfig(**(small | overrides))


def set_values(model: nn.Module, std: float = 0.05, seed: int = 0) -> None:
    """Give every adapter values as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, DowserLayer):
            for values in layer.dowser_values.values():
                values.weight.data.copy_(std * torch.randn(values.weight.shape, generator=generator))


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all base tensors, by their name in the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".dowser_" not in name
    }


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


class CountedOps(TorchDispatchMode):
    """Counts the operations that torch runs, by name, such as "aten::mm"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))
