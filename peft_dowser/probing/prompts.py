"""Prompts: the model writes its own from a few random tokens (Eq. 6), or a caller passes some."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.utils.logging import tqdm

from ..base.distributed import rank, shape_of
from ..base.storage import device_of
from ..delta.seeds import derived_seed, seed_generators
from .settings import ProbeSettings

logger = logging.getLogger(__name__)

# A text, its token ids, or the keyword arguments of a forward, for one sample.
Text: TypeAlias = str | Mapping[str, Tensor] | Tensor | Sequence[int]

# Inputs of one sample, with a batch dimension of 1: keyword arguments of the model's forward.
Prompt = dict[str, Tensor]

# Random tokens that start a prompt, at most.
_MAX_SEED_TOKENS = 5

# Errors of a model that cannot run on tokens alone, because it needs an image, sound, a language ...
_NOT_ON_TOKENS = (TypeError, ValueError, AttributeError, LookupError, NotImplementedError)

_WAY_OUT = (
    "Probe with your own inputs, probe(model, config, prompts=[...]), save the statistics and pass "
    "DowserConfig(statistics=path); or choose score='magnitude' or 'random', which need no probe."
)

# Prompts written together. A constant, because the prompts depend on it and must not depend on the free memory.
_GENERATION_BATCH = 64


class ModelKind(Enum):
    """How a model is probed: by what it reads, and where its output is."""

    DECODER = "decoder"
    ENCODER = "encoder"
    SEQ2SEQ = "seq2seq"
    OTHER = "other"


def model_kind(model: nn.Module) -> ModelKind:
    """Tell decoder-only, encoder-only and sequence-to-sequence models apart."""
    if not isinstance(model, PreTrainedModel):
        return ModelKind.OTHER
    if model.config.is_encoder_decoder:
        return ModelKind.SEQ2SEQ
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    return ModelKind.DECODER if causal or model.can_generate() else ModelKind.ENCODER


def synthetic_prompts(model: nn.Module, settings: ProbeSettings) -> list[Prompt]:
    """Write N prompts of T tokens each: random tokens for an encoder, the model's own sampling for the others.

    Each begins with BOS where the model has one; the random tokens that started it are dropped, and no special token
    occurs. They are on the device of the input embeddings. The model is in eval mode, and torch's global generators are
    used, which the caller restores.

    Raises:
        ValueError: the model has no vocabulary, cannot generate, or needs more than tokens, such as an image or sound.
    """
    model = _promptable(model)
    length = prompt_length(model, settings)
    if length < settings.probe_length:
        logger.warning(
            "%s cannot write %d tokens; prompts have %d.", type(model).__name__, settings.probe_length, length
        )
    try:
        tokens = _written_tokens(model, settings, length)
    except _NOT_ON_TOKENS as error:
        name = type(model).__name__
        raise ValueError(
            f"Cannot write prompts with {name}: it does not run on tokens alone ({error}). {_WAY_OUT}"
        ) from error
    prompts = [{"input_ids": row[None]} for row in tokens]
    if images := round(settings.probe_images * settings.num_probes):
        prefixes = _noise_images(model, images, settings.seed)
        prompts[:images] = [
            _after_image(prefix, prompt["input_ids"][:, len(_start(model)) :])
            for prefix, prompt in zip(prefixes, prompts, strict=False)
        ]
    if model_kind(model) is ModelKind.SEQ2SEQ:
        start = _decoder_start(model)
        for prompt in prompts:
            ids = prompt["input_ids"]
            prompt["decoder_input_ids"] = torch.cat([ids.new_full((1, 1), start), ids[:, :-1]], 1)
    return prompts


def given_prompts(model: nn.Module, prompts: Sequence[Text]) -> list[Prompt]:
    """Turn the prompts of a caller into inputs of the model; texts with the tokenizer next to its weights.

    Raises:
        ValueError: there are none, one is neither a text, a row of token ids nor a mapping, or there is no tokenizer.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list, got a single string; pass [text].")
    if not len(prompts):
        raise ValueError("prompts is empty: pass at least one prompt, or None for synthetic ones.")
    tokenizer = _tokenizer(model) if any(isinstance(prompt, str) for prompt in prompts) else None
    return [_as_prompt(prompt, number, tokenizer) for number, prompt in enumerate(prompts)]


