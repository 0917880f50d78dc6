"""What an adapter keeps for one target: its values and their positions, and how a saved file fills them in."""

import logging
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._transformers import is_fsdp_enabled
from ..delta.apply import Overwritten
from ..delta.codec import DeltaFormatError, check_values, decode
from ..delta.format import read_positions
from ..delta.layout import Layout

logger = logging.getLogger(__name__)

_NOT_LOADED = (
    "its config comes from a saved adapter (it has an nnz_pattern), but no file was loaded, or the file lacks this "
    "module. Load the adapter with from_pretrained or load_adapter, or make a new DowserConfig."
)


class Values(nn.Module):
    """The trained values of one adapter.

    Attributes:
        weight: the values, shape `(nnz,)`, or `(out, k)` for k input channels; float32 unless the user says otherwise.
        awaited: whether this is a placeholder into which no file was loaded yet.
        narrow_is_known: whether the user was already told that the values train in less than float32.
    """

    weight: nn.Parameter

    def __init__(self, values: Tensor, awaited: bool = False) -> None:
        super().__init__()
        self.narrow_is_known = False
        self.awaited = False
        self.weight = nn.Parameter(values)
        self.awaited = awaited

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.awaited:  # how transformers loads a parameter
            if not value.is_meta:
                value = nn.Parameter(_owned(value), value.requires_grad)
                check_values(value, tuple(self.weight.shape))
            self.awaited = False
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        loaded = state_dict.get(prefix + "weight")
        if loaded is not None:
            self.awaited = False
            if not loaded.is_meta and self.weight.data_ptr() == loaded.data_ptr():
                self.weight.data = _owned(loaded)

    def replace(self, values: Tensor) -> None:
        """Take other values; the same parameter stays, and its memory where the number does."""
        self.awaited = False
        if values.shape == self.weight.shape:
            self.weight.data.copy_(values)
        else:
            self.weight.data = values.to(self.weight.device, self.weight.dtype, copy=True)
            self.weight.grad = None

    def loaded(self) -> nn.Parameter:
        """The values.

        Raises:
            DeltaFormatError: this is a placeholder, and no file was loaded into it, or one that does not fit.
        """
        if self.awaited:
            raise DeltaFormatError(f"This adapter has no values yet: {_NOT_LOADED}")
        return self.weight

    def report_narrow(self, adapter_name: str) -> None:
        """Say, once for an adapter, that something rounds its values while it trains."""
        weight = self.weight
        trains = weight.requires_grad and torch.is_grad_enabled()
        if trains and weight.element_size() < 4 and not self.narrow_is_known:
            _report_narrow(adapter_name, str(weight.dtype).removeprefix("torch."))


@cache
def _report_narrow(adapter_name: str, dtype: str) -> None:
    logger.warning(
        "Adapter '%s' computes with values in %s, by the mixed precision of FSDP2 or DeepSpeed, or by a cast: what "
        "trains is not what float32 values in a file merge to. Set mixed_precision to 'no' and load the base in %s, as "
        "in examples/accelerate, or save what ran with save_dtype='%s'.",
        adapter_name,
        dtype,
        dtype,
        dtype,
    )


