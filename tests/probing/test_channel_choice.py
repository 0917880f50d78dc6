"""Which input channels train: against the mean of the scores over each column, for every way to choose."""

import hashlib
import itertools
import math
import re

import pytest
import torch
from cases import pairwise
from models import config, gpt2, tiny_llama, tiny_moe
from peft import get_peft_model
from torch import Tensor, nn

from peft_dowser import DowserConfig, ProbeStatistics, probe
from peft_dowser.config import PROBED_SCORES
from peft_dowser.layers.layer import dowser_layers

SCORES = ["dowser", "random", "magnitude", "wanda", "gradient"]
BASES = {"llama": tiny_llama, "gpt2": gpt2}
PATTERNS = {"one ratio": {}, "pattern": {"o_proj": 0.4, "up_proj": 0, "c_attn": 0.4, "mlp.c_proj": 0}}
AMOUNTS = {"ratio": {"update_ratio": 0.2}, "channels": {"channels": 5}}

pytestmark = pytest.mark.filterwarnings(
    r"ignore:\d+ of the target modules stay frozen", "ignore:ratio_pattern has keys that match none"
)


def score_of(name: str, weight: Tensor, module: str, given: ProbeStatistics | None, seed: int) -> Tensor:
    """The score of each weight of an (out, in) matrix, in float64."""
    if name == "random":
        digest = hashlib.sha256(repr((seed, "score", module)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(weight.shape, generator=generator).double()
    if name == "magnitude":
        return weight.double().abs()
    assert given is not None
    found = given.modules[module]
    if name == "dowser":
        return weight.double().abs() * (found.sensitivity.double().T @ found.activity.double()) / len(found.activity)
    if name == "wanda":
        return weight.double().abs() * found.energy.double().sqrt()
    assert found.gradient is not None
    return found.gradient.double().abs()


def matrices_of(base: nn.Module, last_layers: int | None) -> dict[str, Tensor]:
    """The default targets as (out, in) matrices, in the order of the model."""
    found = {}
    for name, module in base.named_modules():
        in_layer = any(f".{number}." in name for number in ([1] if last_layers else [0, 1]))
        if in_layer and type(module).__name__ in ("Linear", "Conv1D"):
            weight = module.weight.detach()
            found[name] = weight.T if type(module).__name__ == "Conv1D" else weight
    return found


def expected_channels(base: nn.Module, chosen: DowserConfig, given: ProbeStatistics | None) -> dict[str, list[int]]:
    """The chosen channels by module, by sorting the means of all columns of a scope."""
    groups: dict[str, list[tuple[float, str, int]]] = {}
    shares: dict[str, list[float]] = {}
    for module, weight in matrices_of(base, chosen.last_layers).items():
        ratio = next((value for end, value in chosen.ratio_pattern.items() if module.endswith(end)), None)
        if ratio == 0:
            continue
        layer = re.split(r"\.(?:mlp|self_attn|attn)\.", module)[0]
        group = {"matrix": module, "layer": layer, "model": ""}[chosen.scope]
        score = score_of(chosen.score, weight, module, given, chosen.seed)
        columns = [sum(score[:, channel].tolist()) / len(score) for channel in range(score.shape[1])]
        groups.setdefault(group, []).extend((mean, module, channel) for channel, mean in enumerate(columns))
        share = ratio if ratio is not None else chosen.update_ratio
        is_rank = ratio is None and chosen.channels is not None
        shares.setdefault(group, []).append(chosen.channels if is_rank else share * score.shape[1])
    found: dict[str, list[int]] = {}
    for group, ranked in groups.items():
        ranked = sorted(ranked, key=lambda entry: entry[0], reverse=chosen.select == "high")
        for _, module, channel in ranked[: round(sum(shares[group]))]:
            found.setdefault(module, []).append(channel)
    return {module: sorted(channels) for module, channels in found.items()}


CASES = list(
    itertools.product(
        BASES, SCORES, ["matrix", "layer", "model"], ["low", "high"], PATTERNS, AMOUNTS, [None, 1], [0, 3]
    )
)


@pytest.mark.parametrize(
    ("base", "score", "scope", "select", "pattern", "amount", "last_layers", "seed"), pairwise(CASES)
)
def test_the_channels_with_the_lowest_mean_score_train(
    base: str, score: str, scope: str, select: str, pattern: str, amount: str, last_layers: int | None, seed: int
) -> None:
    ratios = {
        key: value
        for key, value in PATTERNS[pattern].items()
        if (base == "gpt2") == key.split(".")[-1].startswith("c_")
    }
    chosen = config(
        granularity="input_channel", score=score, scope=scope, select=select, seed=seed, last_layers=last_layers,
        ratio_pattern=ratios, **AMOUNTS[amount],
    )  # fmt: skip
    given = probe(BASES[base](), chosen) if score in PROBED_SCORES else None
    expected = expected_channels(BASES[base](), chosen, given)
    model = get_peft_model(BASES[base](), chosen)
    found = {layer.module_name: layer.index("default").decoded() for layer in dowser_layers(model)}
    assert {module: channels.tolist() for module, channels in found.items()} == expected
    assert all(channels.dtype == torch.int32 for channels in found.values())
    shapes = {module: weight.shape for module, weight in matrices_of(BASES[base](), last_layers).items()}
    for layer in dowser_layers(model):
        assert layer.values("default").shape == (shapes[layer.module_name][0], len(expected[layer.module_name]))
    counts = {module: len(channels) * shapes[module][0] for module, channels in expected.items()}
    assert model.peft_config["default"].saved_nnz == counts
    assert model.peft_config["default"].to_dict()["nnz_pattern"] == counts


@pytest.mark.parametrize("ratio", [0.1, 0.046875, 0.078125, 1.0])
def test_a_ratio_is_rounded_to_a_number_of_channels_as_a_number_of_weights_is(ratio: float) -> None:
    """Of 32 and 64: halves go to the even number, so 0.046875 x 32 = 1.5 gives 2, 0.078125 x 32 = 2.5 gives 2."""
    model = get_peft_model(tiny_llama(), config(granularity="input_channel", score="random", update_ratio=ratio))
    for layer in dowser_layers(model):
        inputs = 64 if layer.module_name.endswith("down_proj") else 32
        assert layer.index("default").count == round(ratio * inputs)


@pytest.mark.parametrize("score", ["random", "dowser"])
def test_one_seed_gives_one_choice_and_another_seed_another(score: str) -> None:
    def channels(seed: int) -> list[list[int]]:
        model = get_peft_model(tiny_llama(), config(granularity="input_channel", score=score, seed=seed, channels=8))
        return [layer.index("default").decoded().tolist() for layer in dowser_layers(model)]

    torch.manual_seed(1)
    first = channels(0)
    torch.manual_seed(2)
    assert channels(0) == first
    assert channels(1) != first


def test_sums_over_long_columns_are_exact_enough_for_close_scores() -> None:
    """In float32, a mean over 100,000 weights is off by more than these two columns differ."""
    layer = nn.Linear(2, 100_000, bias=False)
    layer.weight.data.fill_(0.1)
    layer.weight.data[:50, 0] += 2e-3
    chosen = config(
        granularity="input_channel", score="magnitude", channels=1, target_modules=["0"], task_type=None
    )  # fmt: skip
    model = get_peft_model(nn.Sequential(layer), chosen)
    assert dowser_layers(model)[0].index("default").decoded().tolist() == [1]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_matrix_that_cannot_be_ranked_stays_frozen(broken: float) -> None:
    base = tiny_llama()
    base.model.layers[0].mlp.up_proj.weight.data[3, 4] = broken
    base.model.layers[1].mlp.up_proj.weight.data.fill_(0.5)
    with pytest.warns(
        UserWarning, match=r"2 of the target modules stay frozen: model\.layers\.0.*scores are not finite"
    ):
        model = get_peft_model(base, config(granularity="input_channel", score="magnitude"))
    assert len(dowser_layers(model)) == 12


def test_a_ratio_below_half_a_channel_is_named() -> None:
    given = {"granularity": "input_channel", "score": "random"}
    with pytest.raises(ValueError, match=r"update ratio 0\.005 selects none of its input channels"):
        get_peft_model(tiny_llama(), config(**given, update_ratio=0.005))
    with pytest.warns(UserWarning, match=r"up_proj \(update ratio 0.01 selects none of its input channels\)"):
        model = get_peft_model(tiny_llama(), config(**given, ratio_pattern={"up_proj": 0.01}))
    assert len(dowser_layers(model)) == 12


# What has no input channels, or not so many


def unchanged(base: nn.Module, before: dict[str, Tensor], modules: list[type]) -> bool:
    now = base.state_dict()
    same = now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())
    return same and [type(module) for module in base.modules()] == modules


def refused(base: nn.Module, message: str, **given) -> None:
    """The adapter is refused, and the base is what it was."""
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    modules = [type(module) for module in base.modules()]
    trainable = [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**{"granularity": "input_channel", "score": "random"} | given))
    assert unchanged(base, before, modules)
    assert [parameter.requires_grad for parameter in base.parameters()] == trainable


