"""The recipes that come with krontune."""

import difflib
from importlib.resources import files
from pathlib import Path

from .faults import Fault, RecipeError
from .yaml12 import read

SCHEMA = "recipe.schema.json"


def shipped() -> dict[str, str]:
    """Name and description of each."""
    found = sorted(file.name for file in files("krontune.recipes").iterdir() if file.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): str(read(_bytes(name), name).data.get("description", "")) for name in found}


def shipped_text(name: str) -> str:
    """The file of one.

    Raises:
        RecipeError: there is none of this name.
    """
    known = shipped()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"shipped: {', '.join(known)}"
        raise RecipeError([Fault(name, f"there is no such file and no such shipped recipe; {hint}")])
    return _bytes(f"{name}.yaml").decode()


def copy_recipe(name: str, to: Path) -> Path:
    """Write a shipped recipe to a new file, and beside it the schema that its first line names to editors.

    It is renamed after the file, so that its runs do not meet those of the shipped one.

    Raises:
        RecipeError: there is none of this name, the file exists, or it cannot be written.
    """
    content = shipped_text(name).replace(f"name: {name}\n", f"name: {to.stem}\n", 1).encode()
    try:
        with to.open("xb") as file:
            file.write(content)
        if not (to.parent / SCHEMA).exists():
            (to.parent / SCHEMA).write_bytes(_bytes(SCHEMA))
    except FileExistsError:
        raise RecipeError([Fault(str(to), "the file exists and was left as it is; give another name")]) from None
    except OSError as error:
        raise RecipeError([Fault(str(to), f"the file cannot be written: {error.strerror}")]) from None
    return to


def _bytes(file_name: str) -> bytes:
    return (files("krontune.recipes") / file_name).read_bytes()
