"""The package as a whole: what importing it does and needs, and how its modules may depend on each other."""

import ast
import graphlib
import importlib.metadata
import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest
from peft.utils import PeftType

import peft_dowser
from peft_dowser._peft import ensure_peft_type

FOLDER = Path(peft_dowser.__file__).parent
SOURCES = {path.stem: ast.parse(path.read_text()) for path in FOLDER.glob("*.py")}
FLOOR = {
    "_version",
    "arithmetic",
    "codec",
    "entries",
    "files",
    "fused",
    "grafting",
    "manifest",
    "masks",
    "metrics",
    "mixed_rows",
    "modes",
    "names",
    "postmerge",
    "scores",
    "seeds",
    "sparse_experts",
    "sparse_linear",
    "sparse_rows",
    "spread",
    "statistics",
    "threads",
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
    "This PEFT already has a method DOWSER, from 'peft.tuners.lora.model'. Use that one, or a PEFT without it; "
    "peft-dowser does not replace it."
)


def output_of(script: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imports(name: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            absolute = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {
                other.partition(".")[2] or "__init__" for other in absolute if other.partition(".")[0] == "peft_dowser"
            }
    return found


def public_in(parent: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module or class whose names are public."""
    found = [node for node in parent.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in found if not node.name.startswith("_")]


# Importing


def test_the_ground_floor_needs_torch_only() -> None:
    output_of(WITHOUT_PEFT)


def test_the_registration_survives_every_way_of_importing_again() -> None:
    output_of(WORKS + AGAIN_AND_AGAIN)


def test_importing_after_peft_works_and_loads_no_other_package() -> None:
    assert output_of(WORKS + AFTER_PEFT) == "peft_dowser"


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


def test_modules_import_each_other_without_a_cycle() -> None:
    graph = {name: imports(name) for name in SOURCES}
    assert set().union(*graph.values()) <= set(SOURCES)
    graphlib.TopologicalSorter(graph).prepare()


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
