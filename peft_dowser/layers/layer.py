"""`DowserLayer`: one adapted weight matrix, its sparse deltas, and their merge into the base."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .._peft import check_adapters_to_merge
from .._transformers import is_falcons
from ..base.storage import device_of, has_own_forward, offload_hook
from ..base.target import Target
from ..delta.apply import Delta, MergedEntries, Overwritten, add_delta_
from ..delta.codec import code_length, encode, position_dtype
from ..delta.layout import Granularity, StoredDelta
from ..delta.lora import lora_factors
from .channels import add_channels
from .linear_op import Weight, in_autocast, refuse_tangents, sparse_linear
from .state import Index, Values


class DowserLayer(BaseTunerLayer):
    """State of the Dowser adapters on one target.

    Attributes:
        target: the weight that the adapters change, as it was found.
        dowser_values: `Values` by adapter name.
        dowser_index: `Index` by adapter name.
        module_name: name of the target in the base model.
        base_sample: entries of the weight before any merge, see `delta.format.base_sample`; None of a quantized one.
        scaling: by adapter, the factor of its values, see `set_scale`.
        merged_adapters: those that are merged into the model, in order, also where they have no values in this layer.
        is_tied: whether other modules use the weight and the deltas too, see `tied.Tied`.
        merges_in_place: whether a merge writes a few entries of a weight that is there, and so costs next to nothing.
        vanished: by merged adapter, how many non-zero values the merge rounded away, of how many values.
        not_finite: by merged adapter, how many of the sums that the merge wrote are not finite.
    """

    adapter_layer_names = ("dowser_values",)
    other_param_names = ("dowser_index", "scaling")
    is_tied = False

    def __init__(self, target: Target, sample: str | None = None) -> None:
        """Begin without adapters; `sample` is the `base_sample` where it is known: an offloaded one is slow to read."""
        self.target = target
        self.module_name = target.name
        self.dowser_values = nn.ModuleDict()
        self.dowser_index = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.vanished: dict[str, tuple[int, int]] = {}
        self.not_finite: dict[str, int] = {}
        self.base_sample = target.base_sample() if sample is None else sample
        self.out_features, self.in_features = target.features

    @property
    def merges_in_place(self) -> bool:
        return offload_hook(self.get_base_layer()) is None

    def values(self, adapter_name: str) -> nn.Parameter:
        """The trained values of an adapter, shape `(nnz,)`, or `(out, k)` for k input channels."""
        return cast(Values, self.dowser_values[adapter_name]).weight

    def scaled_values(self, adapter_name: str) -> Tensor:
        """The values as they are added to the weight: times the adapter's scale. Refuses values of a placeholder."""
        own = cast(Values, self.dowser_values[adapter_name])
        values, scale = own.loaded(), self.scaling[adapter_name]
        # A product with input channels rounds their values to the dtype of the input, whatever their own.
        if self.index(adapter_name).layout.channel_dim is None and not torch.compiler.is_compiling():
            own.report_narrow(adapter_name)
        return values if scale == 1 else values * scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the delta of an adapter by a factor, in forward and merge alike; nothing where it has none.

        Args:
            adapter: its name.
            scale: any finite number: 1 is the adapter as it was trained, -1 the step away from it.

        Raises:
            ValueError: the number is not finite, or the adapter is merged.
        """
        if not math.isfinite(scale):
            raise ValueError(f"The scale of adapter '{adapter}' must be a finite number, got {scale}.")
        if adapter in self.merged_adapters:
            raise ValueError(
                f"Adapter '{adapter}' is merged into the base, so another scale would not change the model. Call "
                "unmerge_adapter() first."
            )
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def index(self, adapter_name: str) -> Index:
        """The positions of an adapter."""
        return cast(Index, self.dowser_index[adapter_name])

    def in_use(self) -> list[str]:
        """The adapters that change the next forward."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in dict.fromkeys(self.active_adapters) if name in self.dowser_values]

    def delta(self, adapter_name: str) -> Delta:
        """The delta of an adapter, times its scale; empty where it has no values here. Must not be written."""
        if adapter_name in self.dowser_values:
            return self.index(adapter_name).layout.delta(self.stored(adapter_name))
        empty = torch.empty(0, dtype=torch.float32, device=self._device)
        return Delta(empty.to(position_dtype(self.target.numel)), empty)

    def stored(self, adapter_name: str) -> StoredDelta:
        """Positions and scaled values of an adapter, as they are stored. Must not be written."""
        return StoredDelta(self.index(adapter_name).decoded(), self.scaled_values(adapter_name).detach())

    def add_positions(self, adapter_name: str, positions: Tensor, granularity: Granularity, init_weights: bool) -> None:
        """Add an adapter at chosen positions: flat ones in the stored weight, or numbers of input channels.

        It starts from a delta of zero, and without `init_weights` from random values of the size of the weights.
        """
        layout = self.target.layout(granularity)
        values = torch.zeros(layout.values_shape(positions.numel()), device=self._device, dtype=torch.float32)
        if not init_weights:
            values.normal_(std=float(self.target.read().float().std()))
        self._add(adapter_name, values, Index(encode(positions, layout.size), positions, positions.numel(), layout))

    def add_placeholder(
        self, adapter_name: str, nnz: int, granularity: Granularity, code_digest: str | None = None
    ) -> None:
        """Add an adapter of `nnz` values, whose positions and values will be loaded from a file.

        `code_digest` is the SHA-256 of the index code in the file, where it is known.
        """
        layout, device = self.target.layout(granularity), self._device
        count = layout.count(nnz)
        code = torch.zeros(code_length(layout.size, count), dtype=torch.uint8, device=device)
        values = torch.zeros(layout.values_shape(count), device=device, dtype=torch.float32)
        self._add(adapter_name, values, Index(code, None, count, layout, code_digest))

    def replace_delta(self, adapter_name: str, stored: StoredDelta, code: Tensor) -> None:
        """Give an adapter other positions, with their index code, and values; in its own memory where it is as long.

        The adapter may be a placeholder, and must not be merged.
        """
        cast(Values, self.dowser_values[adapter_name]).replace(stored.values)
        self.index(adapter_name).replace(code, stored.positions)
        self.scaling[adapter_name] = 1.0

    def _add(self, adapter_name: str, values: Tensor, index: Index) -> None:
        self.scaling[adapter_name] = 1.0
        self.dowser_values[adapter_name] = Values(values, awaited=index.positions is None)
        self.dowser_index[adapter_name] = index

    @property
    def _device(self) -> torch.device:
        """Where the base layer computes now."""
        return device_of(self.get_base_layer())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version also casts to the dtype of the base, and float32 values would lose bits.
        if adapter_name not in self.dowser_values:
            return
        device = self._device if device is None else device
        if device.type == "meta":
            return  # weights that will come from rank 0; the positions are real on every rank
        if not self.values(adapter_name).is_meta:
            self.dowser_values[adapter_name].to(device)
        self.dowser_index[adapter_name].to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W + D of the given adapters into the base weight, keeping the entries that it overwrites.

        Args:
            safe_merge: refuse to write a value that is not finite.
            adapter_names: adapters to merge, in this order; None takes the active ones.

        Raises:
            ValueError: `safe_merge` found an infinite or undefined sum; that adapter is not merged, those before it in
                the list are.
        """
        for name in self._unmerged(adapter_names):
            entries = self.index(name).layout.merged(self.weight.data, self.stored(name))
            if safe_merge:
                entries.check_finite(name, self.module_name)
            self.vanished[name] = (entries.vanished(), entries.sums.numel())
            self._write(name, entries, entries.overwritten())
            if not self.weight.is_inference():
                # So that a backward of an earlier forward, which needs the weight as it was, fails in torch.
                torch.autograd.graph.increment_version(self.weight)

    def merge_briefly(self) -> None:
        """`merge` the active adapters for a moment in which nobody else writes the weight or asks what was lost."""
        for name in self._unmerged(None):
            entries = self.index(name).layout.merged(self.weight.data, self.stored(name))
            self._write(name, entries, entries.overwritten(with_checksum=False))

    def _write(self, adapter_name: str, entries: MergedEntries, written: Overwritten) -> None:
        """Write the sums and note the adapter as merged; whatever interrupts that, the weight is put back."""
        self.not_finite[adapter_name] = entries.not_finite()
        self.index(adapter_name).set_overwritten(written)
        try:
            self.merged_adapters.append(adapter_name)
            entries.write(self.weight.data)
        except BaseException:
            if adapter_name in self.merged_adapters:
                self.unmerge_last()
            raise

    def _unmerged(self, adapter_names: list[str] | None) -> list[str]:
        names = dict.fromkeys(check_adapters_to_merge(self, adapter_names))
        return [name for name in names if name in self.dowser_values]

    def unmerge(self) -> None:
        """Put the overwritten entries back, the last merged adapter first: the base is bit-identical again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters = [name for name in self.merged_adapters if name in self.dowser_values]
        while self.merged_adapters:
            name = self.merged_adapters[-1]
            if self.index(name).overwritten().was_changed(self.weight.data):
                warnings.warn(
                    f"Adapter '{name}': the weight of module '{self.module_name}' was changed after the merge. "
                    f"Unmerging puts the {self.index(name).nnz} entries that the merge had written back to what they "
                    "were before it; what else was changed stays.",
                    stacklevel=2,
                )
            self.unmerge_last()

    def unmerge_last(self) -> None:
        """Put back what the last merged adapter has overwritten."""
        name = self.merged_adapters[-1]
        self.index(name).overwritten().undo(self.weight.data)
        self.merged_adapters.pop()  # before the rest, without which the layer is unmerged all the same
        self.vanished.pop(name, None)
        self.not_finite.pop(name, None)
        self.index(name).set_overwritten(None)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The dense delta, in the shape of the stored weight and the dtype of the values.

        Raises:
            ValueError: the adapter has no values here.
        """
        if adapter_name not in self.dowser_values:
            raise ValueError(
                f"Adapter '{adapter_name}' has no values in module '{self.module_name}', which has adapters "
                f"{sorted(self.dowser_values)}."
            )
        delta = self.delta(adapter_name)
        dense = delta.values.new_zeros(self.target.shape)
        add_delta_(dense, delta.positions, delta.values)
        return dense


class Linear(nn.Module, DowserLayer):
    """A linear layer, or transformers' Conv1D, with sparse deltas on its weight."""

    def __init__(self, target: Target, sample: str | None = None) -> None:
        super().__init__()
        self.base_layer = target.module
        DowserLayer.__init__(self, target, sample)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not self.is_tied  # PEFT writes no factors for the other modules

    @property
    def is_additive(self) -> bool:
        """Whether the base layer must run itself, because calling it does more than its weight and bias say."""
        base = self.get_base_layer()
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        rounds_twice = is_falcons(base) and base.bias is not None
        return any(hooks) or has_own_forward(base) or rounds_twice

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The output for the active adapters: bit for bit what the merged layer gives, unless it `is_additive`.

        The base layer gets the arguments. `adapter_names` names an adapter for each row of `x`, which runs
        instead of the active ones.
        """
        return self.output(x, self.in_use(), None if self.disable_adapters else adapter_names, *args, **kwargs)

    def output(
        self, x: Tensor, in_use: list[str], adapter_names: list[str] | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The output for given adapters: one for each row of `x`, or, where that is None, all of `in_use`."""
        if adapter_names is None:
            return self._output(x, in_use, *args, **kwargs)
        return by_adapter(x, adapter_names, lambda rows, name: self._output(rows, [name], *args, **kwargs))

    def _output(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in adapters if name in self.dowser_values]
        columns = [name for name in active if self.index(name).layout.channel_dim is not None]
        single = [name for name in active if name not in columns]
        output = self._adapted(x, single, *args, **kwargs) if single else self.base_layer(x, *args, **kwargs)
        for name in columns:
            output = add_channels(output, x, self.index(name).decoded(), self.scaled_values(name))
        return output

    def _adapted(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """y = x (W + D)^T + b for the adapters' D; y = base_layer(x) + x D^T where the layer `is_additive`."""
        base: Any = self.get_base_layer()
        transposed = self.target.transposed
        values = [self.scaled_values(name) for name in active]
        positions = [self.index(name).decoded() for name in active]
        here = self._in_its_dtype(x.to(positions[0].device))  # where accelerate moves it for the base layer
        if not self.is_additive:
            weight, bias = self._weight(), cast(Tensor | None, base.bias)
            refuse_tangents(here, weight, bias, *values)
            return sparse_linear(here, weight, bias, values, positions, transposed)
        refuse_tangents(here, *values)
        output, nothing = self.base_layer(x, *args, **kwargs), here.new_zeros(()).expand(self.target.shape)
        return output + sparse_linear(here, nothing, None, values, positions, transposed).to(output.device)

    def _in_its_dtype(self, x: Tensor) -> Tensor:
        """An input in the dtype in which the base layer computes its product."""
        return in_autocast(x)

    def _weight(self) -> Weight:
        return self.get_base_layer().weight

    def __repr__(self) -> str:
        return "dowser." + super().__repr__()


def dowser_layers(model: nn.Module) -> list[DowserLayer]:
    """All adapted targets of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, DowserLayer)]


def by_adapter(x: Tensor, names: Sequence[str], apply: Callable[[Tensor, str], Tensor]) -> Tensor:
    """Run every adapter on its own rows of a batch `(batch, ...)`, which has one name per row.

    `apply` gives the output of an adapter for some rows; the outputs are in the order of the rows.
    """
    if len(names) != x.shape[0]:
        raise ValueError(f"adapter_names must have one name for each of the {x.shape[0]} rows, got {len(names)}.")
    rows = {name: [row for row, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    chosen = {name: torch.tensor(at, device=x.device) for name, at in rows.items()}
    parts = [apply(x.index_select(0, at), name) for name, at in chosen.items()]
    return torch.cat(parts).index_select(0, torch.cat(list(chosen.values())).argsort())


@torch.no_grad()
def exact_factors(layer: BaseTunerLayer, rank: float, adapter_name: str) -> tuple[Tensor, Tensor, int] | None:
    """The LoRA factors A and B of a layer of any PEFT method, and their rank; None where they cannot be exact.

    `rank` is as in `peft.convert_to_lora`: a number, or as a float the share of the delta's squares that is wanted.
    """
    if not isinstance(layer, DowserLayer) or adapter_name not in layer.dowser_values:
        return None
    index = layer.index(adapter_name)
    wanted = index.count if rank == 1 and isinstance(rank, float) else rank
    if index.layout.channel_dim is None or wanted < index.count:
        return None
    return *lora_factors(layer.stored(adapter_name), index.layout.size, index.count), index.count


def layers_with_adapter(model: nn.Module, adapter_name: str) -> dict[str, DowserLayer]:
    """The layers that carry an adapter, by their names in the model."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, DowserLayer) and adapter_name in layer.dowser_values
    }
