"""The texts on which a model is compared with its base: given, or written by the base; their logits and the KL."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..base.distributed import broadcast, is_sharded_model, on_one_rank
from ..base.restoring import base_of
from ..config import DowserConfig
from ..probing.batches import collate
from ..probing.prompts import Prompt, Text, longest_input, special_ids
from ..probing.run import own_prompts
from ..probing.settings import ProbeSettings

# The label of a token that does not count, as everywhere in transformers.
IGNORED = -100


@dataclass(frozen=True)
class Texts:
    """Where a callback has its texts from.

    Attributes:
        given: the user's texts, or None for those that the base writes.
        settings: number, length, images and seed of the latter.
        max_length: where the former are cut, in tokens; those given as inputs of the model are not.
        callback: name of the callback, for messages.
    """

    given: Sequence[Text] | None
    settings: ProbeSettings
    max_length: int
    callback: str

    @classmethod
    def of(cls, given: Sequence[Text] | None, config: DowserConfig | None, max_length: int, callback: str) -> "Texts":
        """The arguments of a callback.

        Raises:
            ValueError: they make no sense.
        """
        if isinstance(given, str):
            raise ValueError("texts must be a list of texts, got a single string; pass [text].")
        if given is not None and not len(given):
            raise ValueError("texts is empty: pass at least one text, or None for texts that the base writes.")
        if given is not None and config is not None:
            raise ValueError("config is for the texts that the base writes, so it cannot go with texts; drop one.")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, or no token has a next one, got {max_length}.")
        return cls(given, ProbeSettings.of(config or DowserConfig()), max_length, callback)

    def prompts(self, model: Any, processing_class: Any) -> list[Prompt]:
        """The texts as inputs of one sample each, on the CPU; the same on every rank, which all must call this.

        Args:
            model: the base, or a `PeftModel` with its adapter disabled.
            processing_class: tokenizer or processor for strings.

        Raises:
            ValueError: the base cannot write texts, or those that were given do not fit the model.
        """
        if self.given is None:
            if isinstance(model, PeftModel) and is_sharded_model(model):
                raise ValueError(
                    f"{self.callback} cannot let the base inside a sharded PeftModel write prompts: only a forward of "
                    "the whole model gathers its weights. Pass texts=[...]."
                )
            write = partial(written_prompts, base_of(model), self.settings, self.callback)
            return broadcast(write()) if is_sharded_model(model) else on_one_rank(0, write)
        prompts = read_prompts(self.given, processing_class, self.max_length, self.callback)
        config = getattr(base_of(model), "config", None)
        for number, prompt in enumerate(prompts):
            _check_length(config, number, prompt, type(base_of(model)).__name__)
        return [_counting(config, {key: value.cpu() for key, value in prompt.items()}) for prompt in prompts]


def read_prompts(texts: Sequence[Text], processing_class: Any, max_length: int, callback: str) -> list[Prompt]:
    """Turn texts into inputs of the model: strings with the tokenizer or processor; they and rows of ids are cut.

    Raises:
        ValueError: there is no tokenizer for strings, for the `callback` that the message names, or a text has no next
            token.
    """
    tokenizer = _tokenizer(processing_class, callback) if any(isinstance(text, str) for text in texts) else None
    return [_prompt(text, number, tokenizer, max_length) for number, text in enumerate(texts)]


def _prompt(text: Text, number: int, tokenizer: Any, max_length: int) -> Prompt:
    if isinstance(text, Mapping):
        ids = text.get("input_ids", torch.empty(0, device="cpu"))
        prompt = dict(text)
    else:
        if isinstance(text, str):
            text = tokenizer(text, verbose=False)["input_ids"]
        ids = torch.as_tensor(text, device="cpu")[None]
        prompt = {"input_ids": ids.long()[:, :max_length]}
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ValueError(
            f"texts[{number}] must be a text, a row of token ids or a mapping of model inputs, with two tokens or more "
            f"of one sample, got input_ids of {ids.dtype} and shape {tuple(ids.shape)}."
        )
    return prompt


def _tokenizer(processing_class: Any, callback: str) -> Any:
    if processing_class is None:
        raise ValueError(
            f"{callback} cannot read its texts: they are strings, and the trainer has no processing_class. "
            "Pass processing_class=tokenizer to the trainer, or texts as token ids."
        )
    return getattr(processing_class, "tokenizer", processing_class)


def written_prompts(base: Any, settings: ProbeSettings, callback: str) -> list[Prompt]:
    """The model's own prompts; image placeholders and other special tokens in them do not count."""
    if not isinstance(base, PreTrainedModel) or not base.can_generate() or base.config.is_encoder_decoder:
        raise ValueError(
            f"{callback} has no texts, and {type(base).__name__} cannot write its own: it is not a causal language "
            "model of transformers. Pass texts=[...]."
        )
    prompts = own_prompts(base, settings)
    for prompt in prompts:
        ids = prompt["input_ids"]
        special = torch.tensor(special_ids(base), dtype=ids.dtype, device=ids.device)
        prompt["labels"] = ids.masked_fill(torch.isin(ids, special), IGNORED)
    return prompts


