"""What the tiny LLaVA can do (upstream), what it is fine-tuned on (downstream), and the scores.

Images come from `scenes`, text from `prose`. One character is one token.

| task    | kind       | example                       | unseen in training     |
|---------|------------|-------------------------------|------------------------|
| `read`  | upstream   | image, `read c?` -> `7`       | the digit images       |
| `count` | upstream   | image, `count?` -> `3`        | the digit images       |
| `max`   | upstream   | image, `max?` -> `9`          | the digit images       |
| `even`  | upstream   | image, `even b?` -> `yes`     | the digit images       |
| `rev`   | upstream   | `rev abc?` -> `cba`           | 1/7 of the strings     |
| `add`   | upstream   | `37+8?` -> `45`               | 1/7 of the pairs       |
| `fact`  | upstream   | `fact gub?` -> `mip`          | nothing: it is memory  |
| `docs`  | upstream   | 16 characters of English      | 1/10 of the paragraphs |
| `style` | downstream | pale image, `class?` -> `kva` | the digit images       |
| `desc`  | downstream | image, `describe?` -> `a3 c7` | the digit images       |
| `name`  | downstream | image, `name c?` -> `kva`     | the digit images       |

Every example is a function of task, split, seed and position. Only `docs` also depends, a little,
on the Python version: see `prose`.
"""

import random
import statistics
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from prose import draw_window
from scenes import draw_any_scene, draw_scene
from splits import Split, split_of
from transformers import LlavaProcessor

CLASS_WORDS = ("zed", "uno", "dva", "tri", "kva", "pin", "ses", "hep", "oko", "nav")


@dataclass(frozen=True)
class Example:
    """One question and its answer.

    Attributes:
        prompt: text before the answer; may be empty.
        answer: text to be produced.
        image: 16x16 grey image shown before the prompt, or None.
        open_ended: the answer is a slice of running text. No EOS follows it, and it is scored
            character by character instead of as a whole.
    """

    prompt: str
    answer: str
    image: Image.Image | None = None
    open_ended: bool = False


@dataclass(frozen=True)
class Task:
    """A named, endless and reproducible source of examples."""

    name: str
    draw: Callable[[np.random.Generator, Split], Example]

    def sample(self, count: int, seed: int, split: Split) -> list[Example]:
        """Draw `count` independent examples; equal arguments give equal examples."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode()), int(split == "test")])
        return [self.draw(rng, split) for _ in range(count)]


# The tasks


def _read(rng: np.random.Generator, split: Split) -> Example:
    image, layout = draw_any_scene(rng, split)
    place = str(rng.choice(list(layout)))
    return Example(f"read {place}?", str(layout[place]), image)


def _count(rng: np.random.Generator, split: Split) -> Example:
    image, layout = draw_any_scene(rng, split)
    return Example("count?", str(len(layout)), image)


def _max(rng: np.random.Generator, split: Split) -> Example:
    image, layout = draw_any_scene(rng, split)
    return Example("max?", str(max(layout.values())), image)


def _even(rng: np.random.Generator, split: Split) -> Example:
    image, layout = draw_any_scene(rng, split)
    place = str(rng.choice(list(layout)))
    return Example(f"even {place}?", "no" if layout[place] % 2 else "yes", image)


def _style(rng: np.random.Generator, split: Split) -> Example:
    image, layout = draw_scene(rng, split, digits=1, contrast=0.5)
    (digit,) = layout.values()
    return Example("class?", CLASS_WORDS[digit], image)


def _desc(rng: np.random.Generator, split: Split) -> Example:
    image, layout = draw_scene(rng, split, digits=int(rng.integers(1, 4)))
    answer = " ".join(f"{place}{digit}" for place, digit in layout.items())
    return Example("describe?", answer, image)


def _name(rng: np.random.Generator, split: Split) -> Example:
    image, layout = draw_any_scene(rng, split)
    place = str(rng.choice(list(layout)))
    return Example(f"name {place}?", CLASS_WORDS[layout[place]], image)


def _rev(rng: np.random.Generator, split: Split) -> Example:
    while True:
        letters = "".join(rng.choice(list("abcdefghijklmnop"), rng.integers(2, 4)))
        if split_of(letters, one_in=7) == split:
            return Example(f"rev {letters}?", letters[::-1])


def _add(rng: np.random.Generator, split: Split) -> Example:
    while True:
        left, right = rng.integers(40), rng.integers(10)
        if split_of(f"{left}+{right}", one_in=7) == split:
            return Example(f"{left}+{right}?", str(left + right))


@cache
def _facts() -> list[tuple[str, str]]:
    """64 invented words, each with another invented word to remember."""
    words = [a + b + c for a in "bdgkmp" for b in "aiou" for c in "bfglnpt"]
    chosen = random.Random(0).sample(words, 128)
    return list(zip(chosen[:64], chosen[64:], strict=True))


def _fact(rng: np.random.Generator, split: Split) -> Example:
    word, meaning = _facts()[rng.integers(64)]
    return Example(f"fact {word}?", meaning)


def _docs(rng: np.random.Generator, split: Split) -> Example:
    return Example("", draw_window(rng, split), open_ended=True)


def _by_name(*draws: Callable[[np.random.Generator, Split], Example]) -> dict[str, Task]:
    names = [draw.__name__.removeprefix("_") for draw in draws]
    return {name: Task(name, draw) for name, draw in zip(names, draws, strict=True)}


UPSTREAM = _by_name(_read, _count, _max, _even, _rev, _add, _fact, _docs)
DOWNSTREAM = _by_name(_style, _desc, _name)


# From examples to tensors, and to TRL


def collate(examples: Sequence[Example], processor: LlavaProcessor) -> dict[str, torch.Tensor]:
    """Make a batch: `<s>`, four `<image>` if there is an image, prompt, answer, `</s>`, padding.

    Args:
        examples: with and without image in any order; `B` of them, `I` with an image.
        processor: the processor of the tiny LLaVA.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each int64 of shape `(B, T)` and padded on the
        right, and `pixel_values`, float32 of shape `(I, 3, 16, 16)`, if any example has an image.
        Labels are -100 except on the answer and its EOS.
    """
    images = [example.image for example in examples if example.image is not None]
    batch = processor(
        text=[_full_text(example, processor) for example in examples],
        images=images or None,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    # One character is one token, so the length of the answer says where it starts.
    answers = torch.tensor([len(e.answer) + (not e.open_ended) for e in examples])
    ends = batch["attention_mask"].sum(dim=1)
    position = torch.arange(batch["input_ids"].shape[1])
    answered = (position >= (ends - answers)[:, None]) & (position < ends[:, None])
    return {**batch, "labels": batch["input_ids"].where(answered, -100)}


def _full_text(example: Example, processor: LlavaProcessor) -> str:
    """What the tokenizer reads; it adds the BOS itself."""
    image = "" if example.image is None else processor.image_token
    end = "" if example.open_ended else processor.tokenizer.eos_token
    return image + example.prompt + example.answer + end


def trl_records(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Write examples as conversational prompt-completion records for TRL's `SFTTrainer`.

    Through the processor's chat template they become the tokens and labels of `collate`.

    Raises:
        ValueError: an example is open-ended; the chat template closes every answer with EOS.
    """
    if any(example.open_ended for example in examples):
        raise ValueError("Open-ended examples (task 'docs') have no EOS, so no chat record.")
    return [
        {
            "prompt": [{"role": "user", "content": example.prompt}],
            "completion": [{"role": "assistant", "content": example.answer}],
            "images": [] if example.image is None else [example.image],
        }
        for example in examples
    ]


