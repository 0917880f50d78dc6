"""Dowser as a plugin of axolotl: `adapter: dowser`, and under `dowser:` the fields of `DowserConfig`."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, model_validator

from peft_dowser import DowserConfig


class DowserArgs(BaseModel):
    """What the plugin adds to axolotl's YAML file."""

    dowser: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_merge(cls, data: dict) -> dict:
        """axolotl's default way to merge looks for lora_A and lora_B, and would write the base as it is."""
        if data.get("adapter") == "dowser" and data.get("merge_lora") and data.get("merge_method") != "legacy":
            raise ValueError("Set `merge_method: legacy` to merge a Dowser adapter, or run `peft-dowser merge`.")
        return data


class DowserPlugin(BasePlugin):
    """Make a Dowser adapter, or load the one in `lora_model_dir`."""

    def get_input_args(self) -> str:
        return f"{__name__}.DowserArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="dowser")]

    def load_adapter(self, model, cfg, inference: bool = False, config_only: bool = False):
        """The adapted model and its config, or None where the adapter is not Dowser.

        Where only the config is asked for, the trainer (DPO, KTO) adds the adapter itself.
        """
        if cfg.adapter != "dowser":
            return None
        config = DowserConfig(**{"task_type": "CAUSAL_LM"} | (cfg.dowser or {}))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return model, model.peft_config["default"]
        return get_peft_model(model, config), config
