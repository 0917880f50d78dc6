"""`export_lora`: an adapter that trains input channels, as a LoRA adapter with the same outputs."""

import logging
from contextlib import ExitStack
from pathlib import Path

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..delta.format import PREFIX, quoted
from ..delta.layout import StoredDelta
from ..delta.lora import lora_factors
from ..delta.safe_files import check_output, finished_together, write_tensors
from .adapter import open_adapter
from .checkpoint import copy_companions

logger = logging.getLogger(__name__)

# What servers of LoRA take without a word.
_USUAL_RANK = 64


def export_lora(adapter: str | Path, output: str | Path) -> dict[str, int]:
    """Write an adapter as a LoRA adapter, which every program that serves LoRA can load; the base is not needed.

    Nothing is approximated: A picks the trained input channels, B holds their values, and the scaling is 1. Servers
    expect one rank in all modules, so it is the largest number of channels, and factors of other modules are filled up
    with zeros.

    Args:
        adapter: folder or Hub id of a saved adapter with `granularity="input_channel"`.
        output: folder for the LoRA adapter, new or empty.

    Returns:
        Number of trained input channels by module.

    Raises:
        ValueError: the adapter trains single weights, which no LoRA adapter can hold, or is damaged
            (`DeltaFormatError`).
        OSError: there is no such adapter, or the output cannot be written.
    """
    folder = Path(output)
    check_output(folder)
    with ExitStack() as files:
        saved = open_adapter(str(adapter), files)
        config, layouts = saved.config, saved.layouts
        if single := [module for module, layout in layouts.items() if layout.channel_dim is None]:
            raise ValueError(
                f"Adapter '{saved.name}' trains single weights of module {quoted(single[0])}, which a LoRA adapter "
                "cannot hold exactly. Train with granularity='input_channel' to serve it as LoRA; or merge it "
                "(peft-dowser merge), or approximate it (peft.save_as_lora)."
            )
        counts = {module: layout.count(saved.counts[module]) for module, layout in layouts.items()}
        rank, tensors = max(counts.values()), {}
        if rank > _USUAL_RANK:
            logger.warning(
                "The LoRA adapter has rank %d in every module, as the largest needs it; servers take it where their "
                "limit allows (vLLM: --max-lora-rank). Train with channels=16 for a LoRA adapter of rank 16.",
                rank,
            )
        for module, layout in layouts.items():
            positions = saved.stored(module, layout).positions
            stored = StoredDelta(positions, saved.values(module))  # in the dtype of the file
            first, second = lora_factors(stored, layout.size, rank)
            tensors |= {f"{PREFIX}{module}.lora_A.weight": first, f"{PREFIX}{module}.lora_B.weight": second}
        # They are called the same in every adapter.
        tensors |= {key: saved.whole_tensor(name) for name, key in saved.whole_tensors.items()}
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(counts),
        fan_in_fan_out=any(layout.channel_dim == 0 for layout in layouts.values()),
        bias="lora_only" if config.bias == "dowser_only" else config.bias,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    with finished_together(folder) as work:
        write_tensors(tensors, work / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        lora.save_pretrained(str(work))
        copy_companions(str(adapter), work, of_adapter=True)
    return counts
