"""Fine-tune a language model that is loaded in 4 or 8 bits, and merge the adapter into the unquantized base:

    pip install bitsandbytes
    python examples/quantized.py --text FILE --model Qwen/Qwen3-0.6B --output FOLDER

Quantized base, gradient checkpointing and AdamW with 8-bit states: `peft-dowser plan` says what that takes. FOLDER gets
the adapter, and FOLDER/merged the merged model in the precision of the checkpoint, written shard by shard.
Without `--model` it trains the small model in `examples/tiny_llava`, without `--text` on the project's README.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import load_dataset
from recipe import EXAMPLES, config, max_length, parser, train, training
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_dowser import merge


def main() -> None:
    arguments = parser("Fine-tune a language model that is loaded in 4 or 8 bits.")
    arguments.add_argument("--text", default=str(EXAMPLES.parent / "README.md"), help="text file, UTF-8")
    arguments.add_argument("--bits", type=int, choices=[4, 8], default=4)
    options = arguments.parse_args()
    if find_spec("bitsandbytes") is None:
        sys.exit("This recipe needs bitsandbytes: pip install bitsandbytes")

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
            packing=True,
            packing_strategy="wrapped",
            max_length=max_length(options),
            model_init_kwargs={"quantization_config": quantization, "dtype": "auto"},
        ),
        train_dataset=load_dataset("text", data_files=options.text, sample_by="document", split="train"),
        peft_config=config(options),
    )
    train(trainer, Path(options.text).read_text("utf-8")[:40], options.resume)
    merge(options.output, f"{options.output}/merged")
    print(f"merged:   {options.output}/merged")


if __name__ == "__main__":
    main()
