"""What a model has learned and kept: losses text by text, divergence from the base, items answered right, and format.

The reference is what the base says: its own answers to ordinary questions, and its logits on them and on general texts.
It is made once, kept in a file, and every training asserts that the model it begins with is that base.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from known import Item, items, questions, texts
from lessons import Example, Lesson
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_dowser.base.restoring import base_of, measuring

LENGTH = 64  # tokens of a text
ANSWER = 24  # tokens of an answer of the base
GENERATED = 40  # tokens, at most, of an answer whose format is judged
JUDGED = 24  # answers whose format is judged
PIECES = 12  # of general texts of each kind, and
HELD_OUT = 24  # of the new task
ITEMS = 64  # of a batch
TOKENS = 1536  # of a batch, with padding
SYSTEM = {"role": "system", "content": "Answer in one short sentence."}


@dataclass(frozen=True)
class Row:
    """Token ids, of which those from `first` on are predicted."""

    ids: tuple[int, ...]
    first: int = 1

    @property
    def count(self) -> int:
        return len(self.ids) - self.first


@dataclass(frozen=True)
class Sizes:
    """How much is measured, so that a test or a quick study can take less."""

    answers: int = 120
    pieces: int = PIECES
    items: int = 10**6
    judged: int = JUDGED


@dataclass(frozen=True)
class Reference:
    """What the base says.

    Attributes:
        base: digest of its weights.
        rows: its own answers ("own"), and general texts by kind.
        logits: of the base at all positions that are predicted, row by row.
    """

    base: str
    rows: dict[str, list[Row]]
    logits: dict[str, list[Tensor]]


# Texts as tokens


def chat(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The tokens of a question, up to where the answer begins."""
    messages = [SYSTEM, {"role": "user", "content": question}]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(found, add_special_tokens=False)["input_ids"]


def row_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> Row:
    """An example to learn, or to measure."""
    ids = tokenizer(example.text, add_special_tokens=False)["input_ids"]
    if example.question is None:
        return Row(tuple(ids[:LENGTH]))
    question = chat(tokenizer, example.question)
    return Row((*question, *ids, tokenizer.eos_token_id), len(question))


