"""Dowser as a method of LLaMA-Factory's version 1: `peft_config: {name: dowser}`, with the fields of `DowserConfig`.

LLaMA-Factory has no option that imports a plugin, so this file starts its command line itself:

    python dowser_llama_factory.py sft train.yaml
"""

from __future__ import annotations

from llamafactory.v1.launcher import main
from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin, load_adapter
from peft import get_peft_model

from peft_dowser import DowserConfig


@PeftPlugin("dowser").register()
def get_dowser_model(model, config: dict, is_train: bool = False):
    """Make a Dowser adapter, or load (and, except to train it, merge) those in `adapter_name_or_path`."""
    settings = {"task_type": "CAUSAL_LM"} | config
    del settings["name"]
    folder = settings.pop("adapter_name_or_path", None)
    if folder:
        return load_adapter(model, folder, is_train)
    return get_peft_model(model, DowserConfig(**settings))


if __name__ == "__main__":
    main()
