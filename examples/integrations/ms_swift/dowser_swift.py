"""Dowser as a tuner of ms-swift: `--external_plugins dowser_swift.py --tuner_type dowser`.

The fields of `DowserConfig` are given as JSON, `--model_kwargs '{"dowser": {"update_ratio": 0.1}}'`; what to adapt may
also be said with swift's own `--target_modules`, `--target_regex` and `--modules_to_save`.
"""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from peft_dowser import DowserConfig


class DowserTuner(PeftTuner):
    """Make a Dowser adapter; `PeftTuner` saves and loads it."""

    @staticmethod
    def prepare_model(args, model: torch.nn.Module) -> PeftModel:
        """Adapt `model` as the arguments of swift say."""
        settings = {"task_type": args.task_type.upper(), "modules_to_save": args.modules_to_save or None}
        if args.target_modules != ["all-linear"]:  # swift's default; Dowser's own leaves out vision towers and heads
            settings["target_modules"] = args.target_modules
        return get_peft_model(model, DowserConfig(**settings | args.model_kwargs.get("dowser", {})))


tuners_map["dowser"] = DowserTuner
