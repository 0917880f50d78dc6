"""The package as a whole: what importing it does and needs, and how its modules may depend on each other."""

import ast
import graphlib
import importlib.metadata
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft.utils import PeftType

import peft_dowser
from peft_dowser._peft import ensure_peft_type

FOLDER = Path(peft_dowser.__file__).parent
SOURCES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in FOLDER.rglob("*.py")
}
# What each room, or module beside the rooms, may import. A new arrow is a decision: write it down here and in the map,
# peft_dowser/README.md.
ARROWS = {
    "delta": set(),
    "config": {"delta", "card"},
    "card": set(),
    "base": {"delta", "config"},
    "probing": {"delta", "base", "config"},
    "layers": {"delta", "base"},
    "baselines": {"delta", "base"},
    "evaluation": {"delta", "base", "probing", "config"},
    "files": {"delta", "base", "config", "card", "baselines"},
    "tuner": {"delta", "base", "probing", "layers", "files", "config"},
    "report": {"delta", "probing", "evaluation", "files"},
}
# What everything may import: facts about others, which import nothing of the package.
GROUND = {"_version", "_tested", "_peft", "_transformers"}
# At the top: the public names and the command.
TOP = {"__init__", "cli", "launcher"}
# Rooms and modules that work on tensors alone.
FLOOR = {
    "_version",
    "delta",
    "delta.apply",
    "delta.arithmetic",
    "delta.codec",
    "delta.format",
    "delta.layout",
    "delta.lora",
    "delta.masks",
    "delta.safe_files",
    "delta.seeds",
    "base.fused",
    "layers.channels",
    "layers.experts_op",
    "layers.linear_op",
    "probing.scores",
    "probing.statistics",
}

WITHOUT_PEFT = f"""
import importlib, sys, types

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"accelerate", "peft", "transformers"}}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
package = types.ModuleType("peft_dowser")
package.__path__ = [{str(FOLDER)!r}]
sys.modules["peft_dowser"] = package
for name in {sorted(FLOOR)}:
    importlib.import_module("peft_dowser." + name)
"""

WORKS = """
import importlib, sys

def works():
    import peft, peft_dowser
    from torch import nn
    config = peft_dowser.DowserConfig(score="random", target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    assert type(model.base_model) is peft_dowser.DowserModel
    assert type(peft.PeftConfig.from_peft_type(peft_type="DOWSER")) is peft_dowser.DowserConfig
    assert model.get_nb_trainable_parameters()[0] == 6

def purge():
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft_dowser"]:
        del sys.modules[name]
"""

AGAIN_AND_AGAIN = """
import peft_dowser
import peft
works()
import peft_dowser
works()
importlib.reload(peft_dowser)
works()
first = peft_dowser.DowserModel
purge()
import peft_dowser
assert peft_dowser.DowserModel is not first
works()
assert list(peft.PeftType).count("DOWSER") == 1
"""

AFTER_PEFT = """
import peft
before = {name.partition(".")[0] for name in sys.modules}
import peft_dowser
print(*sorted({name.partition(".")[0] for name in sys.modules} - before))
works()
"""

# A release of PEFT whose enum has the name, then one that has the method too.
IN_PEFT = """
from importlib.machinery import SourceFileLoader
get_code = SourceFileLoader.get_code

def patched(self, name):
    if name != "peft.utils.peft_types":
        return get_code(self, name)
    return compile(self.get_source(name).replace("    LORA =", "    DOWSER = 'DOWSER'; LORA =", 1), name, "exec")

SourceFileLoader.get_code = patched
import peft
native = peft.PeftType.DOWSER
import peft_dowser
assert peft.PeftType.DOWSER is native
works()
purge()
peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[native] = peft.LoraModel
try:
    import peft_dowser
except RuntimeError as error:
    print(error)
assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[native] is peft.LoraModel
"""

FOREIGN = (
    "This PEFT already has a method DOWSER, from 'peft.tuners.lora.model'. Use that method, or a PEFT without it; "
    "peft-dowser does not replace it."
)


