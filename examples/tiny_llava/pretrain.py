"""Train the tiny LLaVA from scratch, save it, and print what it can do.

    python examples/tiny_llava/pretrain.py [--out FOLDER] [--steps 2000] [--seed 1]

Stage 0 teaches the vision tower to name the digit in each quadrant. Stage 1 trains everything on a
mixture of the upstream tasks. The downstream tasks are never trained on here. One CPU core needs a
few minutes. Equal seeds give equal weights, given the same Python, libraries and kind of CPU.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from architecture import SPECIAL_TOKENS, build_model, build_processor
from PIL import Image
from scenes import QUADRANTS, draw_any_scene
from tasks import DOWNSTREAM, UPSTREAM, Example, accuracy, collate, upstream_accuracy
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm, trange
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    set_seed,
)

BATCH_SIZE = 64

VISION_STEPS = 350
VISION_RATE = 3e-3
EMPTY = 10  # the class of a quadrant without digit

JOINT_RATE = 2e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1  # on matrices only
BETAS = (0.9, 0.98)
MAX_GRADIENT_NORM = 1.0
# Without some loss on prompts the model could answer but not write a prompt by itself, which is
# what data-free probing asks of it.
PROMPT_WEIGHT = 0.1
MIXTURE = {
    "read": 2.0,
    "add": 2.0,
    "max": 1.5,
    "even": 1.5,
    "rev": 1.5,
    "docs": 1.2,
    "fact": 0.8,
    "count": 0.7,
}


def train_vision(model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int) -> None:
    """Stage 0: train the vision tower through a throw-away classifier of its four patches."""
    tower = model.model.vision_tower
    head = torch.nn.Linear(tower.config.hidden_size, EMPTY + 1)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = AdamW(parameters, lr=VISION_RATE)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, VISION_STEPS)
    rng = np.random.default_rng(seed)
    for _ in trange(VISION_STEPS, desc="vision"):
        images, digits = draw_vision_batch(rng)
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        patches = tower(pixels).last_hidden_state[:, 1:]  # without the class token
        loss = cross_entropy(head(patches).flatten(0, 1), digits.flatten())
        descend(loss, parameters, optimizer, schedule)


def draw_vision_batch(rng: np.random.Generator) -> tuple[list[Image.Image], torch.Tensor]:
    """Draw training images, and the digit or `EMPTY` per quadrant, shape `(BATCH_SIZE, 4)`."""
    scenes = [draw_any_scene(rng, "train") for _ in range(BATCH_SIZE)]
    digits = [[layout.get(place, EMPTY) for place in QUADRANTS] for _, layout in scenes]
    return [image for image, _ in scenes], torch.tensor(digits)


def train_jointly(model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int, seed: int) -> None:
    """Stage 1: train all weights on the mixture of upstream tasks."""
    parameters = list(model.parameters())
    optimizer = AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=JOINT_RATE,
        betas=BETAS,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    batches = tqdm(draw_batches(steps, seed), total=steps, desc="joint")
    for examples in batches:
        loss = language_loss(model, collate(examples, processor))
        descend(loss, parameters, optimizer, schedule)
        batches.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def draw_batches(steps: int, seed: int) -> Iterator[Sequence[Example]]:
    """Draw `steps` shuffled batches in which tasks occur as often as `MIXTURE` says."""
    rng = np.random.default_rng(seed)
    names = list(MIXTURE)
    shares = np.array(list(MIXTURE.values())) / sum(MIXTURE.values())
    order = rng.choice(len(names), size=(steps, BATCH_SIZE), p=shares)
    sources = [
        iter(UPSTREAM[name].sample(int((order == index).sum()), seed, "train")) for index, name in enumerate(names)
    ]
    for row in order:
        yield [next(sources[index]) for index in row]


def language_loss(model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the next token, where answers weigh 1 and prompts `PROMPT_WEIGHT`."""
    answered = batch.pop("labels")[:, 1:] != -100
    targets = batch["input_ids"][:, 1:]
    prompted = (targets >= len(SPECIAL_TOKENS)) & ~answered
    weights = answered + PROMPT_WEIGHT * prompted
    logits = model(**batch).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (weights * losses).sum() / weights.sum()


def descend(
    loss: torch.Tensor,
    parameters: Iterable[torch.nn.Parameter],
    optimizer: AdamW,
    schedule: LambdaLR,
) -> None:
    """Take one clipped step of gradient descent."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def print_table(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Print accuracy in percent on 200 test examples of every task, as a Markdown table."""
    scores = upstream_accuracy(model, processor)
    a_up = scores.pop("mean")
    for name, task in DOWNSTREAM.items():
        scores[name] = accuracy(model, processor, task.sample(200, seed=0, split="test"))
    print("| task | kind | accuracy |\n|---|---|---|")
    for name, score in scores.items():
        kind = "upstream" if name in UPSTREAM else "downstream, not trained"
        print(f"| {name} | {kind} | {score:.1f} |")
    print(f"| **A_up** | mean of upstream | **{a_up:.1f}** |")


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=here, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=2000, help="steps of stage 1")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the order of sums, and so the weights, depend on it
    set_seed(arguments.seed)
    model, processor = build_model(), build_processor()
    train_vision(model, processor, arguments.seed)
    train_jointly(model, processor, arguments.steps, arguments.seed)
    model.save_pretrained(arguments.out)
    processor.save_pretrained(arguments.out)
    print_table(model, processor)


if __name__ == "__main__":
    main()
