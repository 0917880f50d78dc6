"""What PEFT and transformers do not promise to keep: each name is there, and is called as it was when it was seen."""

import ast
import importlib.metadata
import inspect
import pkgutil
import sys
from pathlib import Path
from typing import Any

import peft
import peft.utils
import pytest
import torch
import transformers
from models import tiny_llama
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import peft_dowser
from peft_dowser import DowserLayer, DowserModel

SEEN = {"peft": "0.21.2", "transformers": "5.24.0"}
OWN = {"peft": "_peft", "transformers": "_transformers"}
TUNERS, OTHER, QUANTIZATION = "peft.tuners.tuners_utils", "peft.utils.other", "peft.utils.quantization_utils"
LOADING = "transformers.core_model_loading"
# The parameters that are passed, in order; those after "*" are passed by name.
FUNCTIONS = {
    f"{TUNERS}:_maybe_include_all_linear_layers": "peft_config model",
    f"{TUNERS}:check_adapters_to_merge": "module adapter_names",
    f"{TUNERS}:check_target_module_exists": "config key",
    f"{OTHER}:_get_submodules": "model key",
    f"{OTHER}:_set_adapter": "model adapter_name",
    f"{OTHER}:get_pattern_key": "pattern_keys key_to_match",
    f"{OTHER}:AuxiliaryTrainingWrapper.adapter_state_dict_load_map": "self adapter_name",
    f"{OTHER}:AuxiliaryTrainingWrapper.delete_adapter": "self adapter_name new_active_adapters",
    f"{QUANTIZATION}:get_quantization_kwargs": "model",
    f"{QUANTIZATION}:resolve_quantization_backend": "base_layer * get_apply_tensor_subclass",
    f"{QUANTIZATION}:QuantizationBackend.get_base_weight": "self base_layer",
    f"{QUANTIZATION}:QuantizationBackend.set_base_weight": "self peft_layer weight_data",
    "peft.utils:register_peft_method": "* name config_cls model_cls",
    "transformers.utils.hub:PushToHubMixin._upload_modified_files": "self working_dir repo_id * files_timestamps",
    "transformers.utils.hub:convert_file_size_to_int": "size",
    "transformers.conversion_mapping:get_model_conversion_mapping": "model",
    f"{LOADING}:dot_natural_key": "s",
    f"{LOADING}:rename_source_key": ("source_key weight_renamings weight_converters base_model_prefix meta_state_dict"),
    "transformers.initialization:no_init_weights": "",
    "transformers.integrations.fsdp:is_fsdp_enabled": "",
    "transformers:PreTrainedModel._from_config": "config * dtype",
    "transformers:PreTrainedModel.get_expanded_tied_weights_keys": "self * all_submodels",
}
NAMES = [
    "peft:PeftModel._enable_peft_forward_hooks",  # calls that of the tuner, where it has one
    "peft.mapping:PEFT_TYPE_TO_CONFIG_MAPPING",
    "peft.mapping:PEFT_TYPE_TO_PREFIX_MAPPING",
    "peft.mapping:PEFT_TYPE_TO_TUNER_MAPPING",
    f"{QUANTIZATION}:QuantizationBackend.backend_name",
    f"{QUANTIZATION}:QuantizationBackend.supports_merge",
    f"{TUNERS}:BaseTunerLayer._disable_adapters",
    f"{LOADING}:WeightRenaming",
    "transformers:PreTrainedModel._hf_peft_config_loaded",
    "transformers.models.falcon.modeling_falcon:FalconLinear",
    "transformers.models.bart.modeling_bart:BartScaledWordEmbedding",
    "transformers.models.gemma3.modeling_gemma3:Gemma3TextScaledWordEmbedding",
]
# Methods of PEFT's that the package overrides; PEFT calls them with its own parameters.
OVERRIDDEN = [
    (DowserModel, BaseTuner, "_add_modules_to_save_to_tie"),
    (DowserModel, BaseTuner, "_add_targets_to_tie"),
    (DowserModel, BaseTuner, "_cast_adapter_dtype"),
    (DowserModel, BaseTuner, "_check_target_module_exists"),
    (DowserModel, BaseTuner, "_check_tied_modules"),
    (DowserModel, BaseTuner, "_create_and_replace"),
    (DowserModel, BaseTuner, "_get_adapter_state_dict"),
    (DowserModel, BaseTuner, "_get_tied_target_modules"),
    (DowserModel, BaseTuner, "_inject_parameters"),
    (DowserModel, BaseTuner, "_prepare_adapter_config"),
    (DowserModel, BaseTuner, "_prepare_model"),
    (DowserModel, BaseTuner, "_remap_adapter_state_dict_for_load"),
    (DowserModel, BaseTuner, "_replace_module"),
    (DowserModel, BaseTuner, "_unload_and_optionally_merge"),
    (DowserLayer, BaseTunerLayer, "_move_adapter_to_device_of_base_layer"),
]


