"""Every task that PEFT knows, on every kind of head that transformers has: made, trained, saved, loaded and merged."""

from pathlib import Path

import pytest
import torch
import transformers
from cases import GRANULARITIES, pairwise
from models import assert_as_merged, config
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from peft_dowser import DowserConfig, DowserLayer, merge, verify
from peft_dowser.delta.layout import Granularity

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
CONFIGS = {
    "Bert": transformers.BertConfig(**SIZES, num_labels=2),
    "BertLMHead": transformers.BertConfig(**SIZES, is_decoder=True),
    "Roberta": transformers.RobertaConfig(**SIZES, num_labels=2),
    "DistilBert": transformers.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=96),
    "Llama": transformers.LlamaConfig(**SIZES, num_labels=2, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "GPT2": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=96, num_labels=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "T5": transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=96, num_labels=2, decoder_start_token_id=0
    ),
}
HEADS = {
    "Bert": ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
    "BertLMHead": ["Model"],
    "Roberta": ["ForSequenceClassification", "ForMultipleChoice"],  # the first has a head of several modules
    "DistilBert": ["ForSequenceClassification", "ForMultipleChoice"],  # have a `pre_classifier` besides
    "Llama": ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
    "GPT2": ["LMHeadModel", "ForTokenClassification"],
    "T5": ["Model", "EncoderModel", "ForConditionalGeneration", "ForSequenceClassification", "ForTokenClassification"],
}
MODELS = {f"{family}{head}": CONFIGS[family] for family, heads in HEADS.items() for head in heads}
# What PEFT trains as a whole, by task: whatever has one of these names.
WHOLE = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
TASKS = [*(task.value for task in TaskType), None]
# The first 14 ids, and the end of the text that some heads look for.
IDS = torch.cat([torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0)), torch.ones(2, 1)], 1).long()


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, name)(MODELS[name]).eval()


def run(model: nn.Module, name: str) -> Tensor:
    inputs = {"input_ids": IDS[None] if name.endswith("MultipleChoice") else IDS}
    if name in ("T5Model", "T5ForConditionalGeneration"):
        inputs["decoder_input_ids"] = IDS
    return model(**inputs)[0]


def train(model: PeftModel, name: str) -> None:
    """One step whose gradient is that of a random projection of the output."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = run(model, name)
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    optimizer.step()


def generates(name: str) -> bool:
    return hasattr(getattr(transformers, name), "prepare_inputs_for_generation")


# Every pair of family, head, task, targets and granularity runs always.
CASES = [
    (family, head, task, targets, granularity)
    for family, heads in HEADS.items()
    for head in heads
    for task in TASKS
    for targets in (None, "all-linear")
    if generates(family + head) or task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    if targets is None or task in WHOLE
    for granularity in GRANULARITIES
]


@pytest.mark.parametrize(("family", "head", "task", "targets", "granularity"), pairwise(CASES))
@torch.no_grad()
def test_a_task_with_a_head_goes_the_whole_way(
    family: str, head: str, task: str | None, targets: str | None, granularity: Granularity, tmp_path: Path
) -> None:
    name = family + head
    given = config(task_type=task, score="magnitude", target_modules=targets, granularity=granularity)
    before = run(built(name), name)
    model = get_peft_model(built(name), given).eval()
    assert model.peft_config["default"] is given
    with torch.enable_grad():
        train(model, name)
    expected = run(model, name)
    assert not torch.equal(expected, before)
    heads = [n for n, _ in built(name).named_modules() if n.endswith(WHOLE.get(task or "", ("no such head",)))]
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    assert all(any(n.startswith(f"{head}.modules_to_save.default.") for n in trained) for head in heads)
    assert all(".dowser_values.default." in n or n.startswith(tuple(heads)) for n in trained)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(built(name), tmp_path / "adapter").eval()
    assert torch.equal(run(loaded, name), expected)
    loaded.save_pretrained(tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()
    built(name).save_pretrained(tmp_path / "base")
    assert verify(tmp_path / "adapter", tmp_path / "base") == []
    merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    merged = getattr(transformers, name).from_pretrained(tmp_path / "merged").eval()
    assert_as_merged(expected, run(merged, name), granularity)
    assert torch.equal(run(model.merge_and_unload(), name), run(merged, name))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("name", [name for name in MODELS if not generates(name)])
def test_a_task_that_a_model_cannot_do_is_refused_before_the_probe(
    name: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_dowser.tuner.injection.probe_targets", lambda *args: pytest.fail("probed"))
    base = built(name)
    modules = ["query", "q_proj", "q", "c_attn", "q_lin"]
    lora = LoraConfig(task_type=task, target_modules=modules, fan_in_fan_out=name.startswith("GPT2"))
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):  # what LoRA's users get
        get_peft_model(built(name), lora)
    with pytest.raises(ValueError, match=f"task_type='{task}' is for models that write text, and {name} does not"):
        get_peft_model(base, config(task_type=task))
    assert not any(isinstance(module, DowserLayer) for module in base.modules())
    inject_adapter_in_model(config(task_type=task, score="random"), base)  # no PeftModel, so nobody generates


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("fault", ["both", "tokens", "interrupt"])
def test_nothing_is_left_where_get_peft_model_raises(
    fault: str, task: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that is a target and trains as a whole, tokens of no embedding, and Ctrl-C between two layers."""
    base = built("LlamaForCausalLM")
    before = {name: (type(module), id(module)) for name, module in base.named_modules()}
    trainable = [parameter.requires_grad for parameter in base.parameters()]
    wrong = {"both": {"modules_to_save": ["_proj"]}, "tokens": {"trainable_token_indices": {"nope": [1]}}}
    given = config(task_type=task, score="random", **wrong.get(fault, {}))
    settings = given.to_dict()
    if fault == "interrupt":
        add, calls = DowserLayer.add_positions, []

        def interrupted(self, *args) -> None:
            calls.append(self)
            if len(calls) == 3:
                raise KeyboardInterrupt
            add(self, *args)

        monkeypatch.setattr(DowserLayer, "add_positions", interrupted)
    with pytest.raises((TypeError, ValueError, KeyboardInterrupt)):
        get_peft_model(base, given)
    assert {name: (type(module), id(module)) for name, module in base.named_modules()} == before
    assert [parameter.requires_grad for parameter in base.parameters()] == trainable
    assert not hasattr(base, "peft_config")
    filled = {"modules_to_save": given.modules_to_save, "base_model_name_or_path": given.base_model_name_or_path}
    assert given.to_dict() == settings | filled  # what PEFT fills in first


@pytest.mark.parametrize("task", TASKS)
def test_the_config_of_a_model_is_the_object_that_was_given(task: str | None, tmp_path: Path) -> None:
    """As with LoRA, where PEFT reads and fills it afterwards."""
    for kind in (LoraConfig, DowserConfig):
        name = "LlamaForCausalLM" if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else "LlamaForTokenClassification"
        first, second = (kind(task_type=task, target_modules=["q_proj"]) for _ in range(2))
        for given in (first, second):
            if isinstance(given, DowserConfig):
                given.score = "random"
        model = get_peft_model(built(name), first)
        model.add_adapter("other", second)
        assert model.peft_config["default"] is first and model.peft_config["other"] is second
        injected = kind(target_modules=["q_proj"], **({"score": "random"} if kind is DowserConfig else {}))
        assert inject_adapter_in_model(injected, built(name)).peft_config["default"] is injected
