"""The untrained tiny LLaVA: its sizes, its alphabet and the stock classes it is made of."""

from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import BPE
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE = 16
PATCH_SIZE = 8
MAX_POSITIONS = 64

PAD, BOS, EOS, IMAGE, UNKNOWN = SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
ALPHABET = [character for character in map(chr, range(128)) if character.isprintable()]
VOCABULARY = {token: index for index, token in enumerate(SPECIAL_TOKENS + ALPHABET)}

# BOS, the user's image and text, the answer, EOS: the same tokens as `tasks.collate` makes.
# The generation marks let TRL's `assistant_only_loss` find the answer.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}{{ content }}{%- else -%}
        {%- for part in content -%}
            {{- '<image>' if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- render(message['content']) + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- render(message['content']) -}}
    {%- endif -%}
{%- endfor -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character. BOS is added by itself, EOS must be written."""
    tokenizer = Tokenizer(BPE(VOCABULARY, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, VOCABULARY[BOS])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="right",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """The stock LLaVA processor, with the image processor that needs no torchvision."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def build_model() -> LlavaForConditionalGeneration:
    """A randomly initialised LLaVA, from the global generator: call `set_seed` before."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    special = {
        "pad_token_id": VOCABULARY[PAD],
        "bos_token_id": VOCABULARY[BOS],
        "eos_token_id": VOCABULARY[EOS],
    }
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCABULARY[IMAGE],
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special)
    return model
