"""What PEFT users can do with LoRA, SHiRA, Super-Tuning, OSF and Dowser: every cell is tried on a small random model.

    python examples/features/capabilities.py            prints the table
    python examples/features/capabilities.py --readme   writes it into README.md next to it

A capability is there where the attempt does what it should: an error, or an output that silently stays what it was, is
a no. bitsandbytes must be installed for the row of quantized bases.
"""

import argparse
import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    OSFConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    ShiraConfig,
    SupertuningConfig,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import peft_dowser
from peft_dowser import DowserConfig
from peft_dowser.delta.layout import Granularity

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from measure import between_markers

BEGIN, END = "<!-- capabilities -->\n", "<!-- /capabilities -->"
IDS = torch.tensor([[1, 5, 9, 13, 40, 7], [1, 20, 3, 8, 8, 31]])
TARGETS = ["q_proj", "down_proj"]
Method = Callable[..., PeftConfig]
# By name: a config that changes the model from the start.
METHODS: dict[str, Method] = {
    "LoRA": lambda **given: LoraConfig(**({"target_modules": TARGETS, "init_lora_weights": False} | given)),
    "SHiRA": lambda **given: ShiraConfig(**({"target_modules": TARGETS, "r": 2, "init_weights": False} | given)),
    "Super-Tuning": lambda **given: SupertuningConfig(
        **({"target_modules": TARGETS, "sparsity": 0.9, "init_weights": False} | given)
    ),
    "OSF": lambda **given: OSFConfig(**({"target_modules": TARGETS, "effective_rank": 8} | given)),
    "Dowser": lambda **given: dowser("weight", **given),
    "Dowser, input channels": lambda **given: dowser("input_channel", **given),
}


def dowser(granularity: Granularity, **given: Any) -> DowserConfig:
    settings = {"target_modules": TARGETS, "score": "random", "init_weights": False, "task_type": "CAUSAL_LM"}
    return DowserConfig(granularity=granularity, **(settings | given))


def llama(dtype: torch.dtype = torch.float32, tied: bool = False, hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, tie_word_embeddings=tied)).to(dtype).eval()


def fresh() -> LlamaForCausalLM:
    """The same model in another program, whose random numbers are others."""
    model = llama()
    torch.manual_seed(7)
    return model


def adapted(config: PeftConfig, base: nn.Module | None = None) -> PeftModel:
    """An adapted model whose trained weights are not those of the start."""
    model = get_peft_model(llama() if base is None else base, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **options: object) -> Tensor:
    return model(input_ids=ids, **options).logits


def differ(one: Tensor, other: Tensor) -> None:
    if torch.allclose(one, other, atol=1e-5):
        raise ValueError("the adapter changes nothing")


def agree(one: Tensor, other: Tensor, exactly: bool = False) -> None:
    if not (torch.equal(one, other) if exactly else torch.allclose(one, other, atol=1e-4)):
        raise ValueError("the outputs differ")


def targets_of(model: nn.Module) -> set[str]:
    """The modules of the base model that an adapter has changed."""
    return {
        name.removesuffix(".base_layer").removeprefix("base_model.model.")
        for name, _ in model.named_modules()
        if name.endswith(".base_layer")
    }


def saved_and_loaded(method: Method, folder: Path) -> None:
    model = adapted(method())
    model.save_pretrained(folder)
    agree(logits(PeftModel.from_pretrained(fresh(), folder)), logits(model), exactly=True)


def loaded_by_transformers(method: Method, folder: Path) -> None:
    model = adapted(method())
    model.save_pretrained(folder)
    base = fresh()
    base.load_adapter(str(folder))
    agree(logits(base), logits(model))


def low_memory(method: Method, folder: Path) -> None:
    model = adapted(method())
    model.save_pretrained(folder)
    agree(logits(PeftModel.from_pretrained(fresh(), folder, low_cpu_mem_usage=True)), logits(model))


def from_a_state_dict(method: Method, folder: Path) -> None:
    model = adapted(method())
    prefix = "base_model.model."
    state = {key.removeprefix(prefix): tensor for key, tensor in get_peft_model_state_dict(model).items()}
    bare = inject_adapter_in_model(method(), fresh(), state_dict=state)
    set_peft_model_state_dict(bare, state)
    agree(logits(bare.eval()), logits(model))


def conv1d(method: Method, folder: Path) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)).eval()
    extra = {"fan_in_fan_out": True} if hasattr(method(), "fan_in_fan_out") else {}
    model = adapted(method(target_modules=["c_attn"], **extra), base)
    found = logits(model)
    agree(logits(model.merge_and_unload()), found)


