"""Write a language model and a data set that are small enough to try a framework on a CPU:

    python examples/integrations/tiny_model.py FOLDER

FOLDER/model is a Llama with random weights and the tokenizer of `examples/tiny_llava`, FOLDER/data.jsonl has 64 sums
as instructions and outputs. Both are for trying the programs, not for learning anything.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOKENIZER = Path(__file__).parents[1] / "tiny_llava" / "tokenizer.json"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def write_model(folder: Path) -> None:
    """Write the model and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), model_max_length=256, **SPECIAL_TOKENS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(file: Path) -> None:
    """Write the sums, a line of JSON each."""
    pairs = [(a, b) for a in range(8) for b in range(8)]
    rows = [{"instruction": f"{a} + {b} =", "input": "", "output": str(a + b)} for a, b in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a small model and a small data set.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