def moved(path: str) -> str:
    library = path.partition(":")[0].partition(".")[0]
    return (
        f"{path} has moved: it was seen in {library} {SEEN[library]}, and here is "
        f"{importlib.metadata.version(library)}. Change peft_dowser/{OWN[library]}.py."
    )


def found(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        pytest.fail(moved(path))


def check_call(path: str, parameters: str) -> None:
    """Fail where a function cannot be called as it is, or would take an argument for another."""
    signature = inspect.signature(found(path))
    ordered, _, named = parameters.partition("*")
    names = ordered.split()
    if list(signature.parameters)[: len(names)] != names:
        pytest.fail(moved(path))
    try:
        signature.bind(*names, **dict.fromkeys(named.split()))
    except TypeError:
        pytest.fail(moved(path))


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_function_is_called_as_it_was(path: str) -> None:
    check_call(path, FUNCTIONS[path])


@pytest.mark.parametrize("path", NAMES)
def test_a_name_is_where_it_was(path: str) -> None:
    found(path)


@pytest.mark.parametrize(("ours", "theirs", "name"), OVERRIDDEN)
def test_an_overridden_method_has_the_parameters_that_peft_gives_it(ours: type, theirs: type, name: str) -> None:
    path = f"{TUNERS}:{theirs.__name__}.{name}"
    expected, own = (list(inspect.signature(method).parameters) for method in (found(path), getattr(ours, name)))
    assert own == expected, moved(path)


def test_every_private_method_that_is_overridden_is_compared() -> None:
    overridden = {
        (ours, name)
        for ours, theirs in ((DowserModel, BaseTuner), (DowserLayer, BaseTunerLayer))
        for name in vars(ours).keys() & set(dir(theirs))
        if name.startswith("_") and not name.startswith("__") and name != "_abc_impl"
    }
    assert overridden == {(ours, name) for ours, _, name in OVERRIDDEN}


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        (f"{OTHER}:_gone", "model"),
        (f"{OTHER}:_get_submodules", "key model"),
        (f"{OTHER}:_get_submodules", "model"),
        (f"{OTHER}:_get_submodules", "model key * safe"),
    ],
)
def test_what_has_moved_is_named(path: str, parameters: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=f"{path} has moved: it was seen in peft 0.21.2, and here is "):
        check_call(path, parameters)


# Attributes of instances


def test_a_wrapper_knows_its_adapters() -> None:
    wrapper = ModulesToSaveWrapper(nn.Linear(2, 2), "one")
    assert set(wrapper._adapters) == {"one"}, moved(f"{OTHER}:AuxiliaryTrainingWrapper._adapters")
    assert wrapper._disable_adapters is False, moved(f"{OTHER}:AuxiliaryTrainingWrapper._disable_adapters")
    assert wrapper.original_module.weight.shape == (2, 2)


def test_peft_reads_what_the_config_says_of_modules_to_tie() -> None:
    assert '"modules_to_tie"' in inspect.getsource(peft.utils.other), moved(f"{OTHER}:modules_to_tie")


def test_a_model_knows_its_ties() -> None:
    assert tiny_llama().all_tied_weights_keys == {}, moved("transformers:PreTrainedModel.all_tied_weights_keys")