def _check_length(config: Any, number: int, prompt: Prompt, model: str) -> None:
    """Refuse a text that is longer than the model can read."""
    limit = None if config is None else longest_input(config)
    if limit is not None and limit < (length := prompt["input_ids"].shape[1]):
        raise ValueError(
            f"texts[{number}] has {length} tokens, but {model} reads {limit} at most (max_position_embeddings). Pass "
            f"max_length={limit}, or shorter texts."
        )


def _counting(config: Any, prompt: Prompt) -> Prompt:
    """A prompt in which the placeholders of an image, a video or a sound do not count, unless its labels say so."""
    if "labels" in prompt or prompt.keys() <= {"input_ids", "attention_mask"}:
        return prompt
    ids = prompt["input_ids"]
    names = (f"{kind}_token_{ending}" for kind in ("image", "video", "audio") for ending in ("id", "index"))
    found = [token for name in names if isinstance(token := getattr(config, name, None), int)]
    placeholders = torch.tensor(found, dtype=ids.dtype, device="cpu")
    return prompt | {"labels": ids.masked_fill(torch.isin(ids, placeholders), IGNORED)}


def prediction_batch(prompts: Sequence[Prompt], device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch for the prediction of next tokens.

    Returns:
        The model's inputs; the next token at every position, `(batch, tokens - 1)`; and which of them count: those
        that are not padding, and whose label is not -100.
    """
    inputs, mask = collate(prompts, device)
    targets = inputs.pop("labels", inputs["input_ids"])[:, 1:]
    counts = targets != IGNORED
    if mask is not None:
        inputs["attention_mask"] = mask.long()
        counts &= mask[:, 1:] > 0
    return inputs, targets, counts


def next_token_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of the next token after every token but the last, `(batch, tokens - 1, vocabulary)`.

    Raises:
        ValueError: the model does not predict next tokens.
    """
    options = {"use_cache": False} if "use_cache" in inspect.signature(base_of(model).forward).parameters else {}
    logits = getattr(model(**inputs, **options), "logits", None)
    tokens = inputs["input_ids"].shape
    if logits is None or logits.dim() != 3 or logits.shape[:2] != tokens:
        got = "none" if logits is None else str(tuple(logits.shape))
        raise ValueError(
            f"This needs a model that predicts the next token: {type(model).__name__} gives logits of "
            f"shape {got} for {tuple(tokens)} tokens. Load it with its language-model head."
        )
    return logits[:, :-1]


def divergence(base_scores: Tensor, scores: Tensor) -> Tensor:
    """Sum over the tokens of KL(base || model), in nats; both are logits, `(tokens, vocabulary)`."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    base, now = base_scores.log_softmax(-1, dtype=wide), scores.log_softmax(-1, dtype=wide)
    return F.kl_div(now, base, reduction="sum", log_target=True)
