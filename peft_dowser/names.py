"""How a saved adapter calls its tensors, and how a message lists names."""

from collections.abc import Mapping

from torch import Tensor

# How a saved adapter calls the tensors of a module: its values and its index code.
PREFIX, VALUES, CODE = "base_model.model.", ".dowser_values.weight", ".dowser_index.code"


def named(part: str, adapter_name: str) -> str:
    """How the state dict of a model, which has several adapters, calls what a file calls `VALUES` or `CODE`."""
    stem, _, leaf = part.rpartition(".")
    return f"{stem}.{adapter_name}.{leaf}"


def is_delta(key: str) -> bool:
    """Whether a tensor is a part of a delta; the others are biases and modules that were trained as a whole."""
    return ".dowser_values." in key or ".dowser_index." in key


def base_name(key: str) -> str:
    """How the base model calls a tensor that is no part of a delta."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def counts_in(state_dict: Mapping[str, Tensor] | None) -> dict[str, int] | None:
    """Trained weights by module, read off the tensors of a saved adapter."""
    if state_dict is None:
        return None
    return {key.removesuffix(VALUES): value.numel() for key, value in state_dict.items() if key.endswith(VALUES)}


def quoted(name: object) -> str:
    """A name from a stranger's file in a message: its first letters, in quotes."""
    return f"'{printable(str(name)[:100])}'"


def printable(text: str) -> str:
    """A stranger's text with everything escaped that would move the cursor, begin a line or change what is shown."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def few(names: list[str]) -> str:
    """The first names of a list that may be long and come from a stranger's file."""
    shown = ", ".join(quoted(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