def output_of(script: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imports(name: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it, by their dotted names."""
    inside = FOLDER.joinpath(*name.split(".")).is_dir()
    parts = name.split(".") if inside else name.split(".")[:-1]
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = parts[: len(parts) - node.level + 1] + (node.module.split(".") if node.module else [])
            modules = {".".join([*start, alias.name]) for alias in node.names}
            found |= {module if module in SOURCES else ".".join(start) for module in modules}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            absolute = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {other.partition(".")[2] for other in absolute if other.partition(".")[0] == "peft_dowser"}
    return found - {""}


def room_of(name: str) -> str:
    """The room that a module is in; a module beside the rooms is one by itself."""
    return name.partition(".")[0] or "__init__"


def public_in(parent: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module or class whose names are public."""
    found = [node for node in parent.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in found if not node.name.startswith("_")]


def modules_imported_by(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return set(names) | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


# Importing


@pytest.mark.slow
def test_the_ground_floor_needs_torch_only() -> None:
    output_of(WITHOUT_PEFT)


@pytest.mark.slow
def test_the_registration_survives_every_way_of_importing_again() -> None:
    output_of(WORKS + AGAIN_AND_AGAIN)


@pytest.mark.slow
def test_importing_after_peft_works_and_loads_no_other_package() -> None:
    assert output_of(WORKS + AFTER_PEFT) == "peft_dowser"


@pytest.mark.slow
def test_a_peft_with_the_name_is_fine_and_one_with_the_method_is_refused() -> None:
    assert output_of(WORKS + IN_PEFT) == FOREIGN


def test_the_member_of_the_enum_is_an_ordinary_one() -> None:
    member = PeftType.DOWSER
    ensure_peft_type()
    assert member is PeftType.DOWSER is PeftType("DOWSER") is PeftType["DOWSER"]
    assert isinstance(member, PeftType)
    assert (member, member.name, member.value) == ("DOWSER", "DOWSER", "DOWSER")
    assert list(PeftType)[-1] is member
    assert list(PeftType).count(member) == 1


# Source


def test_no_test_imports_a_module_of_tests() -> None:
    """What several need lies beside the rooms: a test runs, and is found, alone."""
    paths = list(Path(__file__).parents[1].rglob("test_*.py"))
    modules = {path.stem for path in paths}
    assert not {path.name: found for path in paths if (found := modules_imported_by(path) & modules)}


def test_modules_import_each_other_without_a_cycle() -> None:
    # A room's `__init__` hands names on, so it stands above what is in it.
    graph = {name: imports(name) for name in SOURCES}
    assert set().union(*graph.values()) <= set(SOURCES)
    graphlib.TopologicalSorter(graph).prepare()


def test_arrows_between_rooms_are_those_of_the_map() -> None:
    rooms = {room_of(name) for name in SOURCES} - GROUND - TOP
    assert rooms == set(ARROWS)
    for name in SOURCES:
        room = room_of(name)
        found = {room_of(other) for other in imports(name)} - {room}
        if room in GROUND:
            assert not found, name
        elif room not in TOP:
            assert found <= ARROWS[room] | GROUND, name


def test_rooms_say_what_they_hold_and_what_they_may_import() -> None:
    for room in (name for name in ARROWS if (FOLDER / name).is_dir()):
        text = ast.get_docstring(SOURCES[room]) or ""
        assert len(text.splitlines()) == 3
        line = text.splitlines()[-1]
        assert line.startswith("May import ")
        assert set(re.findall(r"\b\w+\b", line)) & set(ARROWS) == ARROWS[room], room


def test_the_map_shows_every_room_and_module() -> None:
    text = (FOLDER / "README.md").read_text()
    unnamed = [name for name in SOURCES if name and name.rpartition(".")[2] not in re.findall(r"\w+", text)]
    assert not unnamed


def test_only_public_names_are_public() -> None:
    shown = {name for name in dir(peft_dowser) if not name.startswith("_")}
    assert shown == set(peft_dowser.__all__)


def test_no_module_has_the_name_of_a_public_function() -> None:
    names = {name.rpartition(".")[2] for name in SOURCES} - {"delta", "baselines", "evaluation"}
    assert not names & set(peft_dowser.__all__)


def test_the_floor_imports_from_the_floor_only() -> None:
    assert set().union(*map(imports, FLOOR)) <= FLOOR


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_library_neither_prints_nor_asserts(name: str) -> None:
    nodes = list(ast.walk(SOURCES[name]))
    assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)]
    prints = [node.lineno for node in nodes if isinstance(node, ast.Name) and node.id == "print"]
    assert not prints or name == "cli"


def test_public_names_are_documented() -> None:
    public = {name: getattr(peft_dowser, name).__doc__ or "" for name in peft_dowser.__all__}
    assert not [name for name, text in public.items() if not text or text.startswith(f"{name}(")]


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_the_floor_is_documented(name: str) -> None:
    module = SOURCES[name]
    public = public_in(module)
    public += [member for node in public if isinstance(node, ast.ClassDef) for member in public_in(node)]
    assert ast.get_docstring(module)
    assert not [node.name for node in public if not ast.get_docstring(node)]


def test_the_distribution() -> None:
    assert peft_dowser.__version__ == importlib.metadata.version("peft-dowser")
    assert (importlib.resources.files("peft_dowser") / "py.typed").is_file()
