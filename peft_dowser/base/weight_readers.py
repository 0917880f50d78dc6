"""Modules that read the weights of their linears without a call: a delta on such a linear has no effect until a merge.

The list has only classes that read a weight in training, where a delta on it would get no gradient. Other such classes
are noticed in training, see `tuner.messages.report_untrained`.
"""

from torch import nn

from .compiled import uncompiled

# By name of the class: the linears that it reads. Subclasses read the same.
READERS: dict[str, tuple[str, ...]] = {
    # torch, which has a faster path in eval mode
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),
    # state space models, whose kernels on a GPU take the weights
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    # attention and convolution written as functions
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "TDNNLayer": ("kernel",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    # biases by position, routers and heads
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LongcatFlashTopkRouter": ("classifier",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
}


def reader_of(model: nn.Module, name: str) -> str | None:
    """The class that reads the weight of a module without calling the module; None where none is known."""
    path, _, child = name.rpartition(".")
    kinds = [kind.__name__ for kind in type(uncompiled(model.get_submodule(path))).__mro__]
    return next((kind for kind in kinds if child in READERS.get(kind, ())), None)