def _general(tokenizer: PreTrainedTokenizerBase, count: int) -> dict[str, list[Row]]:
    """Pieces of the general texts, evenly taken."""
    found = {}
    for kind, parts in texts().items():
        ids = tokenizer("\n\n".join(parts), verbose=False)["input_ids"]
        pieces = [Row(tuple(ids[start : start + LENGTH])) for start in range(0, len(ids) - LENGTH, LENGTH)]
        found[kind] = pieces[:: max(1, len(pieces) // count)][:count]
    return found


# What a model says


def batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Rows in their order, as many at a time as `TOKENS` allows."""
    start = 0
    while start < len(rows):
        count = 1
        while (
            start + count < len(rows)
            and (count + 1) * max(len(row.ids) for row in rows[start : start + count + 1]) <= TOKENS
        ):
            count += 1
        yield rows[start : start + count]
        start += count


@torch.no_grad()
def predictions(model: Any, rows: Sequence[Row]) -> Iterator[tuple[Row, Tensor]]:
    """The rows with the logits at the positions that are predicted, `(count, vocabulary)`."""
    plain = base_of(model)
    for chosen in batches(rows):
        width = max(len(row.ids) for row in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.long, device=plain.device)
        real = torch.zeros_like(ids)
        for number, row in enumerate(chosen):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            real[number, : len(row.ids)] = 1
        hidden = plain.get_decoder()(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        wanted = torch.cat([hidden[number, row.first - 1 : len(row.ids) - 1] for number, row in enumerate(chosen)])
        found = plain.get_output_embeddings()(wanted)
        yield from zip(chosen, found.split([row.count for row in chosen]), strict=True)


def losses(model: Any, rows: Sequence[Row], base: Sequence[Tensor] | None = None) -> tuple[list[float], list[float]]:
    """Of every row the mean loss per token, and with logits of the base the mean KL(base || model), both in nats."""
    rises, divergences = [], []
    for number, (row, logits) in enumerate(predictions(model, rows)):
        now = logits.float().log_softmax(-1)
        targets = torch.tensor(row.ids[row.first :], device=now.device)
        rises.append(round(F.nll_loss(now, targets).item(), 5))
        if base is not None:
            before = base[number].to(now.device).float().log_softmax(-1)
            divergences.append(round(F.kl_div(now, before, reduction="sum", log_target=True).item() / row.count, 6))
    return rises, divergences


@torch.no_grad()
def choices(model: Any, asked: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Which items the model answers right, by kind: 1 where the right option has the highest likelihood, else 0.

    All options of an item stand in one row after its start. None sees another, and each is at the position that follows
    the start, so the likelihoods are those of rows of their own, for less than half of the tokens.
    """
    plain = base_of(model)
    found: dict[str, str] = {}
    for first in range(0, len(asked), ITEMS):
        group = asked[first : first + ITEMS]
        rows = [
            [_ids(tokenizer, item.start), *(_ids(tokenizer, " " + each) for each in item.options)] for item in group
        ]
        width = max(sum(map(len, row)) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.zeros_like(ids)
        sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1, 1)  # padding sees itself
        for number, (start, *options) in enumerate(rows):
            begin = len(start)
            ids[number, :begin], positions[number, :begin] = torch.tensor(start), torch.arange(begin)
            sees[number, 0, :begin, :begin] = torch.ones(begin, begin, dtype=torch.bool).tril()
            for option in options:
                end = begin + len(option)
                ids[number, begin:end] = torch.tensor(option)
                positions[number, begin:end] = torch.arange(len(start), len(start) + len(option))
                sees[number, 0, begin:end, : len(start)] = True
                sees[number, 0, begin:end, begin:end] = torch.ones(len(option), len(option), dtype=torch.bool).tril()
                begin = end
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": sees}
        inputs = {name: tensor.to(plain.device) for name, tensor in inputs.items()}
        hidden = plain.get_decoder()(**inputs, use_cache=False).last_hidden_state
        wanted = torch.cat([hidden[number, _before(row)] for number, row in enumerate(rows)])
        likely = plain.get_output_embeddings()(wanted).float().log_softmax(-1)
        targets = torch.tensor([token for _, *options in rows for option in options for token in option])
        scores = likely.cpu()[range(len(targets)), targets].split([len(o) for _, *options in rows for o in options])
        sums = iter([float(one.sum()) for one in scores])
        for item in group:
            of_item = [next(sums) for _ in item.options]
            found[item.kind] = found.get(item.kind, "") + str(int(of_item.index(max(of_item)) == item.right))
    return found


def _before(row: list[list[int]]) -> list[int]:
    """The position before every token of the options: the end of the start for the first token of each."""
    start, *options = row
    found, begin = [], len(start)
    for option in options:
        found += [len(start) - 1, *range(begin, begin + len(option) - 1)]
        begin += len(option)
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def answers(model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], length: int, **how: Any) -> list[Row]:
    """What the model answers, up to its end or so many tokens."""
    prompts = [chat(tokenizer, question) for question in asked]
    width = max(map(len, prompts))
    device, padding = base_of(model).device, tokenizer.pad_token_id
    ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    found = model.generate(input_ids=ids, attention_mask=real, max_new_tokens=length, pad_token_id=padding, **how)
    made = []
    for prompt, row in zip(prompts, found[:, width:].tolist(), strict=True):
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        made.append(Row((*prompt, *row[:end]), len(prompt)))
    return made


def _format(model: Any, tokenizer: PreTrainedTokenizerBase, lesson: Lesson, count: int) -> dict[str, float]:
    """Of greedy answers to ordinary questions, the share that ends and the share that looks like the new task."""
    asked = questions()[:: max(1, len(questions()) // count)][:count]
    found = answers(model, tokenizer, asked, GENERATED, do_sample=False)
    said = [tokenizer.decode(row.ids[row.first :]) for row in found]
    return {
        "ended": sum(row.ids[-1] == tokenizer.eos_token_id for row in found) / len(found),
        "odd": sum(lesson.shows(text) for text in said) / len(said),
    }


# The reference


def load(model: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, on a GPU where there is one, and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return loaded.to(device), AutoTokenizer.from_pretrained(model)


def digest(model: PreTrainedModel) -> str:
    """Of all weights."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def make_reference(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> None:
    """Let the base answer ordinary questions, and keep what it says about its answers and general texts."""
    with measuring(model):
        torch.manual_seed(0)
        own = answers(model, tokenizer, questions()[: sizes.answers], ANSWER, do_sample=True, temperature=0.7, top_k=0)
        rows = {"own": own, **_general(tokenizer, sizes.pieces)}
        tensors = {}
        for kind, texts_of_kind in rows.items():
            for number, (row, logits) in enumerate(predictions(model, texts_of_kind)):
                tensors[f"{kind}.{number}.ids"] = torch.tensor(row.ids)
                tensors[f"{kind}.{number}.logits"] = logits.contiguous().cpu()
    firsts = {
        f"{kind}.{number}": str(row.first) for kind, of_kind in rows.items() for number, row in enumerate(of_kind)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, {"base": digest(model), **firsts})
    part.rename(path)


def read_reference(path: Path) -> Reference:
    """What `make_reference` kept."""
    rows: dict[str, list[Row]] = {}
    logits: dict[str, list[Tensor]] = {}
    with safe_open(path, "pt") as file:
        known = file.metadata()
        base = known.pop("base")
        for name in sorted(known, key=lambda name: (name.split(".")[0], int(name.split(".")[1]))):
            kind = name.split(".")[0]
            rows.setdefault(kind, []).append(Row(tuple(file.get_tensor(f"{name}.ids").tolist()), int(known[name])))
            logits.setdefault(kind, []).append(file.get_tensor(f"{name}.logits"))
    return Reference(base, rows, logits)


def check_base(model: PreTrainedModel, reference: Reference) -> None:
    """Refuse a model that is not the base of the reference.

    Raises:
        RuntimeError: its weights are others.
    """
    if (found := digest(model)) != reference.base:
        raise RuntimeError(
            f"The reference was made by a base with the digest {reference.base[:12]}, but this training begins with "
            f"{found[:12]}: every KL would be measured from another model. Delete the reference, or use its base."
        )


def check_start(model: Any, reference: Reference) -> None:
    """Refuse an adapter that changes the base before it is trained.

    Raises:
        RuntimeError: the divergence from the base is not 0.
    """
    first = next(batches(reference.rows["own"]))  # the same batch as that of the reference, or roundings differ
    with measuring(model):
        _, found = losses(model, first, reference.logits["own"])
    if max(found) > 1e-5:
        raise RuntimeError(
            f"Before the first step KL(base || model) is {max(found):.2g} on the base's own answers, and should be 0: "
            "the reference is not the base that this adapter stands on."
        )


# Everything at once


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    lesson: Lesson,
    reference: Reference,
    sizes: Sizes,
    complete: bool,
) -> dict[str, Any]:
    """What the model has learned and kept.

    Args:
        model: the adapted model, or the base.
        tokenizer: its tokenizer.
        lesson: the new task.
        reference: what the base said.
        sizes: how much is measured.
        complete: also the items and the format.

    Returns:
        `new`: loss of every held-out text of the task; `loss` and `kl`: by kind the loss of every kept text, and its
        divergence from the base, in nats per token; if complete `choices`, see there, `ended` and `odd`.
    """
    with measuring(model):
        held_out = [row_of(example, tokenizer) for example in lesson.held_out(HELD_OUT)]
        found: dict[str, Any] = {"new": losses(model, held_out)[0], "loss": {}, "kl": {}}
        for kind, rows in reference.rows.items():
            found["loss"][kind], found["kl"][kind] = losses(model, rows, reference.logits[kind])
        if complete:
            asked = items()
            found["choices"] = choices(model, asked[:: max(1, len(asked) // sizes.items)], tokenizer)
            found |= _format(model, tokenizer, lesson, sizes.judged)
        return found