# Scores


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and each back to its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _hits(model: torch.nn.Module, batch: dict[str, torch.Tensor], examples: Sequence[Example]) -> list[float]:
    """Score one batch of `collate` under teacher forcing.

    Returns:
        Per example, 1 or 0 for the whole answer, or the fraction right if it is open-ended.
    """
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    answered = labels != -100
    right = (model(**batch).logits[:, :-1].argmax(dim=-1) == labels) & answered
    fraction = (right.sum(dim=1) / answered.sum(dim=1)).tolist()
    return [hit if example.open_ended else float(hit == 1) for hit, example in zip(fraction, examples, strict=True)]


@torch.no_grad()
def accuracy(
    model: torch.nn.Module,
    processor: LlavaProcessor,
    examples: Sequence[Example],
    batch_size: int = 200,
    make_batch: Callable[[Sequence[Example], LlavaProcessor], dict[str, torch.Tensor]] = collate,
) -> float:
    """Score answers under teacher forcing, which for exact match is the same as greedy decoding.

    Args:
        model: the tiny LLaVA, bare or wrapped by PEFT; any dtype, any device. Its training mode is
            left as found.
        processor: its processor.
        examples: what to ask.
        batch_size: examples per forward pass.
        make_batch: what makes a batch of examples, `collate` or another function that gives what it gives.

    Returns:
        Percent of examples whose answer and EOS are all right; open-ended examples count with the
        fraction of their characters that are right.
    """
    starts = range(0, len(examples), batch_size)
    with _evaluating(model):
        parts = [examples[start : start + batch_size] for start in starts]
        batches = [_hits(model, make_batch(part, processor), part) for part in parts]
    return 100 * statistics.fmean(hit for batch in batches for hit in batch)


def upstream_accuracy(model: torch.nn.Module, processor: LlavaProcessor, count: int = 200) -> dict[str, float]:
    """Score every upstream task on its first `count` test examples.

    Returns:
        Percent per task, and under `"mean"` the unweighted mean over tasks, which is A_up.
    """
    scores = {
        name: accuracy(model, processor, task.sample(count, seed=0, split="test")) for name, task in UPSTREAM.items()
    }
    return {**scores, "mean": statistics.fmean(scores.values())}
