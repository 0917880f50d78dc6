"""Batches of prompts: which prompts share a batch, their padding, and which tokens are real."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .prompts import Prompt


def alike(prompts: Sequence[Prompt], padding: bool) -> list[list[int]]:
    """Numbers of the prompts that can share a batch, in order; with `padding` also where their lengths differ."""
    groups: dict[tuple, list[int]] = {}
    for number, prompt in enumerate(prompts):
        signature = tuple(
            (key, None if padding and _is_token_wise(value, prompt) else tuple(value.shape[1:]))
            for key, value in sorted(prompt.items())
        )
        groups.setdefault(signature, []).append(number)
    return list(groups.values())


def collate(prompts: Sequence[Prompt], device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
    """Pad prompts that are `alike` on the right, and stack them on a device.

    Returns the model's inputs, and the mask of the real tokens, `(batch, tokens)`, float32; None where the inputs are
    not token ids.
    """
    inputs = {}
    for key, value in prompts[0].items():
        stack = _stacked if _is_token_wise(value, prompts[0]) else torch.cat
        inputs[key] = stack([prompt[key] for prompt in prompts]).to(device)
    if "input_ids" not in inputs:
        return inputs, None
    masks = [prompt.get("attention_mask", torch.ones_like(prompt["input_ids"])) for prompt in prompts]
    return inputs, _stacked(masks).to(device, torch.float32)


def decoder_tokens(prompts: Sequence[Prompt], mask: Tensor) -> Tensor:
    """The mask of the real tokens that the decoder of a seq2seq model reads.

    It is the mask of the encoder, from `collate`, where the prompts have no inputs for the decoder.

    Raises:
        ValueError: the two masks have one shape and differ, so a module does not show which of them it reads.
    """
    rows = []
    for prompt in prompts:
        ids = prompt.get("decoder_input_ids", prompt.get("labels"))
        if ids is None:
            return mask
        rows.append(prompt.get("decoder_attention_mask", torch.ones_like(ids)))
    found = _stacked(rows).to(mask.device, torch.float32)
    if found.shape == mask.shape and not torch.equal(found, mask):
        raise ValueError(
            "A prompt has as many tokens for the encoder as for the decoder, but different padding (attention_mask, "
            "decoder_attention_mask), so the probe cannot tell which of them a module reads. Leave the padding out: "
            "the probe pads by itself."
        )
    return found


def last_positions(mask: Tensor) -> Tensor:
    """Position of the last real token of every prompt, `(batch,)`, int64."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask * (positions + 1)).argmax(1)


def _is_token_wise(value: Tensor, prompt: Prompt) -> bool:
    """Whether an input has one entry per token and so grows with the padding."""
    return "input_ids" in prompt and value.shape == prompt["input_ids"].shape


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Rows `(1, tokens)` of several lengths below each other, padded with zeros on the right."""
    return pad_sequence([row for value in values for row in value], batch_first=True)
