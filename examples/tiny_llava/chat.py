"""The examples of `tasks` as batches for any image-text model with a chat template."""

from collections.abc import Sequence

import torch
from tasks import Example
from transformers import ProcessorMixin

Batch = dict[str, torch.Tensor]


def collate_chat(examples: Sequence[Example], processor: ProcessorMixin) -> Batch:
    """Make a batch through the processor's chat template; labels are -100 except on the answer and its EOS."""
    prompts = [_prompt(example, processor) for example in examples]
    end = processor.tokenizer.eos_token
    full = [prompt + example.answer + end for prompt, example in zip(prompts, examples, strict=True)]
    images = [example.image for example in examples if example.image is not None]
    batch = _tokens(full, images, processor)
    shown = _tokens(prompts, images, processor)["attention_mask"].sum(1)
    length = batch["attention_mask"].sum(1)
    position = torch.arange(batch["input_ids"].shape[1])
    answered = (position >= shown[:, None]) & (position < length[:, None])
    return {**batch, "labels": batch["input_ids"].where(answered, -100)}


def _prompt(example: Example, processor: ProcessorMixin) -> str:
    image = [{"type": "image"}] if example.image is not None else []
    messages = [{"role": "user", "content": [*image, {"type": "text", "text": example.prompt}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _tokens(texts: list[str], images: list, processor: ProcessorMixin) -> Batch:
    return dict(
        processor(
            text=texts,
            images=images or None,
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
        )
    )
