"""Bases whose weights are away between forwards: on the CPU or on disk, brought by accelerate's hooks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from cases import every_granularity
from models import IDS, assert_as_merged, config, logits, set_values, tiny_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_dowser import DowserLayer, probe
from peft_dowser.delta.layout import Granularity


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, torch.device("cpu"))


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    disk_offload(model, str(folder / "offload"), torch.device("cpu"))
    return model


def partly_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "offload"), force_hooks=True)


OFFLOADS = pytest.mark.parametrize("offload", [on_cpu, on_disk, partly_on_disk])
Offload = Callable[[nn.Module, Path], nn.Module]


def positions(model: nn.Module) -> list[Tensor]:
    return [m.index("default").decoded() for m in model.modules() if isinstance(m, DowserLayer)]


@OFFLOADS
@every_granularity
def test_the_probe_and_the_mask_are_those_of_the_base_at_hand(
    offload: Offload, granularity: Granularity, tmp_path: Path
) -> None:
    here, away = tiny_llama(), offload(tiny_llama(), tmp_path)
    assert any(parameter.is_meta for parameter in away.parameters())
    expected, found = probe(here, config()), probe(away, config())
    for name, module in expected.modules.items():
        assert torch.equal(found.modules[name].sensitivity, module.sensitivity)
        assert torch.equal(found.modules[name].activity, module.activity)
    adapted, at_hand = (get_peft_model(base, config(granularity=granularity)) for base in (away, here))
    assert all(map(torch.equal, positions(adapted), positions(at_hand)))
    assert any(parameter.is_meta for parameter in away.parameters())


@OFFLOADS
@every_granularity
def test_it_trains_as_the_base_at_hand(offload: Offload, granularity: Granularity, tmp_path: Path) -> None:
    losses = []
    for base in (tiny_llama(), offload(tiny_llama(), tmp_path)):
        model = get_peft_model(base, config(granularity=granularity))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@OFFLOADS
@every_granularity
def test_saved_loaded_merged_and_restored(offload: Offload, granularity: Granularity, tmp_path: Path) -> None:
    here = get_peft_model(tiny_llama(), config(granularity=granularity)).eval()
    set_values(here)
    here.save_pretrained(tmp_path / "adapter")
    base = offload(tiny_llama(), tmp_path)
    before = logits(base)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(model), logits(here))
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(logits(model), logits(here))
    model.merge_adapter()
    assert_as_merged(logits(here), logits(model), granularity)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert_as_merged(logits(here), logits(model.merge_and_unload()), granularity)
