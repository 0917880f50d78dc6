"""Two processes: one mask, one probe in two parts, equal losses, and an error of one rank raised on both."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import every_granularity
from groups import on_ranks
from models import config, tiny_llama
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_dowser import DowserLayer, probe
from peft_dowser.delta.layout import Granularity

pytestmark = pytest.mark.slow  # starts processes


def train(rank: int, granularity: Granularity) -> dict:
    # A seed of its own on each rank would choose different masks.
    model = get_peft_model(tiny_llama(), config(seed=rank, granularity=granularity))
    codes = [m.dowser_index["default"].code for m in model.modules() if isinstance(m, DowserLayer)]
    parallel = DistributedDataParallel(model)
    sent = [name for name, _ in model.named_buffers() if name not in parallel.parameters_to_ignore]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(4):
        both = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(step))
        batch = both[2 * rank : 2 * rank + 2]
        optimizer.zero_grad()
        loss = parallel(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach_())
        losses.append(loss.item() / 2)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"sent": sent, "codes": codes, "losses": losses, "values": values}


def train_alone(granularity: Granularity) -> list[float]:
    model = get_peft_model(tiny_llama(), config(seed=0, granularity=granularity))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(4):
        batch = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accumulated_alone(granularity: Granularity) -> dict[str, torch.Tensor]:
    """The values of one process that takes the ranks' parts of every batch one after the other."""
    model = get_peft_model(tiny_llama(), config(seed=0, granularity=granularity))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        for batch in torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(step)).chunk(2):
            (model(input_ids=batch, labels=batch).loss / 2).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@every_granularity
def test_two_ranks_have_one_mask_and_the_losses_of_one_process(granularity: Granularity, tmp_path: Path) -> None:
    first, second = on_ranks(partial(train, granularity=granularity), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first["codes"], second["codes"], strict=True))
    assert first["losses"] == second["losses"]
    assert first["sent"]  # the frequencies of the rotary embedding
    assert not any("dowser" in name for name in first["sent"])
    assert all(torch.equal(value, second["values"][name]) for name, value in first["values"].items())
    alone = torch.tensor(train_alone(granularity))
    torch.testing.assert_close(torch.tensor(first["losses"]), alone, rtol=1e-4, atol=1e-5)
    # Half of (a + b) and half of a plus half of b are the same bits.
    expected = accumulated_alone(granularity)
    assert all(torch.equal(value, expected[name]) for name, value in first["values"].items())


PARTS = {"num_probes": 5, "probe_batch_size": 1}
PROMPTS = [torch.arange(3, 12), torch.arange(20, 24)]


def probe_twice(rank: int) -> list[dict]:
    model = tiny_llama()
    fresh = probe(model, config(seed=rank, **PARTS))
    by_hand = probe(model, config(), prompts=PROMPTS)
    return [{name: vars(module) for name, module in s.modules.items()} for s in (fresh, by_hand)]


def test_ranks_probe_a_part_each_and_get_the_bits_of_one_process(tmp_path: Path) -> None:
    alone = probe(tiny_llama(), config(), prompts=PROMPTS).modules
    for fresh, by_hand in on_ranks(probe_twice, tmp_path):
        for name, module in probe(tiny_llama(), config(**PARTS)).modules.items():
            for field in ("sensitivity", "activity"):
                assert torch.equal(vars(module)[field], fresh[name][field]), (name, field)
                torch.testing.assert_close(by_hand[name][field], vars(alone[name])[field])
            torch.testing.assert_close(module.energy, fresh[name]["energy"])


def message_of(work) -> str:
    try:
        work()
    except (ValueError, ZeroDivisionError) as error:
        return str(error)
    return "no error"


def fail(rank: int) -> list[str]:
    on_rank_0 = config(update_ratio=1e-9 if rank == 0 else 0.1)
    other_base = tiny_llama(hidden=16 if rank else 32)
    broken, sharded = tiny_llama(), tiny_llama()
    if rank == 1:
        broken.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: 1 / 0)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    return [
        message_of(lambda: get_peft_model(tiny_llama(), on_rank_0)),
        message_of(lambda: get_peft_model(other_base, config(score="magnitude"))),
        message_of(lambda: probe(broken, config())),
        message_of(lambda: get_peft_model(sharded, config())),
    ]


def test_an_error_on_one_rank_reaches_both(tmp_path: Path) -> None:
    for on_rank_0, other_base, broken, sharded in on_ranks(fail, tmp_path):
        assert "No weight would train" in on_rank_0
        assert other_base.startswith(
            "Rank 1: module 'model.layers.0.self_attn.q_proj' has a weight of shape (16, 16), on"
        )
        assert broken == "division by zero"
        assert sharded.startswith("Parameters of FSDPLlamaForCausalLM are sharded over the ranks")
        assert "make the adapter with DowserConfig(statistics=path)" in sharded
