"""Fine-tune a language model to put texts into classes:

    python examples/classify.py --data FILE --model Qwen/Qwen3-0.6B

FILE has one line of JSON per example; a tenth of them is for the test:

    {"text": "It broke on the first day.", "label": "bad"}

A model that classifies has no head that writes text, so it cannot write the prompts of a probe. The language model of
the same base can, and what it measures fits by the names of the weights: that is what happens here. With `--score
magnitude` or `--score random` nothing is probed. Without `--model` it is the language model of `examples/tiny_llava`,
without `--data` it learns whether a word begins with a vowel. What is forgotten is not measured: a model that does not
write text has no loss on texts.
"""

import argparse
import random
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import get_peft_model
from recipe import (
    TINY_LLAVA,
    config,
    existing_file,
    fit,
    load,
    max_length,
    needs_probe,
    next_commands,
    parse,
    parser,
    start,
    training,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from peft_dowser import DowserConfig, probe


def vowels(count: int) -> Dataset:
    rng = random.Random(0)
    words = ["".join(rng.sample("abcdefghijklmnop", 4)) for _ in range(count)]
    return Dataset.from_list([{"text": word, "label": "vowel" if word[0] in "aeio" else "other"} for word in words])


def without_images(folder: str) -> str:
    """The language model of the small LLaVA as a model of its own."""
    whole = load(TINY_LLAVA)
    model = AutoModelForCausalLM.from_config(whole.config.text_config)
    model.model.load_state_dict(whole.model.language_model.state_dict())
    model.lm_head.load_state_dict(whole.lm_head.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_LLAVA).save_pretrained(folder)
    return folder


def choice(options: argparse.Namespace) -> DowserConfig:
    """What trains, by a probe of the language model."""
    chosen = config(options, task_type="SEQ_CLS")
    if needs_probe(chosen):
        chosen.statistics = f"{options.output}/statistics.safetensors"
        Path(options.output).mkdir(parents=True, exist_ok=True)
        probe(AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"), chosen).save(chosen.statistics)
    return chosen


def classifier(options: argparse.Namespace, labels: list[str], pad_token_id: int) -> PreTrainedModel:
    names = dict(enumerate(labels))
    form = {"num_labels": len(labels), "id2label": names, "label2id": {name: key for key, name in names.items()}}
    return AutoModelForSequenceClassification.from_pretrained(
        options.model, dtype="auto", pad_token_id=pad_token_id, **form
    )


def main() -> None:
    arguments = parser("Fine-tune a language model to put texts into classes.", "my-classifier", measures=False)
    arguments.add_argument("--data", type=existing_file, help="file of JSON lines with text and label")
    options = parse(arguments, "model", "data")

    rows = load_dataset("json", data_files=options.data, split="train") if options.data else vowels(1000)
    if options.model == TINY_LLAVA:
        options.model = without_images(f"{options.output}/base")
    labels = sorted(set(rows["label"]))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    cut = max_length(options)
    data = rows.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=cut) | {"label": labels.index(row["label"])}
    ).train_test_split(test_size=0.1, seed=0)
    trainer = Trainer(
        get_peft_model(classifier(options, labels, tokenizer.pad_token_id), choice(options)),
        TrainingArguments(**training(options)),
        train_dataset=data["train"],
        processing_class=tokenizer,
    )

    def test() -> tuple[str, float]:
        """The class of the first text, and the percentage of texts that are put in the right class."""
        found = trainer.predict(data["test"])
        classes = found.predictions.argmax(-1)
        return labels[classes[0]], 100 * float((classes == found.label_ids).mean())

    before = test()
    fit(trainer, options.resume)
    trainer.save_model()
    after = test()
    print(f"\ntext:     {data['test'][0]['text']}")
    for name, (label, right) in (("before", before), ("after", after)):
        print(f"{name + ':':<9} {label}; {right:.0f} % of {len(data['test'])} are right")
    print(f"\nsaved:    {options.output}")
    print("next:     " + "\n          ".join(next_commands(options.output, options.granularity)))


if __name__ == "__main__":
    start(main)