def _tokenizer(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    folder = getattr(getattr(model, "config", None), "name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"prompts has texts, and the tokenizer of {type(model).__name__} is missing: '{folder}', where the "
            "model comes from, has none that loads. Pass token ids: prompts=[tokenizer(text)['input_ids'], ...]."
        ) from error


def _as_prompt(prompt: Text, number: int, tokenizer: Any) -> Prompt:
    if isinstance(prompt, Mapping):
        return dict(prompt)
    ids = torch.as_tensor(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt, device="cpu")
    if ids.dim() != 1 or ids.is_floating_point() or not ids.numel():
        raise ValueError(
            f"prompts[{number}] must be a text, a row of token ids or a mapping of model inputs, got {ids.dtype} of "
            f"shape {tuple(ids.shape)}."
        )
    return {"input_ids": ids.long()[None]}


def prompt_length(model: Any, settings: ProbeSettings) -> int:
    """T, or the length of the longest prompt that the model can write if it is shorter."""
    limit = longest_input(model.config)
    return settings.probe_length if limit is None else min(settings.probe_length, limit - _MAX_SEED_TOKENS)


def longest_input(config: Any) -> int | None:
    """How many tokens a model reads at most, by its config; None where it has no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return limit if limit > 0 else None  # XLNet says -1


def _promptable(model: nn.Module) -> PreTrainedModel:
    """The model, if it can write prompts."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not _vocabulary_size(model):
        raise ValueError(f"Cannot write prompts for {name}: it has no token vocabulary. {_WAY_OUT}")
    if model.main_input_name != "input_ids":
        raise ValueError(f"Cannot write prompts for {name}: it reads {model.main_input_name}, not tokens. {_WAY_OUT}")
    if model_kind(model) is not ModelKind.ENCODER and not model.can_generate():
        raise ValueError(
            f"Cannot write prompts with {name}: it has no language-model head, so it cannot generate. Probe the same "
            "base loaded with its head (AutoModelForCausalLM, AutoModelForSeq2SeqLM or AutoModelForImageTextToText), "
            "save the statistics and pass DowserConfig(statistics=path): its modules are found under the names that "
            f"they have here. Or: {_WAY_OUT[0].lower()}{_WAY_OUT[1:]}"
        )
    return model


def _vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens the model knows; 0 where it reads none."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # raised by transformers where it finds none
        return 0
    shape = shape_of(weight) if isinstance(weight, Tensor) else ()
    size = getattr(model.config.get_text_config(), "vocab_size", 0)
    return min(size, shape[0]) if len(shape) == 2 else 0  # others embed the patches of an image


def _special_tokens(config: Any) -> Iterator[int]:
    """Ids of the tokens that are not text, from every `..._token_id` of a config and its parts."""
    for key, value in config.to_dict().items():
        if key.endswith(("_token_id", "_token_index")):
            yield from (token for token in (value if isinstance(value, list | tuple) else [value]) if token is not None)
        part = vars(config).get(key)  # settings by layer, as in Gemma 4, raise on getattr
        if part is not config and hasattr(part, "to_dict"):
            yield from _special_tokens(part)


def special_ids(model: PreTrainedModel) -> list[int]:
    """Ids of the tokens of the vocabulary that are not text, increasing."""
    found = {token for config in _token_configs(model) for token in _special_tokens(config)}
    return sorted(token for token in found if 0 <= token < _vocabulary_size(model))


def _token_configs(model: PreTrainedModel) -> list[Any]:
    """The configs in which a model names its special tokens."""
    configs = [model.config.get_text_config(), model.config, getattr(model, "generation_config", None)]
    return [config for config in configs if config is not None]


def _token_id(model: PreTrainedModel, *names: str) -> int | None:
    """The first of the named special tokens that the model has and that lies in its vocabulary."""
    for name in names:
        for config in _token_configs(model):
            value = getattr(config, name, None)
            value = value[0] if isinstance(value, list | tuple) else value
            if value is not None and 0 <= value < _vocabulary_size(model):
                return value
    return None


def _decoder_start(model: PreTrainedModel) -> int:
    """The token that the decoder of a seq2seq model begins with."""
    return _token_id(model, "decoder_start_token_id", "bos_token_id", "pad_token_id") or 0


def _start(model: PreTrainedModel) -> list[int]:
    bos = _token_id(model, "bos_token_id")
    return [] if bos is None else [bos]


def _text_tokens(model: PreTrainedModel) -> Tensor:
    """All token ids that a prompt may contain."""
    allowed = torch.ones(_vocabulary_size(model), dtype=torch.bool, device="cpu")
    allowed[special_ids(model)] = False
    return allowed.nonzero().view(-1)


def _device(model: PreTrainedModel) -> torch.device:
    return device_of(model.get_input_embeddings())


def _written_tokens(model: PreTrainedModel, settings: ProbeSettings, length: int) -> Tensor:
    """The prompts, in rows."""
    if model_kind(model) is ModelKind.ENCODER:
        tokens = _random_tokens(model, settings, length)
        with torch.no_grad():
            model(input_ids=tokens[:1])  # raises where that is not enough
        return tokens
    chunks = range(0, settings.num_probes, _GENERATION_BATCH)
    new = len(chunks) * (length - len(_start(model)))
    with tqdm(total=new, desc="Writing prompts", unit="token", disable=rank() > 0) as bar:
        return torch.cat([_sampled_tokens(model, settings, length, first, bar) for first in chunks])


def _random_tokens(model: PreTrainedModel, settings: ProbeSettings, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "tokens"))
    text, start = _text_tokens(model), _start(model)
    shape = (settings.num_probes, length - len(start))
    tokens = text[torch.randint(len(text), shape, generator=generator, device="cpu")]
    begin = torch.tensor(start, dtype=tokens.dtype, device="cpu").expand(settings.num_probes, -1)
    return torch.cat([begin, tokens], 1).to(_device(model))


