"""Fine-tune a language model on the lines of a text file, on one process or many.

    torchrun --nproc-per-node 2 examples/accelerate/train.py examples/tiny_llava README.md OUTPUT --use-cpu
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate/train.py MODEL TEXT OUTPUT

The adapter is made before the trainer shards the model; every rank probes a part of the prompts, and rank 0 saves.
"""

import argparse
import os

import transformers
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoConfig, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_dowser import DowserConfig


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a model on the lines of a text file.")
    parser.add_argument("model", help="folder or Hub id of a language model")
    parser.add_argument("text", help="text file, one example per line")
    parser.add_argument("output", help="folder for the adapter")
    parser.add_argument("--update-ratio", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--use-cpu", action="store_true")
    options = parser.parse_args()
    arguments = SFTConfig(
        output_dir=options.output,
        learning_rate=options.learning_rate,
        max_steps=options.max_steps,
        use_cpu=options.use_cpu,
        bf16=False,  # mixed precision of FSDP2 would round the float32 values; the base is in the dtype of its files
        report_to=[],
    )
    # Not left to the trainer, which under ZeRO-3 would load the base in parts.
    (architecture,) = AutoConfig.from_pretrained(options.model).architectures
    base = getattr(transformers, architecture).from_pretrained(options.model)
    if not any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")):
        base.to(arguments.device)  # where the probe is fast; a sharded base stays on the CPU until it is sharded
    model = get_peft_model(base, DowserConfig(update_ratio=options.update_ratio, task_type="CAUSAL_LM"))
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("text", data_files=options.text, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
