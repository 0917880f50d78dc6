"""Fine-tune a language model that is loaded in 4 or 8 bits, and merge the adapter into the unquantized base:

    pip install bitsandbytes
    python examples/quantized.py --text FILE --model Qwen/Qwen3-0.6B --output FOLDER

Quantized base, gradient checkpointing and AdamW with 8-bit states: `peft-dowser plan` says what that takes. FOLDER gets
the `adapter` and the `merged` model, in the precision of the checkpoint; `peft-dowser merge` writes it shard by shard.
Without `--model` it trains the small model in `examples/tiny_llava`, without `--text` on the project's README.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_dowser import DowserConfig, merge

EXAMPLES = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a language model that is loaded in 4 or 8 bits.")
    parser.add_argument("--text", default=str(EXAMPLES.parent / "README.md"), help="text file, UTF-8")
    parser.add_argument("--model", default=str(EXAMPLES / "tiny_llava"), help="folder or Hub id of the base model")
    parser.add_argument("--output", required=True, type=Path, help="folder for the adapter and the merged model")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args()
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
            output_dir=str(options.output / "trainer"),
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            optim="adamw_8bit",
            gradient_checkpointing=True,
            packing=True,
            packing_strategy="wrapped",
            max_length=min(512, AutoTokenizer.from_pretrained(options.model).model_max_length),
            model_init_kwargs={"quantization_config": quantization, "dtype": "auto"},
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=load_dataset("text", data_files=options.text, sample_by="document", split="train"),
        peft_config=DowserConfig(update_ratio=0.1, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(options.output / "adapter")
    merge(options.output / "adapter", options.output / "merged")


if __name__ == "__main__":
    main()
