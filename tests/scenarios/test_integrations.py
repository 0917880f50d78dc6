"""The plugins for other frameworks make the adapter that their settings say; where a framework is installed, it runs.

Without it, a stub stands in its place, with the names and signatures of axolotl 0.21.0, ms-swift 4.6.0 and
LLaMA-Factory 0.9.5.
"""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
from models import tiny_llama
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from peft_dowser import DowserConfig, DowserLayer

FOLDER = Path(__file__).parents[2] / "examples" / "integrations"
SETTINGS = {"update_ratio": 0.25, "score": "magnitude"}


def import_plugin(monkeypatch: pytest.MonkeyPatch, path: str, stubs: dict[str, dict]) -> ModuleType:
    """The plugin in `path`, imported while `stubs` (names by module) stand for the framework."""
    for module, names in stubs.items():
        stub = ModuleType(module)
        vars(stub).update(names)
        monkeypatch.setitem(sys.modules, module, stub)
    spec = importlib.util.spec_from_file_location(Path(path).stem, FOLDER / path)
    assert spec is not None and spec.loader is not None
    plugin = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, plugin)
    spec.loader.exec_module(plugin)
    return plugin


def layers(model: nn.Module) -> list[DowserLayer]:
    return [module for module in model.modules() if isinstance(module, DowserLayer)]


def check_new(model: PeftModel) -> None:
    config = model.peft_config["default"]
    assert isinstance(config, DowserConfig)
    assert (config.update_ratio, config.score, config.task_type) == (0.25, "magnitude", "CAUSAL_LM")
    assert len(layers(model)) == 14
    assert all(layer.values("default").requires_grad for layer in layers(model))


# axolotl


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class AxolotlConfig(dict):
    """As axolotl's DictDefault: what is missing is None."""

    def __getattr__(self, name: str) -> object:
        return self.get(name)


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("pydantic")
    base = {"AdapterCapabilities": AdapterCapabilities, "BasePlugin": object}
    stubs = {"axolotl": {}, "axolotl.integrations": {}, "axolotl.integrations.base": base}
    return import_plugin(monkeypatch, "axolotl/dowser_axolotl.py", stubs)


def test_axolotl_makes_and_loads_an_adapter(axolotl: ModuleType, tmp_path: Path) -> None:
    plugin = axolotl.DowserPlugin()
    assert [capability.name for capability in plugin.get_adapter_capabilities()] == ["dowser"]
    assert plugin.get_input_args() == "dowser_axolotl.DowserArgs"

    cfg = AxolotlConfig(adapter="dowser", dowser=SETTINGS)
    model, config = plugin.load_adapter(tiny_llama(), cfg)
    check_new(model)
    assert config is model.peft_config["default"]
    model.save_pretrained(tmp_path)

    cfg = AxolotlConfig(adapter="dowser", lora_model_dir=str(tmp_path))
    for inference in (False, True):
        loaded, config = plugin.load_adapter(tiny_llama(), cfg, inference=inference)
        assert config.update_ratio == 0.25
        assert all(layer.values("default").requires_grad is not inference for layer in layers(loaded))


def test_axolotl_asks_for_the_config_alone(axolotl: ModuleType) -> None:
    base = tiny_llama()
    cfg = AxolotlConfig(adapter="dowser", dowser=SETTINGS)
    model, config = axolotl.DowserPlugin().load_adapter(base, cfg, config_only=True)
    assert model is None and config.update_ratio == 0.25
    assert not layers(base)


def test_axolotl_keeps_other_adapters(axolotl: ModuleType) -> None:
    assert axolotl.DowserPlugin().load_adapter(tiny_llama(), AxolotlConfig(adapter="lora")) is None


def test_axolotl_does_not_merge_what_it_would_leave_out(axolotl: ModuleType) -> None:
    merge = {"adapter": "dowser", "merge_lora": True}
    with pytest.raises(ValueError, match="Set `merge_method: legacy` to merge a Dowser adapter"):
        axolotl.DowserArgs(**merge, merge_method="memory_efficient")
    axolotl.DowserArgs(**merge, merge_method="legacy")
    axolotl.DowserArgs(**merge | {"adapter": "lora"})


# ms-swift