def test_more_channels_than_a_module_has_are_refused_by_name() -> None:
    refused(
        tiny_llama(),
        r"^channels=33, but module 'model\.layers\.0\.self_attn\.q_proj' has only 32 input channels\. Use fewer, or "
        r"give the module a ratio of its own in ratio_pattern\.$",
        channels=33,
    )
    ratios = {"[qkvo]_proj": 1.0, "gate_proj": 0.5, "up_proj": 0}
    chosen = config(granularity="input_channel", score="random", channels=64, ratio_pattern=ratios)
    model = get_peft_model(tiny_llama(), chosen)
    counts = {layer.module_name.split(".")[-1]: layer.index("default").count for layer in dowser_layers(model)}
    assert counts == dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], 32) | {"gate_proj": 16, "down_proj": 64}


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_more_channels_than_a_module_has_are_refused_in_a_joint_ranking_too(scope: str) -> None:
    refused(
        tiny_llama(), "channels=33, but module 'model.layers.0.self_attn.q_proj' has only 32", channels=33, scope=scope
    )


@pytest.mark.parametrize(
    ("base", "given", "what"),
    [
        (
            tiny_llama,
            {"target_modules": ["q_proj", "embed_tokens"]},
            "'model.embed_tokens' is an embedding, whose inputs",
        ),
        (
            lambda: tiny_llama(tied=True),
            {"target_modules": ["lm_head"], "ensure_weight_tying": True},
            ".* is (shared with )?an embedding, whose inputs",
        ),
        (gpt2, {"target_modules": ["wte"], "ensure_weight_tying": True}, "'transformer.wte' is an embedding, whose"),
        (
            lambda: tiny_moe("qwen3_moe"),
            {"target_parameters": ["mlp.experts.down_proj"]},
            r"'model.layers.0.mlp.experts.down_proj' holds the matrices of experts",
        ),
    ],
)
def test_targets_without_input_channels_are_refused_with_advice(base, given: dict, what: str) -> None:
    message = (
        f"granularity='input_channel': target {what}.*, so it has no input channels to choose. Take it out of "
        "target_modules and target_parameters, or train single weights of it with granularity='weight'"
    )
    refused(base(), message, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"scope": "row"},
            "scope='row' ranks the weights of each row, and granularity='input_channel' has none to rank",
        ),
        ({"channels": 0}, "channels must be an integer of at least 1, got 0"),
        ({"channels": -3}, "channels must be an integer of at least 1, got -3"),
        ({"channels": 2.5}, "channels must be an integer of at least 1, got 2.5"),
        ({"channels": True}, "channels must be an integer of at least 1, got True"),
        ({"channels": "16"}, "channels must be an integer of at least 1, got '16'"),
        ({"granularity": "column"}, "granularity must be one of weight, input_channel, got 'column'"),
        (
            {"granularity": "weight", "channels": 16},
            "channels=16 needs granularity='input_channel'; for single weights",
        ),
        ({"granularity": None}, "granularity must be one of"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**{"granularity": "input_channel"} | given)
