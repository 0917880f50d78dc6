"""Probing: the factors against a brute-force Jacobian, and the model left as it was."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import config, tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_dowser import DowserConfig, probe
from peft_dowser.base.search import resolve_targets
from peft_dowser.delta.seeds import derived_seed
from peft_dowser.probing import scores

# jacrev batches the backward of attention by running it once per output, and says that this is slow.
slow_attention = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
LAYERS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.up_proj",
]
PROMPTS = [torch.tensor([1, 5, 9, 13, 40, 7]), torch.tensor([1, 20, 3]), torch.tensor([1, 8, 8, 31])]


def jacobian(model: nn.Module, layer: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """d logits[-1] / d z for one prompt, `(V, T, out)`, by `jacrev`; and the input h, `(T, in)`."""
    seen = {}

    def logits_of(shift: Tensor) -> Tensor:
        def add(module, args, output):
            seen["h"] = args[0].detach()[0]
            return output + shift

        handle = layer.register_forward_hook(add)
        try:
            return model(input_ids=ids[None], use_cache=False).logits[0, -1]
        finally:
            handle.remove()

    shift = torch.zeros(len(ids), layer.weight.shape[0], dtype=layer.weight.dtype)
    return torch.func.jacrev(logits_of)(shift), seen["h"]


def signs(seed: int, probe_number: int, num_rademacher: int, vocabulary: int) -> Tensor:
    """The Rademacher vectors that the documentation promises, `(R, V)`."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "rademacher", probe_number))
    draws = [torch.randint(2, (vocabulary,), generator=generator, dtype=torch.int8) for _ in range(num_rademacher)]
    return 2.0 * torch.stack(draws).double() - 1


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama(torch.float64).eval()


@slow_attention
@pytest.mark.parametrize("name", LAYERS)
def test_factors_are_those_of_the_brute_force_jacobian(model: nn.Module, name: str) -> None:
    statistics = probe(model, config(target_modules=[name], num_rademacher=3, seed=7), prompts=PROMPTS)
    found = statistics.modules[name]
    energy = 0
    for number, ids in enumerate(PROMPTS):
        jac, hidden = jacobian(model, model.get_submodule(name), ids)
        projected = torch.einsum("rv,vto->rto", signs(7, number, 3, jac.shape[0]), jac)
        torch.testing.assert_close(found.sensitivity[number].double(), projected.abs().mean((0, 1)), rtol=1e-5, atol=0)
        torch.testing.assert_close(found.activity[number].double(), hidden.abs().mean(0), rtol=1e-5, atol=0)
        energy = energy + hidden.square().sum(0)
    torch.testing.assert_close(found.energy.double(), energy, rtol=1e-5, atol=0)


def test_sensitivity_estimates_the_norm_of_the_jacobian(model: nn.Module) -> None:
    """Khintchine: ||J|| / sqrt(2) <= E|xi^T J| <= ||J||, for each token."""
    name, ids = "model.layers.1.mlp.up_proj", PROMPTS[0]
    jac, _ = jacobian(model, model.get_submodule(name), ids)
    norms = jac.norm(dim=0).mean(0)
    statistics = probe(model, config(target_modules=[name], num_rademacher=1000), prompts=[ids])
    ratio = statistics.modules[name].sensitivity[0] / norms
    assert ratio.min() > 0.70
    assert ratio.max() < 1.05


