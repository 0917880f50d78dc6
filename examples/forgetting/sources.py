"""Where a study gets its model, what the model could do before, and what it is to learn.

`tiny` takes the small LLaVA and its tasks, `hub` any image-text model and any data sets with questions and answers.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

TINY_LLAVA = Path(__file__).parent.parent / "tiny_llava"
sys.path.insert(0, str(TINY_LLAVA))
import tasks  # noqa: E402
from chat import Batch, collate_chat  # noqa: E402
from tasks import Example  # noqa: E402


@dataclass(frozen=True)
class Source:
    """A model, its old and its new tasks.

    Attributes:
        model: folder or Hub id of the base model.
        dtype: dtype of its weights, as text; "auto" takes it from the checkpoint.
        upstream: test examples by task that the base model can do.
        train: training examples of the new task, given a seed and a count.
        test: test examples of the new task.
        collate: makes a batch with labels of examples.
        batch_size: examples that are scored at a time.
    """

    model: str
    dtype: str
    upstream: dict[str, list[Example]]
    train: Callable[[int, int], list[Example]]
    test: list[Example]
    collate: Callable[[Sequence[Example], ProcessorMixin], Batch]
    batch_size: int

    def load(self) -> tuple[PreTrainedModel, ProcessorMixin]:
        """The base model, on a GPU where there is one, and its processor."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForImageTextToText.from_pretrained(self.model, dtype=self.dtype)
        return model.to(device), AutoProcessor.from_pretrained(self.model)


def tiny(model: str, task: str, examples: int) -> Source:
    """The small LLaVA, or another of its architecture, and one of its downstream tasks."""
    downstream = tasks.DOWNSTREAM[task]
    return Source(
        model=model,
        dtype="auto",
        upstream={name: known.sample(examples, seed=0, split="test") for name, known in tasks.UPSTREAM.items()},
        train=lambda seed, count: downstream.sample(count, seed=seed, split="train"),
        test=downstream.sample(examples, seed=0, split="test"),
        collate=tasks.collate,
        batch_size=200,
    )


def hub(
    model: str, upstream: Sequence[str], task: str, examples: int, columns: Sequence[str], dtype: str = "auto"
) -> Source:
    """Any image-text model with a chat template, and data sets from the Hub or from folders.

    Args:
        model: folder or Hub id.
        upstream: data sets that show what the model could do before; their test split is used.
        task: data set to learn; its training and its test split are used.
        examples: test examples of every data set, at most.
        columns: names of the columns with the image, the question and the answer.
        dtype: dtype of the weights.

    Raises:
        ValueError: a data set has no such split or column.
    """
    return Source(
        model=model,
        dtype=dtype,
        upstream={name: _examples(_split(name, "test"), columns)[:examples] for name in upstream},
        train=_drawing(_examples(_split(task, "train"), columns)),
        test=_examples(_split(task, "test"), columns)[:examples],
        collate=collate_chat,
        batch_size=16,
    )


def _split(name: str, wanted: str) -> Dataset:
    splits = load_dataset(name)
    found = next((split for split in (wanted, "validation") if split in splits), None)
    if found is None or (wanted == "train" and found != "train"):
        raise ValueError(f"Data set '{name}' has splits {sorted(splits)}, but no '{wanted}' split.")
    return splits[found]


def _examples(data: Dataset, columns: Sequence[str]) -> list[Example]:
    image, question, answer = columns
    for column in (question, answer):
        if column not in data.column_names:
            raise ValueError(f"There is no column '{column}' among {data.column_names}; name it with --columns.")
    return [Example(str(row[question]), _first(row[answer]), row.get(image)) for row in data]


def _first(answer: str | list[str]) -> str:
    """Data sets with several right answers list them; the first is taught and asked for."""
    return str(answer[0] if isinstance(answer, list) else answer)


def _drawing(examples: list[Example]) -> Callable[[int, int], list[Example]]:
    def draw(seed: int, count: int) -> list[Example]:
        order = random.Random(seed)
        rounds = -(-count // len(examples))
        return [one for _ in range(rounds) for one in order.sample(examples, len(examples))][:count]

    return draw
