"""The model card of a saved adapter."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from models import config, set_values, tiny_llama
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(tiny_llama(), config(update_ratio=0.25, seed=3))
    set_values(model)
    return model


def test_the_card_says_how_to_load_the_adapter_and_what_it_is(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("3").touch()  # the name of the seed means no file
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"dowser", "sparse", "peft"} <= set(card.data["tags"])
    first = card.text.index("import peft_dowser")
    assert first < card.text.index("from peft import AutoPeftModel")
    assert "`pip install ./peft-dowser`. Do not install it by its name\nalone" in card.text
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    trained, _ = model.get_nb_trainable_parameters()
    for line in (
        "base model: someone/base",
        f"trained weights: {trained:,}",
        "trains: 0.25 of the single weights",
        "chosen by: score dowser, the lowest by matrix",
        "probe: N = 4, R = 2, T = 12",
        "seed: 3",
        "format: 1",
        f"size: {size:,} bytes",
    ):
        assert f"- {line}\n" in card.text


def test_text_that_is_there_stays_and_nothing_is_said_twice(model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My adapter\n\nMade with care.\n")
    model.save_pretrained(tmp_path)
    once = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == once
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data["license"] == "mit"
    assert "# My adapter\n\nMade with care." in card.text
    assert card.text.count("import peft_dowser") == 1


def test_a_local_base_is_not_told(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "secret" / "base")
    base = type(base).from_pretrained(tmp_path / "secret" / "base")
    get_peft_model(base, config(score="magnitude")).save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "secret" not in text
    assert "probe:" not in text


@pytest.mark.parametrize(
    "text",
    [
        b"---\nbase_model: someone/base\n---\n\n# My project, base_model: mine\n",
        b"---\nlibrary_name: peft\nbase_model: someone/base\n---\n\n# My adapters\n",
        "My r\u00e9sum\u00e9, base_model: mine".encode("latin-1"),
        b"---\nbase_model: [no: YAML: at all\n---\n",
    ],
)
def test_a_card_in_the_folder_above_stays(text: bytes, model: PeftModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "README.md").read_bytes() == text


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_code_of_the_card_loads_the_adapter(tmp_path: Path, task_type: str | None) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, config(score="magnitude", task_type=task_type)).save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("this repository, or its folder", str(tmp_path / "adapter")), names)
    assert isinstance(names["model"], PeftModel)


def test_a_config_alone_has_no_card(tmp_path: Path) -> None:
    config().save_pretrained(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
