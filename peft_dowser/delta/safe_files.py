"""Safe files: tensors that are checked before they are read, and folders that get all their files together."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .codec import DeltaFormatError
from .format import printable

# Where the files of an output folder are until all of them are complete.
_WORK = ".unfinished"

# Nothing loads a model or an adapter without these.
_LAST = ("config.json", "adapter_config.json")


def open_tensors(path: Path, files: ExitStack) -> Any:
    """Open a safetensors file, of which only the header is read; `files` closes it.

    Raises:
        DeltaFormatError: it is not a safetensors file, not of the length that its header says, or has tensors of a
            dtype that torch does not know.
    """
    try:
        file = files.enter_context(safe_open(path, framework="pt"))
        for key in {file.get_slice(key).get_dtype(): key for key in file.keys()}.values():
            file.get_tensor(key)  # memory of the file, which is not read
    except SafetensorError as error:
        raise DeltaFormatError(
            f"'{path}' ({path.stat().st_size} bytes) is not a readable safetensors file ({printable(str(error))}). It "
            "is incomplete or damaged; copy or download it again."
        ) from error
    return file


def write_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; raises OSError where it cannot be written, because SafetensorError is not one."""
    try:
        save_file(tensors, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(f"'{path}' cannot be written ({error}).") from error


def check_output(folder: Path) -> None:
    """Refuse, with a FileExistsError, to write into a folder that has files already."""
    if (folder / _WORK).exists():
        raise FileExistsError(
            f"'{folder}' has a folder '{_WORK}': another process is writing into it, or was killed while it did. If "
            "none is, delete the folder."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' is not an empty folder; choose another output, or empty it first.")


@contextmanager
def finished_together(folder: Path) -> Iterator[Path]:
    """A folder for the files of an output folder, which get their places when all of them are complete.

    The output folder is new or empty; meanwhile `check_output` refuses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_output(folder)
    work = folder / _WORK
    try:
        work.mkdir()  # succeeds in one of two processes
    except FileExistsError:
        check_output(folder)
        raise
    try:
        if [path.name for path in folder.iterdir()] != [_WORK]:
            work.rmdir()  # another process ended in between
            check_output(folder)
        yield work
        for path in sorted(work.iterdir(), key=lambda path: path.name in _LAST):
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
