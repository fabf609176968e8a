"""Folders, pyproject.toml and wheel hold the same; the rooms know only whom they may."""

import ast
import doctest
import importlib
import importlib.resources
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}
ROOMS = ("adapters", "data_selection", "rl", "recipes")
# Who may import whom; "krontune" is the front door, the modules in src/.
MAY_IMPORT = {
    "krontune": {"recipes"},
    "adapters": set(),
    "data_selection": {"adapters"},
    "rl": {"adapters"},
    "recipes": {"adapters", "data_selection", "rl"},
}


def sources():
    """(module name, file) of every module."""
    for name, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join([name, *(part for part in parts if part != "__init__")]), file


MODULES = dict(sources())


def imported(module: str, file: Path) -> set[str]:
    """Full names of what a module imports, wherever in it the import stands; `from a import b` gives a.b."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return imported_names(ast.parse(file.read_text()), package)


def imported_names(tree: ast.Module, package: str) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def room_of(name: str) -> str:
    """The room of a full module name; "krontune" for the front door."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "krontune"


def test_every_folder_with_code_is_listed_as_a_package():
    found = set()
    for name, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            found.add(".".join([name, *file.parent.relative_to(folder).parts]))
    assert found == set(SETUPTOOLS["packages"])


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_the_rooms_it_may_know(module):
    room = room_of(module)
    known = {room_of(name) for name in imported(module, MODULES[module]) if name.split(".")[0] == "krontune"}
    assert known - {room} <= MAY_IMPORT[room]


def test_only_the_command_line_imports_recipes():
    users = {m for m in MODULES if any(room_of(name) == "recipes" for name in imported(m, MODULES[m]))}
    assert {module for module in users if room_of(module) != "recipes"} == {"krontune.cli"}


def test_rooms_are_never_imported_under_their_folder_names():
    bare = {module: imported(module, file) for module, file in MODULES.items()}
    assert not {module for module, names in bare.items() if {name.split(".")[0] for name in names} & set(ROOMS)}


def test_the_reader_of_imports_sees_every_form():
    text = "import krontune.rl.x\nfrom . import a\nfrom ..rl import b\nif True:\n    from .c.d import e\n"
    names = {"krontune.rl.x", "krontune.recipes.a", "krontune.rl.b", "krontune.recipes.c.d.e"}
    assert imported_names(ast.parse(text), "krontune.recipes") == names


@pytest.mark.parametrize("module", [module for module in MODULES if module != "krontune.__main__"])
def test_doctests_hold(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_every_file_beside_the_code_is_shipped_and_every_pattern_ships_something():
    for package in SETUPTOOLS["packages"]:
        folder = folder_of(package)
        beside = {file for file in folder.iterdir() if file.is_file() and file.suffix not in (".py", ".pyc")}
        patterns = SETUPTOOLS["package-data"].get(package, [])
        matched = {pattern: set(folder.glob(pattern)) for pattern in patterns}
        assert beside == set().union(*matched.values()), package
        assert all(matched.values()), package


def folder_of(package: str) -> Path:
    name = max((name for name in FOLDERS if f"{package}.".startswith(f"{name}.")), key=len)
    return FOLDERS[name].joinpath(*package.removeprefix(name).split("."))


def test_the_installed_package_finds_what_it_ships():
    shipped = {
        "krontune": "py.typed",
        "krontune.recipes": "quickstart.yaml",
        "krontune.recipes.data": "prose.jsonl.gz",
    }
    for package, file in shipped.items():
        assert (importlib.resources.files(package) / file).is_file()


def build(what: str, tree: Path, out: Path) -> Path:
    """The one file that setuptools builds from this tree."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools.build_meta import build_{what}; build_{what}({str(out)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    [file] = out.iterdir()
    return file


def clean_tree(to: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("adapters", "data_selection", "rl", "recipes", "src"):
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, to)
    return to


def held_by(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_a_wheel_holds_every_module_and_file_and_no_other_top_level_name(tmp_path):
    wanted = set()
    for package in SETUPTOOLS["packages"]:
        files = [file for file in folder_of(package).iterdir() if file.is_file()]
        wanted |= {f"{package.replace('.', '/')}/{file.name}" for file in files}
    assert held_by(build("wheel", clean_tree(tmp_path / "tree"), tmp_path / "wheel")) == wanted


def test_a_source_distribution_builds_the_same_wheel(tmp_path):
    tree = clean_tree(tmp_path / "tree")
    source = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(source) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    found = held_by(build("wheel", unpacked, tmp_path / "from_source"))
    assert found == held_by(build("wheel", tree, tmp_path / "wheel"))
