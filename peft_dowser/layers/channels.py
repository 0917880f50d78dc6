"""The product with trained input channels: a part of the input times a thin matrix."""

from torch import Tensor
from torch.nn import functional


def add_channels(output: Tensor, x: Tensor, channels: Tensor, values: Tensor) -> Tensor:
    """y + x[..., channels] D^T, as a LoRA adapter whose A picks the channels and whose B is D.

    Args:
        output: y, what the layer gives without it, shape `(..., out)`.
        x: its input, shape `(..., in)`. Only the chosen channels of it are kept for the backward.
        channels: numbers of the input channels, strictly increasing, shape `(k,)`, int32 or int64.
        values: D, shape `(out, k)`, any float dtype; it is cast to the dtype of `x`, as the product is to that of y.

    Returns:
        The sum, shape `(..., out)`.
    """
    chosen = x.to(channels.device).index_select(-1, channels)
    product = functional.linear(chosen, values.to(chosen.dtype))
    return output + product.to(output.device, output.dtype)
