"""Fine-tune a language model that is loaded in 4 or 8 bits, and merge the adapter into the unquantized base:

    pip install bitsandbytes
    python examples/quantized.py --text FILE --model Qwen/Qwen3-0.6B

Quantized base, gradient checkpointing and AdamW with 8-bit states: `peft-dowser plan` says what that takes. The output
folder gets the adapter, and in `merged` the merged model in the precision of the checkpoint, written shard by shard.
Without `--model` it trains the small model in `examples/tiny_llava`, without `--text` on the project's README.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from recipe import add_text, config, forgetting, packed, parse, parser, refuse_used, start, text_of, train, training
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_dowser import merge


def main() -> None:
    arguments = parser("Fine-tune a language model that is loaded in 4 or 8 bits.", "my-quantized-adapter")
    add_text(arguments)
    arguments.add_argument("--bits", type=int, choices=[4, 8], default=4, help="of a weight of the base")
    options = parse(arguments, "model", "text")
    if find_spec("bitsandbytes") is None:
        sys.exit("This recipe needs bitsandbytes: pip install bitsandbytes")
    refuse_used(arguments, f"{options.output}/merged")

    quantization = BitsAndBytesConfig(
        load_in_4bit=options.bits == 4,
        load_in_8bit=options.bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(
            **training(options),
            optim="adamw_8bit",
            gradient_checkpointing=True,
            **packed(options),
            model_init_kwargs={"quantization_config": quantization, "dtype": "auto"},
        ),
        **text_of(options),
        peft_config=config(options),
        callbacks=forgetting(options),
    )
    train(trainer, Path(options.text).read_text("utf-8")[:40], options.resume)
    merge(options.output, f"{options.output}/merged")
    print(f"merged:   {options.output}/merged")


if __name__ == "__main__":
    start(main)
