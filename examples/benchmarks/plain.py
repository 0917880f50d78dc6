"""What a user pays, in plain numbers: megabytes of the adapter, tokens of training that a probe takes, and a step.

    python examples/benchmarks/plain.py --output FILE      # seconds; the README's table, as JSON

Three models by their shapes alone (0.6, 3 and 7 billion parameters), all linears of their layers; nothing is loaded.
The adapter is what `save_pretrained` writes by default, in float32. A probe with 64 prompts of 64 tokens and R = 8 is
given as the number of training tokens that take as much arithmetic. A step is given as its arithmetic in the adapted
linears, relative to LoRA of rank 16.
"""

import argparse
from pathlib import Path

from measure import report
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from peft_dowser import DowserConfig, plan

MODELS: dict[str, PreTrainedConfig] = {
    "0.6 B (Qwen3)": Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "3 B (Llama 3.2)": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "7 B (Llama)": LlamaConfig(architectures=["LlamaForCausalLM"]),
}
ADAPTERS = {
    "single weights, rho = 0.1": DowserConfig(update_ratio=0.1),
    "input channels, rho = 0.1": DowserConfig(granularity="input_channel", score="activity"),
    "16 input channels": DowserConfig(granularity="input_channel", channels=16, score="activity"),
}
RANK = 16


def lora(config: PreTrainedConfig) -> tuple[int, float]:
    """Trained weights of LoRA in all linears of the layers, and its arithmetic for a token of training."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key = head * config.num_attention_heads, head * config.num_key_value_heads
    shapes = [(hidden, query), (hidden, key), (hidden, key), (query, hidden), *[(hidden, inner)] * 3]
    weights = config.num_hidden_layers * sum(rows * columns for rows, columns in shapes)
    trained = config.num_hidden_layers * sum(RANK * (rows + columns) for rows, columns in shapes)
    # Two products of full size; of each factor one in the forward, and two in the backward.
    return trained, 2.0 * (2 * weights + 3 * trained)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a user pays, in plain numbers.")
    parser.add_argument("--output", type=Path, help="file for the rows, as JSON")
    options = parser.parse_args()
    rows = []
    for name, config in MODELS.items():
        trained, step = lora(config)
        rows.append({"model": name, "adapter": f"LoRA r={RANK}", "trained": trained, "megabytes": 4 * trained / 1e6})
        for adapter, chosen in ADAPTERS.items():
            found = plan(config, chosen, tokens=512)
            rows.append(
                {
                    "model": name,
                    "adapter": adapter,
                    "trained": found.trained,
                    "megabytes": (found.file + 2 * found.trained) / 1e6,
                    "probe_in_training_tokens": found.probes[chosen.score].training_tokens,
                    "step_over_lora": found.step_flops / 512 / step,
                }
            )
    report("plain", rows, options.output)


if __name__ == "__main__":
    main()
