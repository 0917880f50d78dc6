"""Small models, adapters on them and what they give: the builders that tests share."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto import modeling_auto

from peft_dowser import DowserConfig, DowserLayer
from peft_dowser.delta.layout import Granularity

M = TypeVar("M", bound=nn.Module)
IDS = torch.tensor([[1, 5, 9, 13, 40, 7], [1, 20, 3, 8, 8, 31]])
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE: dict[str, Any] = TOKENS | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
}

ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::_unsafe_view"}


# Models of one family


def seeded(make: Callable[[], M], seed: int = 0) -> M:
    """A model in eval mode whose weights are those of the seed; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def tiny_llama(
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    seed: int = 0,
    hidden: int = 32,
    vocab: int = 64,
    tied: bool = False,
) -> LlamaForCausalLM:
    settings = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=vocab,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        **TOKENS,
    )
    return seeded(lambda: LlamaForCausalLM(settings), seed).to(dtype)


def tied_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return tiny_llama(dtype, tied=True)


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """Of `Conv1D`s, which store weights transposed; its head is tied."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(**sizes, **TOKENS))).to(dtype)


def t5(tied: bool = True) -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    settings = T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=tied)
    return seeded(lambda: T5ForConditionalGeneration(settings))


def llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(**SHAPE, image_size=28, patch_size=14, projection_dim=32)
    text = LlamaConfig(**SHAPE, vocab_size=64)
    settings = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    return seeded(lambda: LlavaForConditionalGeneration(settings))


def tiny_moe(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """With fused experts."""
    return seeded(lambda: _moe(family, MOE | changes)).to(dtype)


def _moe(family: str, sizes: dict[str, Any]) -> PreTrainedModel:
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4))
    elif family == "qwen3_moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=6, moe_intermediate_size=16))
    else:
        model = GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=4))
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):
                nn.init.normal_(parameter, std=0.1)
    for name, parameter in model.named_parameters():
        if "experts" in name or "router" in name or "gate" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


# Models of every architecture with a head that generates text

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
# Sizes, and what configs call them.
NAMES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim emb_dim width hidden_dim",
    64: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim mlp_dim moe_intermediate_size",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth layers "
    "num_key_value_heads num_kv_heads num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    8: "head_dim d_kv rotary_dim",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}


def classes(mapping: str) -> dict[str, str]:
    """Type of the model by the name of its class."""
    return {
        name: model_type
        for model_type, names in MAPPINGS[mapping].items()
        for name in (names if isinstance(names, tuple) else (names,))
    }


def small_model(name: str, model_type: str) -> nn.Module:
    """A random model of that class in eval mode, its config made small, with its own tokens.

    Raises:
        Exception: the config does not allow these sizes, or a library is missing.
    """
    cls: Any = getattr(transformers, name)
    config = AutoConfig.for_model(model_type)
    if not isinstance(config, cls.config_class):
        config = config.get_text_config()
    _make_small(config)
    return cls(config).eval()


def _make_small(config: PreTrainedConfig) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _make_small(value)
        elif key in SIZES and isinstance(value, int):
            setattr(config, key, min(value, SIZES[key]))
        elif key == "layer_types" and isinstance(value, list):
            kinds = sorted(set(value), key=value.index)
            setattr(config, key, (kinds * 2)[:2])


# Adapters


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


def adapted(base: nn.Module | None = None, **overrides) -> PeftModel:
    """The base, a small Llama if none is given, with an adapter that looks trained."""
    model = get_peft_model(tiny_llama() if base is None else base, config(**overrides))
    set_values(model)
    return model.eval()


def saved(folder: Path, base: nn.Module | None = None, seed: int = 0, **overrides) -> PeftModel:
    """The base with an adapter that has a random mask and values of that seed, once it is saved to the folder."""
    choice = {"score": "random", "seed": seed} | overrides
    model = get_peft_model(tiny_llama() if base is None else base, config(**choice))
    set_values(model, seed=seed)
    model.save_pretrained(folder)
    return model


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a file; what returns no dict has changed them in place."""
    tensors = load_file(file)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the config of a saved adapter; what returns no dict has changed it in place."""
    path = folder / "adapter_config.json"
    found = json.loads(path.read_text())
    changed = change(found)
    path.write_text(json.dumps(changed if isinstance(changed, dict) else found))


# What they hold and give


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all base tensors, by their name in the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".dowser_" not in name
    }


def bits(tensor: Tensor) -> Tensor:
    """The tensor as bytes, in which -0 is not 0 and a NaN is itself."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def assert_as_merged(found: Tensor, expected: Tensor, granularity: Granularity) -> None:
    """Outputs of an adapted and of the merged model: of single weights the same bits; of channels rounded otherwise."""
    if granularity == "weight":
        assert torch.equal(found, expected)
        return
    tolerance = 16 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


class CountedOps(TorchDispatchMode):
    """Counts the operations that torch runs, by name, such as "aten::mm".

    Attributes:
        counts: all of them.
        launches: those that would launch a kernel on a GPU: they do more than look at memory in another way, or
            allocate it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.counts[name] += 1
        if not func.is_view and name not in ALLOCATIONS:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))
