"""Prompts that models write by themselves: of every architecture, and what to do where one cannot."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from models import MAPPINGS, classes, config, seeded, small_model, tiny_llama
from peft import get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig

from peft_dowser import DowserConfig, DowserLayer, ProbeStatistics, probe
from peft_dowser.base.search import resolve_targets
from peft_dowser.delta.seeds import derived_seed
from peft_dowser.probing.prompts import special_ids, synthetic_prompts
from peft_dowser.probing.settings import ProbeSettings

SIZES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
START = {"pad_token_id": 90, "decoder_start_token_id": 90}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


# Models whose config forces tokens to be written, or names none to begin with.
FORCED = {
    "bart": (T.BartForConditionalGeneration, T.BartConfig, {}),
    "bart_decoder": (T.BartForCausalLM, T.BartConfig, {}),
    "mbart": (T.MBartForConditionalGeneration, T.MBartConfig, {}),
    "pegasus": (T.PegasusForConditionalGeneration, T.PegasusConfig, {}),
    "pegasus_x": (T.PegasusXForConditionalGeneration, T.PegasusXConfig, {}),
    "marian": (T.MarianMTModel, T.MarianConfig, START),
    "blenderbot": (T.BlenderbotForConditionalGeneration, T.BlenderbotConfig, {}),
    "blenderbot_small": (T.BlenderbotSmallForConditionalGeneration, T.BlenderbotSmallConfig, {}),
    "plbart": (T.PLBartForConditionalGeneration, T.PLBartConfig, {}),
    "fsmt": (T.FSMTForConditionalGeneration, T.FSMTConfig, {"src_vocab_size": 96, "tgt_vocab_size": 96}),
    "t5": (
        T.T5ForConditionalGeneration,
        lambda **sizes: T.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=96),
        {},
    ),
}


@pytest.mark.parametrize("family", FORCED)
def test_tokens_that_a_config_forces_are_not_written(family: str) -> None:
    """And the probe of what is written is that of plain autograd."""
    cls, config_class, more = FORCED[family]
    model = seeded(lambda: cls(config_class(**SIZES | more)))
    before = model.generation_config
    name = next(name for name, module in reversed(list(model.named_modules())) if name.endswith(("fc2", "wo")))
    given = config(num_probes=2, target_modules=[name])
    found = probe(model, given)
    assert model.generation_config is before
    for number, prompt in enumerate(synthetic_prompts(model, ProbeSettings.of(given))):
        assert prompt["input_ids"].shape == (1, 12)
        assert not set(special_ids(model)) & set(prompt["input_ids"][0, 1:].tolist())
        expected = sensitivity(model, name, prompt, number)
        torch.testing.assert_close(found.modules[name].sensitivity[number], expected, rtol=1e-4, atol=1e-9)


def sensitivity(model: nn.Module, name: str, prompt: dict[str, Tensor], number: int) -> Tensor:
    """Mean over Rademacher vectors and tokens of |d(xi^T f)/dz|, f the logits at the last token."""
    outputs = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(**prompt).logits[0, -1]
    hook.remove()
    generator = torch.Generator().manual_seed(derived_seed(0, "rademacher", number))
    signs = [2.0 * torch.randint(2, logits.shape, generator=generator, dtype=torch.int8) - 1 for _ in range(2)]
    grads = [torch.autograd.grad((logits * xi).sum(), outputs[0], retain_graph=True)[0] for xi in signs]
    return torch.stack(grads).abs().flatten(0, -2).mean(0)


SOUND = {
    "conv_dim": (16,),
    "conv_stride": (4,),
    "conv_kernel": (8,),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
TOWERS = {"text_config": TEXT, "vision_config": VISION}
OPT = {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, **TEXT}
BLIP = {"vision_config": VISION, "qformer_config": TEXT | {"encoder_hidden_size": 32}, "text_config": OPT}
NO_TEXT = {
    "whisper": (
        lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**SIZES, num_mel_bins=8, **START)),
        "it reads input_features, not tokens",
    ),
    "wav2vec2": (lambda: T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**TEXT, **SOUND)), "it has no token vocabulary"),
    "clip": (lambda: T.CLIPModel(T.CLIPConfig(**TOWERS)), "it has no token vocabulary"),
    "siglip": (lambda: T.SiglipModel(T.SiglipConfig(**TOWERS)), "it does not run on tokens alone"),
    "blip2": (
        lambda: T.Blip2ForConditionalGeneration(T.Blip2Config(**BLIP, num_query_tokens=2, image_token_id=5)),
        "it reads pixel_values, not tokens",
    ),
    "beit": (lambda: T.BeitForImageClassification(T.BeitConfig(**VISION)), "it has no token vocabulary"),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**VISION)), "it has no token vocabulary"),
    "vilt": (lambda: T.ViltModel(T.ViltConfig(**TEXT | VISION)), "it does not run on tokens alone"),
}


@pytest.mark.filterwarnings("ignore")  # transformers and PEFT on configs like these
@pytest.mark.parametrize("family", NO_TEXT)
def test_what_a_model_that_needs_more_than_tokens_answers(family: str) -> None:
    build, reason = NO_TEXT[family]
    message = rf"Cannot write prompts .*{reason}.*probe\(model, config, prompts=\[.*statistics=path.*score='magnitude'"
    with pytest.raises(ValueError, match=message):
        probe(seeded(build), config(target_modules="all-linear"))


# The same base in two classes: the one that is probed, and the one that is adapted.
LLAMA, T5 = T.LlamaConfig(**TEXT), T.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=96)
BERT = T.BertConfig(**TEXT)
LLAVA = T.LlavaConfig(vision_config=T.CLIPVisionConfig(**VISION), text_config=LLAMA, image_token_id=5)
SAME_BASE: dict[str, tuple[Any, Any, Any, str]] = {
    "base": (LLAMA, T.LlamaForCausalLM, T.LlamaModel, "layers.0.mlp.up_proj"),
    "question": (LLAMA, T.LlamaForCausalLM, T.LlamaForQuestionAnswering, "transformer.layers.0.mlp.up_proj"),
    "sequence": (LLAMA, T.LlamaForCausalLM, T.LlamaForSequenceClassification, "model.layers.0.mlp.up_proj"),
    "t5": (
        T5,
        T.T5ForConditionalGeneration,
        T.T5ForSequenceClassification,
        "transformer.decoder.block.0.layer.2.DenseReluDense.wo",
    ),
    "llava": (LLAVA, T.LlavaForConditionalGeneration, T.LlavaModel, "language_model.layers.0.mlp.up_proj"),
    "bert": (BERT, T.BertModel, T.BertForTokenClassification, "bert.encoder.layer.0.output.dense"),
    "bert_base": (BERT, T.BertForMaskedLM, T.BertModel, "encoder.layer.0.output.dense"),
}


@pytest.mark.parametrize("pair", SAME_BASE)
def test_the_statistics_of_one_class_serve_the_others_of_its_base(pair: str, tmp_path: Path) -> None:
    base_config, probed_class, class_, name = SAME_BASE[pair]
    probed, model = seeded(lambda: probed_class(base_config)), seeded(lambda: class_(base_config))
    shared = name.removeprefix(f"{model.base_model_prefix}.")
    matching = next(key for key, _ in probed.named_modules() if f".{key}".endswith(f".{shared}"))
    own = model.get_submodule(name.removesuffix(f".{shared}")) if name != shared else model
    source = probed.get_submodule(matching.removesuffix(shared).rstrip("."))
    own.load_state_dict(source.state_dict(), strict=False)
    path = str(tmp_path / "probe.safetensors")
    probe(probed, config()).save(path)
    few = {"task_type": None, "statistics": path}
    expected = get_peft_model(copy.deepcopy(probed), config(**few))
    adapted = get_peft_model(model, config(**few))
    layers = [
        next(m for m in each.modules() if isinstance(m, DowserLayer) and m.module_name == key)
        for each, key in ((expected, matching), (adapted, name))
    ]
    first, second = (layer.dowser_index["default"].positions for layer in layers)
    assert torch.equal(first, second)


def test_statistics_that_fit_to_several_parts_or_to_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    found = probe(tiny_llama(), config())
    twice = {f"{part}.{name}": copy.deepcopy(module) for part in ("a", "b") for name, module in found.modules.items()}
    ProbeStatistics(twice, found.info).save(path)
    with pytest.raises(ValueError, match=r"'layers\.0\.mlp\.down_proj' and others fit several .* 'a\.model\.', 'b\."):
        get_peft_model(tiny_llama(), config(statistics=str(path)))
    ProbeStatistics({"other.q_proj": next(iter(found.modules.values()))}, found.info).save(path)
    with pytest.raises(ValueError, match=r"have none of the 14 target modules, such as .*, but 'other\.q_proj'"):
        get_peft_model(tiny_llama(), config(statistics=str(path)))


def with_wide(model: nn.Module, kind: Callable[[str, nn.Parameter], bool]) -> nn.Module:
    for name, parameter in model.named_parameters():
        if kind(name, parameter):
            parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("score", ["dowser", "gradient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", ["norm", "lm_head", "q_proj"])
def test_a_half_base_with_wider_parts_is_probed_under_autocast(wide: str, dtype: torch.dtype, score: str) -> None:
    model = with_wide(tiny_llama(dtype), lambda name, parameter: wide in name)
    prompts, name = [torch.tensor([1, 5, 9, 13])], "model.layers.1.mlp.down_proj"
    assert len(probe(model, config(score=score)).modules) == 14
    found = probe(model, config(score=score), prompts=prompts).modules[name]
    assert torch.is_autocast_enabled("cpu") is False
    with torch.autocast("cpu", dtype):
        outputs: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: outputs.append(output))
        logits = model(input_ids=prompts[0][None]).logits[0, -1]
        hook.remove()
    generator = torch.Generator().manual_seed(derived_seed(0, "rademacher", 0))
    signs = [2.0 * torch.randint(2, logits.shape, generator=generator, dtype=torch.int8) - 1 for _ in range(2)]
    grads = [torch.autograd.grad(logits, outputs[0], xi.to(logits.dtype), retain_graph=True)[0] for xi in signs]
    torch.testing.assert_close(
        found.sensitivity[0], torch.stack(grads).float().abs().mean((0, 1, 2)), rtol=0.02, atol=0
    )
    assert (found.gradient is None) == (score == "dowser")


def test_what_a_class_keeps_in_float32_itself_needs_no_autocast() -> None:
    def t5() -> nn.Module:
        return with_wide(seeded(lambda: T.T5ForConditionalGeneration(T5)).half(), lambda name, _: ".wo." in name)

    seen = []
    model = t5()
    model.encoder.block[0].register_forward_hook(lambda *args: seen.append(torch.is_autocast_enabled("cpu")))
    probe(model, config())
    assert seen and not any(seen)


TINY_LLAVA = Path(__file__).parents[2] / "examples" / "tiny_llava"


def test_a_bar_shows_how_prompts_are_written_and_changes_none(capfd: pytest.CaptureFixture[str]) -> None:
    settings = ProbeSettings.of(DowserConfig(num_probes=70, probe_length=8))
    written = []
    for show in (T.logging.enable_progress_bar, T.logging.disable_progress_bar):
        show()
        torch.manual_seed(0)
        written.append(torch.cat([prompt["input_ids"] for prompt in synthetic_prompts(tiny_llama(), settings)]))
        shown = capfd.readouterr().err
        assert ("Writing prompts: 100%" in shown) == (show is T.logging.enable_progress_bar)
    T.logging.enable_progress_bar()
    assert torch.equal(*written)


def test_texts_are_read_by_the_tokenizer_beside_the_model() -> None:
    model = T.AutoModelForImageTextToText.from_pretrained(TINY_LLAVA).eval()
    tokenizer = T.AutoTokenizer.from_pretrained(TINY_LLAVA)
    texts = ["rev ab?", "ba cd ef"]
    found = probe(model, config(), prompts=[texts[0], tokenizer(texts[1])["input_ids"]])
    expected = probe(model, config(), prompts=[torch.tensor(tokenizer(text)["input_ids"]) for text in texts])
    for name, module in expected.modules.items():
        assert torch.equal(found.modules[name].sensitivity, module.sensitivity)
        assert torch.equal(found.modules[name].activity, module.activity)


@pytest.mark.parametrize("saved", [False, True])
def test_texts_without_a_tokenizer_are_refused(saved: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    if saved:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer of LlamaForCausalLM is missing: '.*prompts=\[tokenizer\(text"):
        probe(model, config(), prompts=["a text"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_architecture_that_generates_text_is_probed(mapping: str) -> None:
    """An architecture whose own `generate` runs on tokens is probed, and the others say what to do."""
    wrong, probed = {}, 0
    for name, model_type in classes(mapping).items():
        try:
            model = small_model(name, model_type)
        except Exception:
            continue  # these sizes are none for it, or a library is missing
        given = config(num_probes=2, num_rademacher=1, ensure_weight_tying=True)
        try:
            generated = generates(model)
            resolve_targets(model, given)
        except (RuntimeError, ValueError, ImportError):
            continue  # neither are these, or it has no targets by default
        try:
            found = probe(model, given).modules
            if not any(module.sensitivity.any() and module.sensitivity.isfinite().all() for module in found.values()):
                wrong[name] = "no sensitivity"
            probed += 1
        except Exception as error:
            if generated or not str(error).startswith("Cannot write prompts"):
                wrong[name] = repr(error)
    assert not wrong
    assert probed > {"causal": 130, "seq2seq": 20, "image": 50, "speech": 0}[mapping]


def generates(model: Any) -> bool:
    """Whether transformers alone runs it on tokens, and lets it write on from some with padding."""
    if not model.can_generate():
        return False
    ids = torch.tensor([[10, 11, 12], [13, 14, 15]])
    plain = GenerationConfig(max_new_tokens=8, min_new_tokens=8, decoder_start_token_id=0, pad_token_id=0)
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=plain).shape[0] == 2
    except (RuntimeError, ImportError):
        raise
    except Exception:
        return False
    finally:
        model.generation_config = own