@slow_attention
@pytest.mark.parametrize("score", ["dowser", "shift"])
def test_score_is_equation_5_summed_densely_per_sample(score: str, model: nn.Module) -> None:
    """With |W|, and without it."""
    name = LAYERS[1]
    weight = model.get_submodule(name).weight.detach()
    statistics = probe(model, config(target_modules=[name], num_rademacher=2, seed=3), prompts=PROMPTS)
    dense = torch.zeros_like(weight)
    for number, ids in enumerate(PROMPTS):
        jac, hidden = jacobian(model, model.get_submodule(name), ids)
        gain = torch.einsum("rv,vto->rto", signs(3, number, 2, jac.shape[0]), jac).abs().mean((0, 1))
        size = weight.abs() if score == "dowser" else 1
        dense += gain[:, None] * size * hidden.abs().mean(0)[None]
    found = scores.FROM_STATISTICS[score](weight, statistics.modules[name])
    torch.testing.assert_close(found.double(), dense / len(PROMPTS), rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_padding_and_batch_size_do_not_matter(model: nn.Module, batch_size: int) -> None:
    alone = [probe(model, config(seed=5), prompts=[ids]) for ids in PROMPTS]
    together = probe(model, config(seed=5, probe_batch_size=batch_size), prompts=PROMPTS)
    for name, module in together.modules.items():
        for number, single in enumerate(alone):
            torch.testing.assert_close(module.activity[number], single.modules[name].activity[0], rtol=1e-5, atol=1e-9)
        first = alone[0].modules[name].sensitivity[0]
        torch.testing.assert_close(module.sensitivity[0], first, rtol=1e-5, atol=1e-9)


def test_a_left_padded_prompt_of_the_caller_gives_the_same_factors(model: nn.Module) -> None:
    ids = PROMPTS[0]
    padded = {
        "input_ids": torch.cat([torch.zeros(3, dtype=torch.long), ids])[None],
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5]]),
    }
    one, other = probe(model, config(), prompts=[ids]), probe(model, config(), prompts=[padded])
    for name in one.modules:
        for key in ("activity", "sensitivity", "energy"):
            left, right = getattr(one.modules[name], key), getattr(other.modules[name], key)
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-9)


def test_the_seed_alone_decides(model: nn.Module) -> None:
    torch.manual_seed(1)
    first = probe(model, config(seed=4))
    torch.manual_seed(2)
    again, other = probe(model, config(seed=4)), probe(model, config(seed=5))
    for name in first.modules:
        assert torch.equal(first.modules[name].sensitivity, again.modules[name].sensitivity)
        assert not torch.equal(first.modules[name].sensitivity, other.modules[name].sensitivity)