@pytest.fixture
def tuners(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    tuners_map: dict[str, type] = {}
    names = {"PeftTuner": object, "tuners_map": tuners_map}
    import_plugin(monkeypatch, "ms_swift/dowser_swift.py", {"swift": {}, "swift.tuner_plugin": names})
    return tuners_map


def swift_arguments(**changes: object) -> SimpleNamespace:
    """swift's defaults, as they are after it has parsed them."""
    defaults = {"task_type": "causal_lm", "target_modules": ["all-linear"], "modules_to_save": []}
    return SimpleNamespace(**defaults | {"model_kwargs": {"dowser": SETTINGS}} | changes)


def test_swift_makes_an_adapter(tuners: dict[str, type]) -> None:
    assert list(tuners) == ["dowser"]
    check_new(tuners["dowser"].prepare_model(swift_arguments(), tiny_llama()))


def test_swift_says_what_is_adapted(tuners: dict[str, type]) -> None:
    arguments = swift_arguments(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = tuners["dowser"].prepare_model(arguments, tiny_llama())
    assert len(layers(model)) == 2
    assert model.peft_config["default"].modules_to_save == ["lm_head"]


# LLaMA-Factory


class PeftPlugin:
    """As LLaMA-Factory's: a name, and the function that was registered for it."""

    registry: ClassVar[dict[str, Callable]] = {}

    def __init__(self, name: str) -> None:
        self.name = name

    def register(self):
        return lambda function: self.registry.setdefault(self.name, function)


def test_llama_factory_makes_and_loads_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    monkeypatch.setattr(PeftPlugin, "registry", {})
    packages = "llamafactory", "llamafactory.v1", "llamafactory.v1.plugins", "llamafactory.v1.plugins.model_plugins"
    stubs = {
        **{name: {} for name in packages},
        "llamafactory.v1.launcher": {"main": None},
        "llamafactory.v1.plugins.model_plugins.peft": {
            "PeftPlugin": PeftPlugin,
            "load_adapter": lambda model, folder, is_train: loads.append((folder, is_train)) or model,
        },
    }
    import_plugin(monkeypatch, "llama_factory/dowser_llama_factory.py", stubs)
    adapt = PeftPlugin.registry["dowser"]

    settings = {"name": "dowser"} | SETTINGS
    check_new(adapt(tiny_llama(), settings, True))
    assert settings == {"name": "dowser"} | SETTINGS
    adapt(tiny_llama(), settings | {"adapter_name_or_path": "there"}, False)
    assert loads == [("there", False)]


# The frameworks themselves


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of examples/integrations with the small model and its data."""
    shutil.copytree(FOLDER, tmp_path / "integrations")
    monkeypatch.chdir(tmp_path / "integrations")
    names = runpy.run_path(str(FOLDER / "tiny_model.py"))
    names["write_model"](Path("tiny/model"))
    names["write_data"](Path("tiny/data.jsonl"))
    return tmp_path / "integrations"


def start(*command: str) -> None:
    path = os.pathsep.join([str(FOLDER.parents[1]), "axolotl"])
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    program = str(Path(sys.executable).parent / command[0])
    run = subprocess.run([program, *command[1:]], env=os.environ | offline, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def check_trained(folder: Path) -> None:
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "DOWSER"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny/model"), folder)
    assert len(layers(model)) == 14
    assert all(layer.values("default").any() for layer in layers(model))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("axolotl") is None, reason="needs axolotl")
def test_axolotl_trains(workplace: Path) -> None:
    start("axolotl", "train", "axolotl/train.yaml", "--launcher", "python")
    check_trained(workplace / "tiny" / "axolotl")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("swift") is None, reason="needs ms-swift")
def test_swift_trains(workplace: Path) -> None:
    start("swift", "sft", "ms_swift/train.yaml")
    (folder,) = (workplace / "tiny" / "ms_swift").rglob("checkpoint-4")
    check_trained(folder)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llamafactory") is None, reason="needs LLaMA-Factory")
def test_llama_factory_trains(workplace: Path) -> None:
    start("python", "llama_factory/dowser_llama_factory.py", "sft", "llama_factory/train.yaml")
    check_trained(workplace / "tiny" / "llama_factory")