class _Advance(StoppingCriteria):
    """Moves a bar by every token that is written, and stops nothing."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _sampled_tokens(model: PreTrainedModel, settings: ProbeSettings, length: int, first: int, bar: Any) -> Tensor:
    """Prompts `first`, `first + 1`, ..., up to one generation batch."""
    count = min(_GENERATION_BATCH, settings.num_probes - first)
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "seed tokens", first))
    text, start = _text_tokens(model), _start(model)
    seeds = text[torch.randint(len(text), (count, _MAX_SEED_TOKENS), generator=generator, device="cpu")]
    seed_lengths = torch.randint(1, _MAX_SEED_TOKENS + 1, (count,), generator=generator, device="cpu")
    pad = _token_id(model, "pad_token_id", "eos_token_id") or 0
    width = len(start) + _MAX_SEED_TOKENS
    ids = torch.full((count, width), pad, device="cpu")
    mask = torch.zeros_like(ids)
    for row, (seed, seed_length) in enumerate(zip(seeds, seed_lengths.tolist(), strict=True)):
        beginning = torch.cat([torch.tensor(start, dtype=ids.dtype, device="cpu"), seed[:seed_length]])
        ids[row, width - len(beginning) :] = beginning
        mask[row, width - len(beginning) :] = 1
    new = length - len(start)
    seed_generators(derived_seed(settings.seed, "sampling", first))
    with torch.no_grad(), _without_defaults(model):
        generate: Any = model.generate
        written = generate(
            input_ids=ids.to(_device(model)),
            attention_mask=mask.to(_device(model)),
            generation_config=_sampling(model, new, pad),
            stopping_criteria=StoppingCriteriaList([_Advance(bar)]),
        )
    begin = torch.tensor(start, device=written.device, dtype=written.dtype).expand(count, -1)
    return torch.cat([begin, written[:, -new:]], 1)


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Keep `generate` from reading the model's own defaults, such as beam search or forced tokens."""
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        yield
    finally:
        model.generation_config = own


def _sampling(model: PreTrainedModel, new_tokens: int, pad: int) -> GenerationConfig:
    """Plain sampling as in the paper's code; special tokens cannot occur, so no prompt ends early."""
    return GenerationConfig(
        do_sample=True,
        temperature=0.9,
        top_p=0.9,
        top_k=0,
        repetition_penalty=1.05,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        suppress_tokens=special_ids(model) or None,
        pad_token_id=pad,
        bos_token_id=_token_id(model, "bos_token_id"),
        eos_token_id=_token_id(model, "eos_token_id"),
        decoder_start_token_id=_decoder_start(model) if model_kind(model) is ModelKind.SEQ2SEQ else None,
        use_cache=True,
    )


def _noise_images(model: PreTrainedModel, count: int, seed: int) -> list[Prompt]:
    """Noise images, as the inputs that the model's own processor makes of them."""
    from PIL import Image
    from transformers import AutoProcessor

    folder = model.config.name_or_path
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"probe_images needs the processor of {type(model).__name__}, and '{folder}' has none that can be loaded. "
            "Load the model from a folder or Hub id that has one, or pass probe(model, config, prompts=[...]) the "
            "processor's outputs."
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"probe_images needs an image-text model, '{folder}' has no image processor.")
    generator = torch.Generator().manual_seed(derived_seed(seed, "images"))
    height, width = _image_size(processor.image_processor)
    prefixes = []
    for _ in range(count):
        noise = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8, device="cpu")
        inputs = _processed(processor, Image.fromarray(noise.numpy()))
        prefixes.append({key: value.to(_device(model)) for key, value in inputs.items()})
    return prefixes


def _image_size(image_processor: Any) -> tuple[int, int]:
    size = getattr(image_processor, "crop_size", None) or image_processor.size
    side = size.get("shortest_edge") if hasattr(size, "get") else None
    height, width = (size.get("height"), size.get("width")) if hasattr(size, "get") else (size, size)
    if height and width:
        return height, width
    # Processors that keep the aspect ratio give their size as a number of pixels.
    side = min(side or 336, 336)
    return side, side


def _processed(processor: Any, image: Any) -> Prompt:
    if getattr(processor, "chat_template", None):
        message = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        inputs = processor.apply_chat_template(message, tokenize=True, return_dict=True, return_tensors="pt")
    else:
        text = getattr(processor, "boi_token", None) or processor.image_token
        inputs = processor(text=[text], images=[image], return_tensors="pt")
    return {key: value for key, value in inputs.items() if isinstance(value, Tensor)}


def _after_image(image: Prompt, ids: Tensor) -> Prompt:
    """A prompt of an image and a text after it: every token-wise input grows by the text."""
    shape = image["input_ids"].shape
    prompt = {}
    for key, value in image.items():
        if key == "input_ids":
            value = torch.cat([value, ids.to(value.device)], 1)
        elif value.shape == shape:
            filler = torch.full_like(ids, int(key == "attention_mask"), dtype=value.dtype)
            value = torch.cat([value, filler.to(value.device)], 1)
        prompt[key] = value
    return prompt
