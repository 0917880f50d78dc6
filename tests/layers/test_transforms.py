"""`torch.func` and forward-mode differentiation of ran layers: the derivative of the merged model, or an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import config, set_values, tiny_moe
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from transformers.pytorch_utils import Conv1D

# What torch itself warns of where it differentiates forward.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]


class FirstExperts(nn.Module):
    """The experts of a layer, each row of the input to two of them."""

    def __init__(self) -> None:
        super().__init__()
        model = tiny_moe("mixtral")
        model.set_experts_implementation("batched_mm")  # grouped products of transformers 5.18 refuse transforms first
        self.experts = model.model.layers[0].mlp.experts
        self.width = self.experts.gate_up_proj.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(len(x))[:, None] % 2 + torch.tensor([0, 1])
        return self.experts(x, chosen, torch.full(chosen.shape, 0.5))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh())


def conv() -> nn.Module:
    return nn.Sequential(Conv1D(6, 8), nn.Tanh())


def hooked() -> nn.Module:
    """Its base layer runs itself."""
    model = linear()
    model[0].register_forward_hook(lambda *args: None)
    return model


def ran(make: Callable[[], nn.Module], trainable: bool = True) -> PeftModel:
    torch.manual_seed(0)
    names: dict[str, Any] = {"target_modules": ["0"]}
    if make is FirstExperts:
        names = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = get_peft_model(make(), config(score="random", task_type=None, update_ratio=0.5, **names))
    set_values(model, std=1)
    for parameter in model.parameters():
        parameter.requires_grad_(trainable and parameter.requires_grad)
    model(given(model))
    return model


def given(model: PeftModel) -> Tensor:
    width = getattr(model.base_model.model, "width", 8)
    return torch.randn(3, width, generator=torch.Generator().manual_seed(1))


def forward_mode(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


def compiled(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(lambda x: jvp(function, (x,), (x,))[1], backend="eager")(x)


def of_compiled(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch._dynamo.reset()
    return jvp(torch.compile(function, backend="eager"), (x,), (x,))[1]


def twice(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (once,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(once.square().sum(), x)[0]


FORWARD = {
    "jvp": lambda function, x: jvp(function, (x,), (x,))[1],
    "jacfwd": lambda function, x: jacfwd(function)(x),
    "linearize": lambda function, x: linearize(function, x)[1](x),
    "forward_ad": forward_mode,
}
COMPILED = {"compiled jvp": compiled, "jvp of a compiled model": of_compiled}
OTHERS = {
    "grad": lambda function, x: grad(lambda x: function(x).sum())(x),
    "vjp": lambda function, x: vjp(function, x)[1](function(x)),
    "jacrev": lambda function, x: jacrev(function)(x),
    "hessian": lambda function, x: hessian(lambda x: function(x).sum())(x),
    "vmap": lambda function, x: vmap(function)(x[:, None]),
    "second derivative": twice,
}
MESSAGE = r"no forward-mode derivative .*Merge the adapter before, with merge_adapter\(\)"


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("make", [linear, conv, hooked, FirstExperts])
@pytest.mark.parametrize("transform", FORWARD)
def test_a_forward_mode_derivative_is_refused(transform: str, make: Callable[[], nn.Module], trainable: bool) -> None:
    model = ran(make, trainable)
    with pytest.raises(NotImplementedError, match=MESSAGE):
        FORWARD[transform](model, given(model))
    if make is linear:
        model.merge_adapter()
        assert FORWARD[transform](model, given(model)).norm() > 0


@pytest.mark.parametrize("trainable", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("transform", COMPILED)
def test_it_is_refused_where_torch_compiles(transform: str, trainable: bool) -> None:
    model = ran(linear, trainable)
    with pytest.raises(NotImplementedError, match=MESSAGE):
        COMPILED[transform](model, given(model))


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("make", [linear, conv, hooked, FirstExperts])
@pytest.mark.parametrize("transform", OTHERS)
def test_other_transforms_are_refused_too(transform: str, make: Callable[[], nn.Module], trainable: bool) -> None:
    model = ran(make, trainable)
    with pytest.raises((RuntimeError, NotImplementedError)):
        OTHERS[transform](model, given(model))


@pytest.mark.parametrize("make", [linear, conv, hooked, FirstExperts])
def test_the_derivative_with_respect_to_the_values_is_refused(make: Callable[[], nn.Module]) -> None:
    model = ran(make)
    x, values = given(model), {name: p.detach() for name, p in model.named_parameters() if ".dowser_" in name}
    with pytest.raises(NotImplementedError, match=MESSAGE):
        jvp(lambda values: functional_call(model, values, (x,)), (values,), (values,))


@pytest.mark.parametrize("make", [linear, conv, hooked, FirstExperts])
def test_functional_call_computes_with_the_values_given(make: Callable[[], nn.Module]) -> None:
    model, other = ran(make), ran(make)
    set_values(other, std=1, seed=7)
    x, values = given(model), {name: p.detach() for name, p in other.named_parameters() if ".dowser_" in name}
    assert torch.equal(functional_call(model, values, (x,)), other(x))
    assert not torch.equal(model(x), other(x))


@pytest.mark.parametrize("part", ["dowser_values", "base_layer"])
def test_a_forward_mode_derivative_of_an_embedding_is_refused(part: str) -> None:
    model = get_peft_model(
        nn.Sequential(nn.Embedding(9, 8)),
        config(score="random", task_type=None, target_modules=["0"], update_ratio=0.5),
    )
    given = {name: p.detach() for name, p in model.named_parameters() if part in name}
    ones = {name: torch.ones_like(p) for name, p in given.items()}
    with pytest.raises(NotImplementedError, match=MESSAGE):
        jvp(lambda given: functional_call(model, given, (torch.tensor([[1, 5, 5, 2]]),)), (given,), (ones,))
