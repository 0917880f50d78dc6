"""The global generators: those in use are seeded and come back, and no others are touched."""

import pytest
import torch
from accelerate import cpu_offload
from models import config, tiny_llama
from torch import nn

from peft_dowser import probe
from peft_dowser.base.restoring import measuring
from peft_dowser.delta import seeds


class Accelerator:
    """Stands for `torch.cuda` with two devices, of which the model may use none."""

    def __init__(self, initialized: bool) -> None:
        self.generators = [torch.Generator().manual_seed(number) for number in range(2)]
        self.initialized = initialized
        self.seeded: list[int] = []

    def is_initialized(self) -> bool:
        return self.initialized

    def manual_seed_all(self, seed: int) -> None:
        self.seeded.append(seed)
        for generator in self.generators:
            generator.manual_seed(seed)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self.generators]

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


@pytest.fixture
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    module = Accelerator(request.param)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return module


def offloaded(base: nn.Module) -> nn.Module:
    return cpu_offload(base, torch.device("cpu"))


@pytest.mark.parametrize("accelerator", [True], indirect=True)
@pytest.mark.parametrize("offloads", [False, True])
def test_a_probe_restores_the_generators_of_all_devices(accelerator: Accelerator, offloads: bool) -> None:
    base = offloaded(tiny_llama()) if offloads else tiny_llama()
    before = [torch.get_rng_state(), *accelerator.get_rng_state_all()]
    probe(base, config())
    assert len(accelerator.seeded) == 1
    assert all(map(torch.equal, before, [torch.get_rng_state(), *accelerator.get_rng_state_all()]))


@pytest.mark.parametrize("accelerator", [False], indirect=True)
def test_a_device_that_is_not_in_use_is_not_seeded(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every device"))
    probe(base, config())
    assert not accelerator.seeded


@pytest.mark.parametrize("accelerator", [True], indirect=True)
def test_a_measurement_restores_them_too_whatever_happens(accelerator: Accelerator) -> None:
    model = nn.Linear(2, 2)
    before = [torch.get_rng_state(), *accelerator.get_rng_state_all()]
    with pytest.raises(KeyError), measuring(model):
        seeds.seed_generators(7)
        torch.rand(3)
        raise KeyError
    assert accelerator.seeded == [7]
    assert all(map(torch.equal, before, [torch.get_rng_state(), *accelerator.get_rng_state_all()]))


@pytest.mark.parametrize("offloads", [False, True])
def test_the_autocast_of_the_caller_is_off_in_a_probe(offloads: bool) -> None:
    expected = probe(tiny_llama(), config(), prompts=[[3, 4, 5]])
    base = offloaded(tiny_llama()) if offloads else tiny_llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = probe(base, config(), prompts=[[3, 4, 5]])
    for name, module in expected.modules.items():
        assert torch.equal(found.modules[name].sensitivity, module.sensitivity)