def embeddings(method: Method, folder: Path) -> None:
    base = llama()
    before = logits(base)
    model = adapted(method(target_modules=["embed_tokens"]), base)
    found = logits(model)
    differ(found, before)
    agree(logits(model.merge_and_unload()), found)


def tied_weights(method: Method, folder: Path) -> None:
    config = method(target_modules=["embed_tokens"], ensure_weight_tying=True)
    base = llama(tied=True)
    before = logits(base)
    model = adapted(config, base)
    found = logits(model)
    differ(found, before)
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        raise ValueError("the weights are no longer tied")
    model.save_pretrained(folder)
    agree(logits(PeftModel.from_pretrained(llama(tied=True), folder)), found)


def tied_weights_merged(method: Method, folder: Path) -> None:
    config = method(target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = adapted(config, llama(tied=True))
    found = logits(model)
    merged = model.merge_and_unload()
    agree(logits(merged), found)
    if merged.lm_head.weight is not merged.model.embed_tokens.weight:
        raise ValueError("the merged model is not tied")


def experts(method: Method, folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes["num_key_value_heads"] = 4
    base = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=64, num_local_experts=4)).eval()
    before = logits(base)
    model = adapted(method(target_modules=[], target_parameters=["mlp.experts.down_proj"]), base)
    found = logits(model)
    differ(found, before)
    agree(logits(model.merge_and_unload()), found)


def quantized(method: Method, folder: Path) -> None:
    llama(hidden=64).save_pretrained(folder / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=quantization, device_map="cpu", dtype=torch.bfloat16
    )
    before = logits(base)
    differ(logits(adapted(method(), base)), before)


def excluded(method: Method, folder: Path) -> None:
    found = targets_of(adapted(method(exclude_modules=["layers.1.mlp.down_proj"])))
    if "model.layers.0.mlp.down_proj" not in found or "model.layers.1.mlp.down_proj" in found:
        raise ValueError("the wrong modules are adapted")


def some_layers(method: Method, folder: Path) -> None:
    if {name.split(".")[2] for name in targets_of(adapted(method(layers_to_transform=[1])))} != {"1"}:
        raise ValueError("the wrong layers are adapted")


def ratio_of_one_module(method: Method, folder: Path) -> None:
    plain = method()
    field = "ratio_pattern" if isinstance(plain, DowserConfig) else "rank_pattern"
    value = 0.2 if isinstance(plain, DowserConfig) else 4
    sizes = [
        adapted(method(**options)).num_parameters(only_trainable=True) for options in ({}, {field: {"q_proj": value}})
    ]
    if sizes[0] == sizes[1]:
        raise ValueError("the pattern has no effect")


def whole_modules(method: Method, folder: Path) -> None:
    model = adapted(method(modules_to_save=["lm_head"]))
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.1)
    model.save_pretrained(folder)
    agree(logits(PeftModel.from_pretrained(fresh(), folder)), logits(model))


def some_tokens(method: Method, folder: Path) -> None:
    model = adapted(method(trainable_token_indices=[5, 9]))
    found = logits(model)
    model.save_pretrained(folder)
    agree(logits(PeftModel.from_pretrained(fresh(), folder)), found)
    agree(logits(model.merge_and_unload()), found)


