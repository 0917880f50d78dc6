"""Upstream texts, and how well a model still predicts them."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .batches import alike, collate
from .config import DowserConfig
from .modes import in_eval_mode
from .probe import left_as_it_was
from .prompts import Prompt, Text, special_ids, synthetic_prompts
from .seeds import generators_restored

# The label of a token that does not count, as everywhere in transformers.
IGNORED = -100


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes and torch's generators are restored."""
    with generators_restored(), torch.no_grad(), in_eval_mode(model):
        yield


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base of a `PeftModel`; PEFT itself would leave every active adapter trainable."""
    if not isinstance(model, PeftModel):
        yield
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def base_of(model: Any) -> Any:
    """The model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def read_prompts(texts: Sequence[Text], processing_class: Any, max_length: int) -> list[Prompt]:
    """Turn texts into inputs of the model.

    Args:
        texts: strings, rows of token ids, or keyword arguments of the model's forward for one sample.
        processing_class: tokenizer or processor for the strings.
        max_length: where strings and rows are cut.

    Raises:
        ValueError: there is no tokenizer for strings, or a text has no next token.
    """
    return [_prompt(text, number, processing_class, max_length) for number, text in enumerate(texts)]


def _prompt(text: Text, number: int, processing_class: Any, max_length: int) -> Prompt:
    if isinstance(text, Mapping):
        ids = text.get("input_ids", torch.empty(0, device="cpu"))
        prompt = dict(text)
    else:
        if isinstance(text, str):
            text = _tokenizer(processing_class)(text, verbose=False)["input_ids"]
        ids = torch.as_tensor(text, device="cpu")[None]
        prompt = {"input_ids": ids.long()[:, :max_length]}
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ValueError(
            f"texts[{number}] must be a text, a row of token ids or a mapping of model inputs, with two tokens or more "
            f"of one sample, got input_ids of {ids.dtype} and shape {tuple(ids.shape)}."
        )
    return prompt


def _tokenizer(processing_class: Any) -> Any:
    if processing_class is None:
        raise ValueError(
            "ForgettingCallback cannot read its texts: they are strings, and the trainer has no processing_class. "
            "Pass processing_class=tokenizer to the trainer, or texts as token ids."
        )
    return getattr(processing_class, "tokenizer", processing_class)


def written_prompts(base: Any, config: DowserConfig) -> list[Prompt]:
    """The model's own prompts; image placeholders and other special tokens in them do not count."""
    if not isinstance(base, PreTrainedModel) or not base.can_generate() or base.config.is_encoder_decoder:
        raise ValueError(
            f"ForgettingCallback has no texts, and {type(base).__name__} cannot write its own: it is no causal "
            "language model of transformers. Pass texts=[...]."
        )
    with left_as_it_was(base):
        prompts = synthetic_prompts(base, config)
    for prompt in prompts:
        ids = prompt["input_ids"]
        special = torch.tensor(special_ids(base), dtype=ids.dtype, device=ids.device)
        prompt["labels"] = ids.masked_fill(torch.isin(ids, special), IGNORED)
    return prompts


def loss_on(model: Any, prompts: Sequence[Prompt], batch_size: int, with_kl: bool) -> tuple[float, float]:
    """Mean next-token cross-entropy per token, and mean KL(base || model) per token, 0 where not asked for.

    Args:
        model: the model, in eval mode; a `PeftModel` for the divergence.
        prompts: inputs of one sample each; tokens that are padding, or whose label is -100, do not count.
        batch_size: prompts per forward pass.
        with_kl: run the base as well, its adapter disabled.

    Raises:
        ValueError: the model does not predict next tokens, or no token counts.
    """
    loss, divergence, tokens = 0.0, 0.0, 0
    for group in alike(prompts, padding=True):
        for first in range(0, len(group), batch_size):
            chosen = [prompts[number] for number in group[first : first + batch_size]]
            for scores, base_scores, targets in _scored(model, chosen, with_kl):
                loss += F.cross_entropy(scores, targets, reduction="sum").item()
                tokens += targets.numel()
                if base_scores is not None:
                    divergence += _divergence(base_scores, scores)
    if not tokens:
        raise ValueError("No token of the upstream texts counts: all labels are -100, or all tokens are special ones.")
    return loss / tokens, divergence / tokens


def _scored(model: Any, prompts: list[Prompt], with_base: bool) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Run a batch. For each prompt, at its tokens that count: float32 logits, those of the base, and the tokens."""
    inputs, mask = collate(prompts, next(model.parameters()).device)
    ids = inputs["input_ids"]
    targets = inputs.pop("labels", ids)[:, 1:]
    counts = targets != IGNORED
    if mask is not None:
        inputs["attention_mask"] = mask.long()
        counts &= mask[:, 1:] > 0
    logits = _logits(model, inputs)
    base_logits = None
    if with_base:
        with adapters_disabled(model):
            base_logits = _logits(model, inputs)
    for row, real in enumerate(counts):
        at = real.nonzero().view(-1)
        base_scores = None if base_logits is None else base_logits[row, at].float()
        yield logits[row, at].float(), base_scores, targets[row, at]


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    options = {"use_cache": False} if "use_cache" in inspect.signature(base_of(model).forward).parameters else {}
    logits = getattr(model(**inputs, **options), "logits", None)
    tokens = inputs["input_ids"].shape
    if logits is None or logits.dim() != 3 or logits.shape[:2] != tokens:
        got = "none" if logits is None else str(tuple(logits.shape))
        raise ValueError(
            f"ForgettingCallback needs a model that predicts the next token: {type(model).__name__} gives logits of "
            f"shape {got} for {tuple(tokens)} tokens. Load it with its language-model head."
        )
    return logits


def _divergence(base_scores: Tensor, scores: Tensor) -> float:
    """Sum over the tokens of KL(base || model)."""
    base, now = base_scores.log_softmax(-1), scores.log_softmax(-1)
    return F.kl_div(now, base, reduction="sum", log_target=True).item()
