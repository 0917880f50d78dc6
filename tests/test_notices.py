"""What is said: one line on a choice, and a bar where transformers shows its own."""

import hashlib
import logging

import pytest
from helpers import config, tiny_llama
from peft import get_peft_model
from transformers.utils import logging as bars

from peft_dowser import DowserLayer
from peft_dowser.notices import report_vanished


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
    gigabytes = float(record.message.split("peak memory ")[1].split(" GB")[0])
    assert 0.05 < gigabytes < 100


@pytest.mark.parametrize("lost", [0, 1, 9, 10, 1000])
def test_values_that_vanish_are_a_warning_from_one_percent_on(lost: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="peft_dowser"):
        report_vanished([{"default": (lost, 400)}, {"default": (0, 600)}])
    expected = [(logging.WARNING if lost >= 10 else logging.INFO, lost)] if lost else []
    assert [(record.levelno, record.args[0]) for record in caplog.records] == expected


def test_nothing_is_hashed_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dowser.notices.digest_of", lambda masks: pytest.fail("hashed"))
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
