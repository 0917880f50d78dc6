"""What is said: one line on a choice, and a bar where transformers shows its own."""

import hashlib
import logging
import warnings
from pathlib import Path

import pytest
import torch
from models import assert_same_bits, base_bits, config, set_values, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers.utils import logging as bars

from peft_dowser import DowserLayer, Patch, hotswap, probe
from peft_dowser.layers.layer import dowser_layers


def test_a_choice_is_summed_up_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="peft_dowser"):
        model = get_peft_model(tiny_llama(), config(update_ratio=0.25))
    (record,) = [record for record in caplog.records if record.message.startswith("Dowser trains")]
    digest, total = hashlib.sha256(), 0
    for layer in model.modules():
        if isinstance(layer, DowserLayer):
            positions = layer.dowser_index["default"].positions
            digest.update(f"{layer.module_name} {len(positions)} ".encode() + positions.numpy().tobytes())
            total += layer.get_base_layer().weight.numel()
    trained, _ = model.get_nb_trainable_parameters()
    assert record.message.startswith(f"Dowser trains {trained} of {total} weights (25.00 %) in 14 modules; chosen in ")
    assert record.message.endswith(f"digest {digest.hexdigest()[:12]}.")


def test_nothing_is_hashed_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dowser.tuner.messages.digest_of", lambda masks: pytest.fail("hashed"))
    get_peft_model(tiny_llama(), config(score="random"))


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar_of_a_probe_is_silent_where_those_of_transformers_are(
    shown: bool, capfd: pytest.CaptureFixture
) -> None:
    (bars.enable_progress_bar if shown else bars.disable_progress_bar)()
    try:
        get_peft_model(tiny_llama(), config())
    finally:
        bars.enable_progress_bar()
    out, err = capfd.readouterr()
    assert ("Probing" in err) == shown
    assert out == ""


ENTRIES = {
    "probe": lambda model, folder: probe(model, config()),
    "Patch": Patch,
    "hotswap": hotswap,
    "from_pretrained": PeftModel.from_pretrained,
    "inject_adapter_in_model": lambda model, folder: inject_adapter_in_model(config(), model),
}


@pytest.mark.parametrize("given", ["someone/model", Path("someone/model"), None, tiny_llama().config])
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_model_is_answered_in_one_line(entry: str, given: object, tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), config(score="random")).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"^model must be a loaded model, got .*\. Load it first, .*") as caught:
        ENTRIES[entry](given, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("targets", [None, ["q_proj"]])
@pytest.mark.parametrize("first", ["dowser", "lora"])
@pytest.mark.parametrize("entry", ["get_peft_model", "probe", "inject_adapter_in_model", "from_pretrained"])
def test_a_second_get_peft_model_says_what_to_do(entry: str, first: str, targets: list | None, tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), config(score="random")).save_pretrained(tmp_path)
    settings = config(score="random") if first == "dowser" else LoraConfig(task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), settings)
    before = {name: type(module) for name, module in model.named_modules()}
    calls = {
        "get_peft_model": lambda: get_peft_model(model, config(target_modules=targets)),
        "probe": lambda: probe(model, config(target_modules=targets)),
        "inject_adapter_in_model": lambda: inject_adapter_in_model(config(target_modules=targets), model),
        "from_pretrained": lambda: PeftModel.from_pretrained(model, tmp_path),
    }
    message = r"^The model is a PeftModelForCausalLM with adapters \['default'\], not a base model. .*add_adapter"
    with pytest.raises(ValueError, match=message):
        calls[entry]()
    assert {name: type(module) for name, module in model.named_modules()} == before
    anew = get_peft_model(model.unload(), config(score="random"))
    assert anew.get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize(("vanishing", "said"), [(0, False), (1, False), (10, False), (11, True), (500, True)])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_values_that_vanish_are_reported_from_one_percent_on(
    how: str, vanishing: int, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(100, 110))
    base[0].weight.data.fill_(1.0)
    model = get_peft_model(base, config(score="random", target_modules=["0"], task_type=None))
    values = next(layer for layer in model.modules() if isinstance(layer, DowserLayer)).values("default")
    assert len(values) == 1100
    set_values(model)
    values.data.copy_(torch.where(torch.arange(1100) < vanishing, 1e-12, 1.0))
    getattr(model, how)()
    messages = [record.message for record in caplog.records if "too small to change a weight" in record.message]
    assert bool(messages) == said
    assert not any("(0.0 %)" in message for message in messages)


def overflowing(dtype: torch.dtype) -> PeftModel:
    """A model whose adapter leaves the range of float16 in one of two modules."""
    model = get_peft_model(tiny_llama(dtype, layers=1), config(score="random", target_modules=["q_proj", "v_proj"]))
    set_values(model)
    next(layer for layer in dowser_layers(model) if "v_proj" in layer.module_name).values("default").data[:3] = 1e5
    return model


MERGES = {
    "merge_adapter": lambda model, **options: model.merge_adapter(**options),
    "merge_and_unload": lambda model, **options: model.merge_and_unload(**options),
    "generate": lambda model: model.generate(input_ids=torch.tensor([[1, 5]]), max_new_tokens=1),
}


@pytest.mark.parametrize("merge", MERGES)
def test_a_merge_that_writes_what_is_not_finite_says_so(merge: str) -> None:
    message = (
        r"has written 3 values that are not finite into 1 modules: 'model\.layers\.0\.self_attn\.v_proj'\. .*bfloat16"
    )
    with pytest.warns(UserWarning, match=message):
        MERGES[merge](overflowing(torch.float16))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not finite")
        MERGES[merge](overflowing(torch.bfloat16))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_refuses_it(merge: str) -> None:
    model = overflowing(torch.float16)
    before = base_bits(model)
    with pytest.raises(ValueError, match=r"would write 3 values that are not finite in torch\.float16 into module"):
        MERGES[merge](model, safe_merge=True)
    assert_same_bits(base_bits(model), before)