class Index(nn.Module):
    """The positions of one adapter's values.

    Attributes:
        code: index code, uint8, saved with the model.
        positions: decoded from it, strictly increasing; None until a file fills in the code of a placeholder.
        layout: what the positions mean in the weight.
        count: how many positions there are.
        originals: the base weights that a merge has overwritten; None while unmerged.
        checksum: `delta.apply.checksum` of what that merge wrote; None while unmerged, or merged briefly.
        writes: how often code and positions had been written in place when they last agreed.
        digest: SHA-256 that the code from the file must have, where the manifest of the adapter gives it.
    """

    code: Tensor
    positions: Tensor | None
    originals: Tensor | None

    def __init__(
        self,
        code: Tensor,
        positions: Tensor | None,
        count: int,
        layout: Layout,
        code_digest: str | None = None,
    ) -> None:
        super().__init__()
        self.count = count
        self.layout = layout
        self.checksum: tuple[torch.dtype, int] | None = None
        self.writes = (0, 0)
        # Where accelerate spreads the weights that rank 0 alone has loaded, it takes everything in the state dict for a
        # parameter; `DowserModel` then adds the code to what is saved.
        self.register_buffer("code", code, persistent=not is_fsdp_enabled())
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("originals", None, persistent=False)
        self.digest = code_digest

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "code":
            super().__setattr__(name, value)
            return
        is_known = self._is_decoded(value)
        super().__setattr__(name, _owned(value))  # how transformers loads a buffer
        self._follow_code(is_known)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        code = state_dict.get(prefix + "code")
        is_known = code is not None and self._is_decoded(code)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if code is None:
            return  # a load of another adapter
        if "code" in self._non_persistent_buffers_set:
            self.code = code
        else:
            self._follow_code(is_known)

    def _is_decoded(self, code: Tensor) -> bool:
        """Whether the positions belong to this code, and nothing has written into them since."""
        own = self.code
        if self.positions is None or code.is_meta or own.is_meta or own.is_inference():
            return False
        return self.writes == self._count_writes() and code.dtype == own.dtype and torch.equal(code.to(own.device), own)

    def _follow_code(self, is_known: bool) -> None:
        """Decode the positions of the code, where they are not known."""
        if self.code.is_meta:
            self.positions = None
            return
        positions = self.positions if is_known else read_positions(self.code, self.layout, self.count, self.digest)
        self.positions = cast(Tensor, positions).to(self.code.device)
        self._note_agreement()

    def replace(self, code: Tensor, positions: Tensor) -> None:
        """Take other positions with their code; in the same memory where their number stays."""
        if self.positions is not None and positions.shape == self.positions.shape:
            self.code.copy_(code)
            self.positions.copy_(positions)
        else:
            device = code.device if self.code.is_meta else self.code.device
            self.count = positions.numel()
            self._buffers["code"] = _owned(code).to(device)
            self.positions = positions.to(device)
        self._note_agreement()

    def _note_agreement(self) -> None:
        """Note that code and positions agree, whatever file follows."""
        self.digest = None
        self.writes = self._count_writes()

    @property
    def nnz(self) -> int:
        """How many weights train."""
        return self.count * self.layout.group

    def decoded(self) -> Tensor:
        """The positions.

        Raises:
            DeltaFormatError: this is a placeholder, and no file was loaded into it, or one that does not fit.
            ValueError: something has written into them.
        """
        if self.positions is None:
            raise DeltaFormatError(f"This adapter has no positions yet: {_NOT_LOADED}")
        if not torch.compiler.is_compiling():
            self.check_agreement()
        return self.positions

    def set_overwritten(self, entries: Overwritten | None) -> None:
        """Keep what a merge of the adapter has overwritten, in a buffer that moves with the weight; None forgets it."""
        self.originals, self.checksum = (None, None) if entries is None else (entries.originals, entries.checksum)

    def overwritten(self) -> Overwritten:
        """What the merge of the adapter has overwritten."""
        return Overwritten(self.decoded(), cast(Tensor, self.originals), self.checksum, self.layout.channel_dim)

    def check_agreement(self) -> None:
        """Refuse a code and positions that something has written into, so that they no longer agree.

        Raises:
            ValueError: they do not agree.
        """
        writes = self._count_writes()
        if writes == self.writes or not any(writes):  # a copy on another device starts from zero
            return
        try:
            agree = self.positions is None or torch.equal(
                decode(self.code, self.layout.size, self.count), self.positions
            )
        except DeltaFormatError:
            agree = False
        if not agree:
            raise ValueError(
                "The positions of an adapter were written in place and are no longer those that it trains. Averages "
                "of models must leave buffers as they are (AveragedModel(..., use_buffers=False)), and a state must "
                "be loaded by load_state_dict(), not copied into the tensors of state_dict()."
            )
        self.writes = writes

    def _count_writes(self) -> tuple[int, int]:
        return _writes_into(self.code), _writes_into(self.positions)


def _owned(loaded: Tensor) -> Tensor:
    """A copy of what may be memory of a file: that changes with the file, and kills the process if the file is cut."""
    return loaded.detach().clone() if loaded.is_cpu else loaded.detach()


def _writes_into(tensor: Tensor | None) -> int:
    """The number of writes that torch has counted; it does not count for tensors of inference mode."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