def biases(method: Method, folder: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = get_peft_model(base, method(target_modules=["0"], bias="all", task_type=None))
    if not all(layer.requires_grad for name, layer in model.named_parameters() if name.endswith("bias")):
        raise ValueError("the biases do not train")


def several(method: Method, folder: Path) -> None:
    model = adapted(method())
    first = logits(model)
    model.add_adapter("second", method())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second" in name and parameter.is_floating_point():
                parameter.add_(0.05)
    model.set_adapter("second")
    differ(logits(model), first)
    model.delete_adapter("second")
    model.set_adapter("default")
    agree(logits(model), first)
    with model.disable_adapter():
        agree(logits(model), logits(llama()))


def active_together(method: Method, folder: Path) -> None:
    model = adapted(method())
    model.add_adapter("second", method())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second" in name and parameter.is_floating_point():
                parameter.add_(0.05)
    first = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    differ(both, first)
    model.merge_adapter(["default", "second"])
    agree(logits(model), both)


def mixed_batch(method: Method, folder: Path) -> None:
    model = adapted(method())
    base, tuned = logits(llama()), logits(model)
    found = logits(model, adapter_names=["default", "__base__"])
    agree(found[0], tuned[0])
    agree(found[1], base[1])


def combined(method: Method, folder: Path) -> None:
    model = adapted(method())
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")
    expected = logits(model)
    model.set_adapter("same")
    agree(logits(model), expected)


def mixed_with_lora(method: Method, folder: Path) -> None:
    model = get_peft_model(llama(), method(), mixed=True)
    assert isinstance(model, PeftMixedModel)
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    before = logits(model)
    model.set_adapter(["default", "other"])
    differ(logits(model), before)


def merged(method: Method, folder: Path) -> None:
    model = adapted(method())
    found = logits(model)
    agree(logits(model.merge_and_unload(safe_merge=True)), found)


def merged_exactly(method: Method, folder: Path) -> None:
    model = adapted(method(), llama(torch.bfloat16))
    found = logits(model)
    agree(logits(model.merge_and_unload()), found, exactly=True)


def restored_exactly(method: Method, folder: Path) -> None:
    base = llama(torch.bfloat16)
    before = copy.deepcopy(base.state_dict())
    model = adapted(method(), base)
    model.merge_adapter()
    model.unmerge_adapter()
    after = model.unload().state_dict()
    if not all(torch.equal(after[name], tensor) for name, tensor in before.items()):
        raise ValueError("the base is another one")


def scaled(method: Method, folder: Path) -> None:
    model = adapted(method())
    before = logits(model)
    layers = [module for module in model.modules() if hasattr(module, "set_scale") and hasattr(module, "base_layer")]
    for layer in layers:
        layer.set_scale("default", 0.0)
    differ(logits(model), before)
    agree(logits(model), logits(llama()))


def converted(method: Method, folder: Path) -> None:
    model = adapted(method())
    config, state = convert_to_lora(model, rank=32)
    other = get_peft_model(llama(), config)
    set_peft_model_state_dict(other, state)
    agree(logits(other.eval()), logits(model))


def swapped(method: Method, folder: Path) -> None:
    model = adapted(method())
    expected = logits(model)
    model.save_pretrained(folder)
    other = get_peft_model(fresh(), method()).eval()
    if isinstance(method(), DowserConfig):
        peft_dowser.hotswap(other, folder)
    else:
        hotswap_adapter(other, str(folder), adapter_name="default")
    agree(logits(other), expected)


def hooked(method: Method, folder: Path) -> None:
    called = []
    base = llama()
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *arguments: called.append(1))
    logits(adapted(method(), base))
    if not called:
        raise ValueError("the hook did not run")


def compiled(method: Method, folder: Path) -> None:
    model = adapted(method())
    expected = logits(model)
    torch._dynamo.reset()
    agree(logits(torch.compile(model, backend="eager", fullgraph=True)), expected)


CAPABILITIES: dict[str, Callable[[Method, Path], None]] = {
    "save and load, bit for bit": saved_and_loaded,
    "transformers' `load_adapter`": loaded_by_transformers,
    "low-memory loading": low_memory,
    "injection from a state dict": from_a_state_dict,
    "Conv1D (GPT-2)": conv1d,
    "embeddings": embeddings,
    "tied weights (`ensure_weight_tying`)": tied_weights,
    "tied weights, merged": tied_weights_merged,
    "fused experts (`target_parameters`)": experts,
    "4-bit base (bitsandbytes)": quantized,
    "`exclude_modules`": excluded,
    "`layers_to_transform`": some_layers,
    "rank or ratio by module": ratio_of_one_module,
    "`modules_to_save`": whole_modules,
    "`trainable_token_indices`": some_tokens,
    "`bias`": biases,
    "several adapters, switch, disable, delete": several,
    "several active at once": active_together,
    "batches that mix adapters": mixed_batch,
    "`add_weighted_adapter`": combined,
    "`PeftMixedModel` with LoRA": mixed_with_lora,
    "merge": merged,
    "merged bfloat16 model gives the same bits": merged_exactly,
    "unmerge restores every bit in bfloat16": restored_exactly,
    "`set_scale`": scaled,
    "`convert_to_lora`": converted,
    "hotswap": swapped,
    "hooks on a base layer run": hooked,
    "`torch.compile(fullgraph=True)`": compiled,
}


def tried(capability: Callable[[Method, Path], None], method: Method) -> bool:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            capability(method, Path(folder))
        except Exception as error:
            logging.getLogger(__name__).info("%s: %r", capability.__name__, error)
            return False
    return True


def table(capabilities: dict[str, Callable[[Method, Path], None]]) -> str:
    lines = ["| | " + " | ".join(METHODS) + " |", "|---" * (1 + len(METHODS)) + "|"]
    for name, capability in capabilities.items():
        cells = ["yes" if tried(capability, method) else "no" for method in METHODS.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Capabilities of PEFT methods, each tried.")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md next to this file")
    parser.add_argument("--why", action="store_true", help="say why a capability is missing")
    options = parser.parse_args()
    if options.why:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = table(CAPABILITIES)
    print(found)
    if options.readme:
        between_markers(Path(__file__).parent / "README.md", found, BEGIN, END)


if __name__ == "__main__":
    main()
