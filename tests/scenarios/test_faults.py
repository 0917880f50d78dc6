"""Whatever interrupts a save, a probe, an injection, a load or a merge: the old file and the old model are whole."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import peft.peft_model
import pytest
import torch
from bad_files import CONFIG, FILE, Before, Small, X, load, saved_small
from models import assert_same_bits, base_bits, config, set_values, tiny_llama
from peft import PeftModel, get_peft_model

import peft_dowser
from peft_dowser import DowserLayer, Patch, hotswap, probe, verify
from peft_dowser.delta import apply
from peft_dowser.layers.layer import dowser_layers
from peft_dowser.probing import selection
from peft_dowser.tuner import injection, writing

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
FAULTS = [KeyboardInterrupt, torch.OutOfMemoryError("no memory"), OSError(28, "No space left on device")]


def failing(function, after: int, fault):
    """The function, whose call number `after` fails."""
    calls = []

    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise fault
        return function(*args, **kwargs)

    return called


# Saving


@pytest.mark.parametrize("step", ["safe_save_file", "rename", "config"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: getattr(fault, "__name__", type(fault).__name__))
def test_a_failed_save_leaves_an_adapter_that_loads(
    step: str, fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_small(tmp_path)
    model = load(Small(), tmp_path)
    before, expected = (tmp_path / FILE).read_bytes(), model(X)
    set_values(model, seed=9)
    changed = model(X)
    if step == "safe_save_file":
        monkeypatch.setattr(peft.peft_model, "safe_save_file", failing(None, 1, fault))
    elif step == "rename":
        (tmp_path / "elsewhere").mkdir()
        original = peft.peft_model.safe_save_file

        def to_full_disk(tensors, path, metadata):
            original(tensors, tmp_path / "elsewhere" / FILE, metadata)
            raise fault

        monkeypatch.setattr(peft.peft_model, "safe_save_file", to_full_disk)
    else:
        monkeypatch.setattr(type(model.peft_config["default"]), "save_pretrained", failing(None, 1, fault))
    with pytest.raises(BaseException) as caught:
        model.save_pretrained(tmp_path)
    assert caught.value is fault or caught.type is fault
    monkeypatch.undo()
    whole = load(Small(), tmp_path)
    if step == "config":  # the tensors are the new ones, and the old config fits them
        assert torch.equal(whole(X), changed)
    else:
        assert (tmp_path / FILE).read_bytes() == before
        assert torch.equal(whole(X), expected)
    assert torch.equal(model(X), changed)


def test_saving_over_the_folder_it_was_loaded_from_works(tmp_path: Path) -> None:
    saved_small(tmp_path)
    model = load(Small(), tmp_path)
    set_values(model, seed=4)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(Small(), tmp_path)(X), model(X))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        saved_small(tmp_path)
        model = load(Small(), tmp_path)
        expected = model(X)
        used = sum(4096 * -(-path.stat().st_size // 4096) for path in tmp_path.iterdir())
        (tmp_path / "filler").write_bytes(b"\0" * (64 * 1024 - used))
        with pytest.raises(Exception, match="No space left"):
            model.save_pretrained(tmp_path)
        (tmp_path / "filler").unlink()
        assert torch.equal(load(Small(), tmp_path)(X), expected)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_killed_save_leaves_an_adapter(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from bad_files import *
folder = Path({str(tmp_path)!r})
saved_small(folder)
model = load(Small(), folder)
print("ready", flush=True)
for seed in range(10**6):
    set_values(model, seed=seed)
    model.save_pretrained(folder)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    child.stdout.readline()
    time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert bool(load(Small(), tmp_path)(X).isfinite().all())


# Probing and injecting


@pytest.mark.parametrize("fault", [KeyboardInterrupt, torch.OutOfMemoryError("no memory")], ids=["interrupt", "memory"])
@pytest.mark.parametrize("after", [1, 2, 9, 40])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_probe_that_is_cut_short_leaves_the_model(fault, after: int, where: str) -> None:
    base = tiny_llama()
    untouched = Before(base)
    state = torch.get_rng_state()
    layer = base.model.layers[1].mlp.down_proj
    original = layer.forward
    if where == "forward":
        layer.forward = failing(original, after, fault)
    else:
        fail = failing(lambda grad: None, min(after, 2), fault)

        def forward(x):
            out = original(x)
            if out.requires_grad:
                out.register_hook(fail)
            return out

        layer.forward = forward
    try:
        with pytest.raises((KeyboardInterrupt, torch.OutOfMemoryError)):
            for _ in range(40):
                probe(base, config())
            raise KeyboardInterrupt
    finally:
        del layer.forward
    assert untouched.holds()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in base.modules())


@pytest.mark.parametrize("fault", [KeyboardInterrupt, torch.OutOfMemoryError("no memory")], ids=["interrupt", "memory"])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (injection, "check_not_sharded"),
        (injection, "resolve_targets"),
        (injection, "probe_targets"),
        (injection, "choose_masks"),
        (selection, "select_jointly"),
    ],
)
def test_what_stops_before_the_injection_changes_nothing(
    module, name: str, fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama()
    untouched = Before(base)
    monkeypatch.setattr(module, name, failing(getattr(module, name), 1, fault))
    with pytest.raises((KeyboardInterrupt, torch.OutOfMemoryError)):
        get_peft_model(base, config())
    assert untouched.holds()
    monkeypatch.undo()
    assert get_peft_model(base, config()).get_nb_trainable_parameters()[0] > 0


@pytest.mark.parametrize("fault", [KeyboardInterrupt, torch.OutOfMemoryError("no memory")], ids=["interrupt", "memory"])
@pytest.mark.parametrize("after", [1, 2, 14])
@pytest.mark.parametrize("name", ["add_positions", "add_placeholder"])
def test_an_injection_that_is_cut_short_is_taken_back(
    name: str, after: int, fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_peft_model(tiny_llama(), config(score="random")).save_pretrained(tmp_path)
    base = tiny_llama()
    untouched = Before(base)
    monkeypatch.setattr(DowserLayer, name, failing(getattr(DowserLayer, name), after, fault))
    with pytest.raises((KeyboardInterrupt, torch.OutOfMemoryError)):
        if name == "add_positions":
            get_peft_model(base, config(score="random"))
        else:
            load(base, tmp_path)
    assert untouched.holds()


# Merging


def interrupt(line: int, call) -> bool:
    """Call a function, with a Ctrl-C before the given line of this package that it runs; whether it came to its end."""
    package = str(Path(peft_dowser.__file__).parent)
    lines = iter(range(1, line + 1))

    def traced(frame, event, argument):
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line" and next(lines, 0) == line:
            raise KeyboardInterrupt
        return traced

    sys.settrace(traced)
    try:
        call()
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(None)
    return True


# Interrupted between its last write and its note of that, an unmerge warns when it is called again.
@pytest.mark.filterwarnings("ignore:.*was changed after the merge")
@pytest.mark.parametrize("call", ["merge", "unmerge", "generate"])
def test_wherever_a_merge_is_interrupted_the_output_is_right_and_it_can_be_taken_back(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tracing also interrupts between a `with` and its lock, where Python looks for no signal: the lock stays held.
    monkeypatch.setattr(writing, "lock", threading.RLock())
    ids = torch.tensor([[1, 5, 9]])
    base = tiny_llama(layers=1)
    before = base_bits(base)
    model = get_peft_model(base, config(score="random", target_modules=["q_proj"]))
    set_values(model)
    (layer,) = dowser_layers(model)
    calls = {
        "merge": model.merge_adapter,
        "unmerge": model.unmerge_adapter,
        "generate": lambda: model.generate(input_ids=ids, max_new_tokens=1),
    }
    expected = model(ids).logits
    line = 1
    while True:
        if call == "unmerge":
            model.merge_adapter()
        finished = interrupt(line, calls[call])
        if call != "unmerge":
            assert torch.equal(model(ids).logits, expected), line
        if layer.merged:
            model.unmerge_adapter()
        assert torch.equal(model(ids).logits, expected), line
        assert_same_bits(base_bits(model), before)
        if finished:
            break
        line += 1
    assert line > 10


def test_verify_finds_a_save_that_was_cut_between_its_two_files(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_llama(), config(score="random"))
    model.save_pretrained(tmp_path / "adapter")
    set_values(model)
    old = (tmp_path / "adapter" / CONFIG).read_bytes()
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).write_bytes(old)
    assert "files are not of one save" in verify(tmp_path / "adapter", tmp_path / "base")[0]


def test_what_a_killed_save_has_left_is_named(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(layers=1), config(score="random"))
    (tmp_path / ".config-abc").mkdir()
    (tmp_path / ".tmpXYZ").touch()
    with pytest.warns(UserWarning, match=r"has '\.config-abc', '\.tmpXYZ': left by a save that was killed.* Delete it"):
        model.save_pretrained(tmp_path)


# Switching


def of_seed(folder: Path, seed: int, **overrides) -> Path:
    """A saved adapter of a Llama of one layer."""
    model = get_peft_model(tiny_llama(layers=1), config(score="random", seed=seed, **overrides))
    set_values(model, seed=seed)
    model.save_pretrained(folder)
    return folder


def applied(folder: Path):
    """The weights that a patch writes, each time that they are asked for."""
    model = tiny_llama(layers=1)
    patch = Patch(model, folder)

    def output():
        with patch:
            return base_bits(model)

    return output


def state_of(model):
    """The adapter's tensors, with the positions that no state dict has."""
    layers = dowser_layers(model)
    name = next(iter(layers[0].dowser_values))
    return lambda: {
        f"{layer.module_name} {part}": tensor.clone()
        for layer in layers
        for part, tensor in [
            ("values", layer.values(name).data),
            ("code", layer.index(name).code),
            ("positions", layer.index(name).decoded()),
        ]
    }