def test_transformers_marks_experts_and_chooses_how_they_compute() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_hidden_layers=1, num_local_experts=2, **sizes))
    experts = model.model.layers[0].mlp.experts
    path = "transformers.integrations.moe:use_experts_implementation"
    assert experts.is_transposed is False, moved(path)
    model.set_experts_implementation("batched_mm")
    assert experts.config._experts_implementation == "batched_mm", moved(path)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager", moved("transformers:PreTrainedModel.set_attn_implementation")
    assert callable(torch.ops.transformers.grouped_mm_fallback), moved("transformers.integrations.moe")


def test_conversions_say_what_they_stack() -> None:
    transforms = found("transformers.conversion_mapping:get_model_conversion_mapping")(_mixtral_on_meta())
    (stack,) = [each for each in transforms if len(getattr(each, "operations", ())) == 2]
    kinds = [(type(operation).__name__, operation.dim) for operation in stack.operations]
    assert kinds == [("MergeModulelist", 0), ("Concatenate", 1)], moved(f"{LOADING}:WeightConverter.operations")
    assert len(stack.source_patterns) == 2, moved(f"{LOADING}:WeightConverter.source_patterns")


def _mixtral_on_meta() -> PreTrainedModel:
    with torch.device("meta"):
        return MixtralForCausalLM(MixtralConfig(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "LlamaForCausalLM"),
        ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "T5ForConditionalGeneration"),
    ],
)
def test_the_task_of_a_class_is_known(name: str, known: str) -> None:
    path = f"transformers.models.auto.modeling_auto:{name}"
    assert known in found(path).values(), moved(path)


# Where they are used

FOLDER = Path(peft_dowser.__file__).parent
SOURCES = {
    str(path.relative_to(FOLDER)): ast.parse(path.read_text())
    for path in FOLDER.rglob("*.py")
    if path.stem not in OWN.values()
}
PUBLIC = {
    "peft": set(peft.__all__),
    "peft.tuners.tuners_utils": {"BaseTuner", "BaseTunerLayer"},  # documented for methods of one's own
    "peft.utils": {name for name in peft.utils.__all__ if not name.startswith("_")},
    "transformers": {name for name in transformers.__all__ if not name.startswith("_")},
    "transformers.utils.logging": set(vars(sys.modules["transformers.utils.logging"])),
}
ATTRIBUTES = {
    "_adapters",
    "_attn_implementation",
    "_disable_adapters",
    "_experts_implementation",
    "_from_config",
    "_hf_peft_config_loaded",
    "_member_map_",
    "_upload_modified_files",
    "adapter_state_dict_load_map",
    "all_tied_weights_keys",
    "FalconLinear",
    "get_expanded_tied_weights_keys",
    "is_transposed",
    "ScaledWordEmbedding",
}


def private_imports(source: ast.AST) -> list[str]:
    """What a module imports from PEFT or transformers that is not public."""
    private = []
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            private += [each.name for each in node.names if each.name.partition(".")[0] in OWN and "." in each.name]
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] in OWN:
            module = node.module or ""
            private += [f"{module}.{each.name}" for each in node.names if each.name not in PUBLIC.get(module, set())]
    return private


def private_attributes(source: ast.AST) -> set[str]:
    """The private attributes and class names, of those above, that a module names."""
    attributes = {node.attr for node in ast.walk(source) if isinstance(node, ast.Attribute)}
    constants = {node.value for node in ast.walk(source) if isinstance(node, ast.Constant)}
    return (attributes | constants) & ATTRIBUTES


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_private_names_are_used_in_two_modules_only(name: str) -> None:
    assert private_imports(SOURCES[name]) == []
    assert private_attributes(SOURCES[name]) == set()


@pytest.mark.parametrize(
    "line",
    [
        "from peft.utils.other import get_pattern_key",
        "from peft.utils import _get_submodules",
        "from peft import mapping",
        "import peft.utils.other",
        "from transformers.core_model_loading import Concatenate",
        "def f():\n    from transformers.initialization import no_init_weights",
        "wrapper._adapters",
        "getattr(config, '_experts_implementation', None)",
    ],
)
def test_a_private_name_elsewhere_would_be_found(line: str) -> None:
    source = ast.parse(line)
    assert private_imports(source) or private_attributes(source)
