"""`peft-dowser` reads its options before it imports the package, and so torch. Installed as `peft_dowser_cli`."""

from importlib.util import find_spec
from runpy import run_path

main = run_path(find_spec("peft_dowser").submodule_search_locations[0] + "/cli.py")["main"]  # type: ignore