def swapped(folder: Path, **overrides):
    model = PeftModel.from_pretrained(tiny_llama(layers=1), of_seed(folder.parent / "first", 8, **overrides))
    hotswap(model, folder)
    return state_of(model)


def loaded_by_transformers(folder: Path):
    base = tiny_llama(layers=1)
    base.load_adapter(str(folder))
    return state_of(base)


def loaded_again(folder: Path, **options):
    model = PeftModel.from_pretrained(tiny_llama(layers=1), folder)
    model.load_adapter(folder, "default", **options)
    return state_of(model)


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "read",
    [
        applied,
        swapped,
        lambda folder: swapped(folder, update_ratio=0.2),
        lambda folder: state_of(PeftModel.from_pretrained(tiny_llama(layers=1), folder)),
        lambda folder: state_of(PeftModel.from_pretrained(tiny_llama(layers=1), folder, low_cpu_mem_usage=True)),
        lambda folder: loaded_again(folder, low_cpu_mem_usage=True),
        loaded_by_transformers,
    ],
    ids=["Patch", "hotswap", "hotswap, other ratio", "PEFT", "low_cpu_mem_usage", "twice", "transformers"],
)
def test_what_becomes_of_the_file_after_it_was_read_changes_nothing(read, save_dtype: str, tmp_path: Path) -> None:
    file = of_seed(tmp_path / "adapter", 1, save_dtype=save_dtype) / FILE
    output = read(file.parent)
    expected = output()
    with file.open("r+b") as opened:  # in place, as `cp` and `rsync --inplace` write
        opened.write(b"\x01" * file.stat().st_size)
    assert_same_bits(output(), expected)


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("call", ["apply", "remove"])
def test_wherever_a_patch_is_interrupted_it_can_be_removed(
    call: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = of_seed(tmp_path, 1, target_modules=["q_proj", "v_proj"])
    base = tiny_llama(layers=1)
    before = base_bits(base)
    patch = Patch(base, folder)
    line, finished = 1, False
    while not finished:
        monkeypatch.setattr(writing, "lock", threading.RLock())  # tracing may leave it held
        if call == "remove":
            patch.apply()
        finished = interrupt(line, patch.apply if call == "apply" else patch.remove)
        if again and patch._overwritten:
            interrupt(line, patch.remove)
        if patch._overwritten:
            patch.remove()
        assert_same_bits(base_bits(base), before)
        patch.apply()
        patch.remove()
        assert_same_bits(base_bits(base), before)
        line += 1
    assert line > 10


def test_what_an_error_left_of_a_patch_can_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(layers=1)
    before, patch = base_bits(base), Patch(base, of_seed(tmp_path, 1))
    patch.apply()
    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        fault = torch.OutOfMemoryError("no memory")
        patched.setattr(apply, "_write_entries_", failing(apply._write_entries_, 3, fault))
        patch.remove()
    with pytest.raises(ValueError, match=r"is applied already\. Call remove\(\) first"):
        patch.apply()
    patch.remove()
    assert_same_bits(base_bits(base), before)


@pytest.mark.parametrize("ratio", [0.1, 0.2])
def test_wherever_a_hotswap_is_interrupted_the_adapter_is_the_old_or_the_new_one(
    ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"target_modules": ["q_proj", "v_proj"]}
    first, second = of_seed(tmp_path / "a", 1, **few), of_seed(tmp_path / "b", 2, update_ratio=ratio, **few)
    model = PeftModel.from_pretrained(tiny_llama(layers=1), first)
    ids = torch.tensor([[1, 5, 9]])
    old = model(ids).logits
    new = PeftModel.from_pretrained(tiny_llama(layers=1), second)(ids).logits
    line, finished, seen = 1, False, set()
    while not finished:
        monkeypatch.setattr(writing, "lock", threading.RLock())
        finished = interrupt(line, lambda: hotswap(model, second))
        output, is_new = model(ids).logits, model.peft_config["default"].update_ratio == ratio
        assert torch.equal(output, new) or torch.equal(output, old), line
        seen.add(torch.equal(output, new))
        if ratio != 0.1:
            assert torch.equal(output, new) == is_new, line
        hotswap(model, first)
        line += 17 if len(seen) == 1 and False in seen else 1
    assert seen == {False, True}