def state_of(model: nn.Module) -> list:
    return [
        torch.get_rng_state().tolist(),
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad is None for parameter in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        id(model.generation_config),
        model.generation_config.to_dict(),
        model.config.to_dict(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    ]


@pytest.mark.parametrize("error", [None, ValueError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails_in", ["generation", "forward", "backward"])
def test_the_model_is_left_as_it_was(error: BaseException | None, fails_in: str) -> None:
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.generation_config.num_beams = 2
    layer = model.model.layers[1].mlp
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def fail(*args):
        if error is not None and not torch.is_inference_mode_enabled():
            graph = torch.is_grad_enabled()
            if (fails_in == "generation") != graph or fails_in == "backward":
                raise error

    def at_backward(module, args, output):
        if fails_in == "backward" and output.requires_grad:
            output.register_hook(fail)
        elif fails_in != "backward":
            fail()

    handle = layer.register_forward_hook(at_backward)
    before = state_of(model)
    if error is None:
        probe(model, config())
    else:
        with pytest.raises(type(error)):
            probe(model, config())
    assert state_of(model) == before
    handle.remove()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_the_callers_contexts_do_not_matter(model: nn.Module, context) -> None:
    expected = probe(model, config())
    with context():
        found = probe(model, config())
    for name in expected.modules:
        assert torch.equal(found.modules[name].sensitivity, expected.modules[name].sensitivity)


def test_inference_mode_is_refused(model: nn.Module) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\); leave that context first"):
        probe(model, config())


def test_the_batch_is_halved_when_memory_runs_out(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [torch.randint(3, 60, (8,), generator=torch.Generator().manual_seed(n)) for n in range(7)]
    expected = probe(model, config(), prompts=prompts)
    sizes = []
    forward = model.forward

    def limited(*args, input_ids: Tensor, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", limited)
    found = probe(model, config(), prompts=prompts)
    assert sizes == [2, 7, 3, 1, 1, 1, 1, 1, 1, 1]  # first two, to see whether prompts can share a batch
    for name in expected.modules:
        torch.testing.assert_close(found.modules[name].sensitivity, expected.modules[name].sensitivity)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_a_prompt_that_does_not_fit_is_an_error(
    prompts: list[Tensor], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(RuntimeError, match="out of memory with one prompt at a time; choose a smaller probe_length"):
        probe(model, config(probe_batch_size=4), prompts=prompts)


aten = torch.ops.aten
VIEWS = (aten.t.default, aten.detach.default, aten.view.default, aten.expand.default, aten.transpose.int)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            # Views of a weight (its transpose) allocate nothing.
            if isinstance(tensor, Tensor) and func not in VIEWS and not isinstance(tensor, nn.Parameter):
                self.numel = max(self.numel, tensor.numel() if tensor._base is None else 0)
        return out


def test_nothing_of_the_size_of_a_weight_is_allocated() -> None:
    model = tiny_llama(hidden=256)
    targets = resolve_targets(model, config())
    smallest = min(target.numel for target in targets.values())
    with LargestTensor() as largest:
        probe(model, config(), prompts=PROMPTS)
    assert largest.numel < smallest / 4


def test_gradient_is_that_of_the_mean_next_token_loss(model: nn.Module) -> None:
    name = LAYERS[2]
    statistics = probe(model, config(target_modules=[name], score="gradient"), prompts=PROMPTS)
    layer = model.get_submodule(name)
    layer.weight.grad = None
    losses = [model(input_ids=ids[None], labels=ids[None]).loss for ids in PROMPTS]
    (sum(losses) / len(losses)).backward()
    found = statistics.modules[name].gradient.double()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-4, atol=1e-8)
    model.zero_grad()


def test_a_module_that_no_prompt_reaches_has_no_statistics() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    found = probe(model, config()).modules
    assert "model.layers.1.mlp.up_proj" not in found
    assert "model.layers.0.mlp.up_proj" in found


def test_models_without_vocabulary_or_generate_are_refused() -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Sequential: it has no token vocabulary.*score='magnitude'"):
        probe(plain, DowserConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="LlamaModel: it has no language-model head"):
        probe(tiny_llama().model, config())


def test_a_plain_module_is_probed_with_the_callers_inputs() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    inputs = [{"input": torch.randn(1, 4, dtype=torch.float64)} for _ in range(3)]
    found = probe(plain, DowserConfig(target_modules=["0"], num_rademacher=2, seed=1), prompts=inputs).modules["0"]
    for number, sample in enumerate(inputs):
        hidden = plain[0](sample["input"])[0]
        jac = torch.func.jacrev(lambda z: plain[2](torch.tanh(z)))(hidden)
        expected = (signs(1, number, 2, 5) @ jac).abs().mean(0)
        torch.testing.assert_close(found.sensitivity[number].double(), expected, rtol=1e-5, atol=0)


def test_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match=r"parameters of LlamaForCausalLM are on the meta device.*load them before"):
        probe(model, config())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty"),
        ("a text", r"prompts must be a list, got a single string; pass \[text\]"),
        ([torch.zeros(3)], r"prompts\[0\] must be a text, a row of token ids"),
        (
            [torch.tensor([1, 2]), torch.zeros(1, 3, dtype=torch.long)],
            r"prompts\[1\] must be a text, a row of token ids",
        ),
    ],
)
def test_bad_prompts_are_refused(model: nn.Module, prompts: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(model, config(), prompts=prompts)


def test_gradient_checkpointing_does_not_matter() -> None:
    model = tiny_llama()
    expected = probe(model, config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable()
    model.train()
    found = probe(model, config())
    for name in expected.modules:
        assert torch.equal(found.modules[name].sensitivity, expected.modules[name].sensitivity)


@pytest.mark.parametrize("given", [True, False])
def test_prompts_are_on_the_cpu_before_they_are_sent(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a GPU every rank would unpack them onto the same one."""
    moved: list[Tensor] = []
    cpu = Tensor.cpu

    def noted(tensor: Tensor) -> Tensor:
        moved.append(tensor)
        return cpu(tensor)

    def on_one_rank(source: int, work: Callable[[], Any]) -> Any:
        if isinstance(result := work(), list):
            sent.extend(tensor for prompt in result for tensor in prompt.values())
        return result

    sent: list[Tensor] = []
    monkeypatch.setattr(Tensor, "cpu", noted)
    monkeypatch.setattr(sys.modules["peft_dowser.probing.ranks"], "on_one_rank", on_one_rank)
    probe(tiny_llama(), config(), prompts=[{"input_ids": torch.tensor([[3, 4]])}] if given else None)
    assert len(sent) == (1 if given else 4)
    assert all(any(tensor is other for other in moved) for tensor in sent)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_gpu_that_is_idle_is_mentioned(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setattr("peft_dowser.delta.seeds._accelerator", lambda: None)
    probe(tiny_llama(), config(), prompts=[[3, 4]])
    assert ("The probe runs on the CPU, where the base is, while a GPU is idle" in caplog.text) == has_gpu
