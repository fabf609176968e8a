"""What must not leave the machine: keys, tokens and passwords, and where its folders are.

What krontune writes about a run, says at its end and publishes goes through here. A secret is known in three ways: by
the name of its key in a recipe, by the name of the environment variable that holds it, and by its look.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

MASK = "(not shown)"
WORDS = ("instruction", "description", "text")  # keys of a recipe that hold words, never a path

_LAST_WORDS = {"key", "token", "secret", "password", "passwd", "passphrase", "apikey", "credential"}
_PLAIN = {"password", "passwd", "passphrase", "secret"}  # names that can mean nothing else
_PARTS_OF_TEXT = {"eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "stop", "begin", "end"}
_LOOK = re.compile(r"\b(?:hf_|api_org_|ghp_|github_pat_|wandb_v\d_|sk-(?:proj-|ant-)?)[A-Za-z0-9]{20,}[A-Za-z0-9_-]*")
_SHORTEST = 6  # a shorter text would be found in the middle of words

_learned: set[str] = set()


def names_secret(name: str) -> bool:
    """Whether a key of this name holds a secret: its last word says so, as in API_KEY, hub_token or passwords; a path
    has no name, and pad_token is a part of text."""
    if "/" in name or "\\" in name:
        return False
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().replace("-", "_").split("_")
    last = words[-1].removesuffix("s") if words[-1] not in _LAST_WORDS else words[-1]
    return last in _LAST_WORDS and not (last == "token" and words[-2:-1] and words[-2] in _PARTS_OF_TEXT)


def masked(value: Any, key: str = "") -> Any:
    """Of a recipe: without the values of keys that are named like a secret, and what stands in them, and without what
    `hidden` hides. A number under a name with "token" counts tokens and is none."""
    secret = names_secret(key)
    if isinstance(value, Mapping):
        return {hide(name) if isinstance(name, str) else name: masked(item, key if secret else str(name))
                for name, item in value.items()}  # fmt: skip
    if isinstance(value, list | tuple):
        return [masked(item, key) for item in value]
    if value is None or isinstance(value, bool) or not secret:
        return hidden(value)
    return value if isinstance(value, int | float) and "token" in key.lower() else MASK


def learn(value: Any, key: str = "") -> None:
    """Remember the secrets of a recipe, so that `hide` knows them wherever they come up, in an error of the code that
    was given them as well. A word that may be anything, such as the `key` of a table, is not remembered."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            learn(item, key if names_secret(key) else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            learn(item, key)
    elif isinstance(value, str) and names_secret(key) and value != MASK and _is_telling(value, key):
        _learned.add(value)


def hide(text: str) -> str:
    """The text without the secrets that are known, and without what looks like one."""
    for secret in sorted({*_learned, *_of_environment()}, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return _LOOK.sub(MASK, text)


def learn_override(override: str) -> None:
    """The same of `path.to.key=value` as it was typed, which an error quotes before it is read."""
    target, _, text = override.partition("=")
    learn({target.rpartition(".")[2].strip(): text.strip().strip("'\"")})


def hidden(value: Any) -> Any:
    """The same of every text in lists and mappings."""
    return each_text(value, hide)


def without_secrets(results: Sequence[Any]) -> list[Any]:
    """The check results with `hidden` evidence, which may quote an error of the user's own code."""
    return [replace(one, details=hidden(one.details)) for one in results]


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The value with each text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [each_text(item, change) for item in value]
    if not isinstance(value, Mapping):
        return value
    return unique({key: each_text(item, change) for key, item in value.items()}, change)


def unique(values: Mapping[Any, Any], change: Callable[[str], str]) -> dict[Any, Any]:
    """The mapping with its keys changed; of two that become one, the second is called "name (2)"."""
    found: dict[Any, Any] = {}
    for key, value in values.items():
        name = short = change(key) if isinstance(key, str) else key
        number = 2
        while name in found:
            name, number = f"{short} ({number})", number + 1
        found[name] = value
    return found


def without_paths(value: Any, key: str = "") -> Any:
    """A recipe without paths of this machine: of each the file's name is left. What a key of `WORDS` holds is text,
    whatever it begins with."""
    if isinstance(value, Mapping):
        return unique({name: without_paths(item, str(name)) for name, item in value.items()}, short_name)
    if isinstance(value, list | tuple):
        return [without_paths(item, key) for item in value]
    return short_name(value) if isinstance(value, str) and key not in WORDS else value


def short_name(text: str) -> str:
    """Of a path of this machine the file's name; other text as it is, "/no_think" too: a path from the root has
    folders in it."""
    plain = text.replace("\\", "/").rstrip("/")
    relative = text.startswith(("~", "./", "../", ".\\", "..\\"))
    rooted = text.startswith("/") and plain.count("/") > 1
    drive = len(text) > 2 and text[1:3] in (":\\", ":/")
    return plain.rpartition("/")[2] if relative or rooted or drive else text


def _is_telling(value: str, key: str) -> bool:
    """Whether the text is one that does not come up by itself."""
    if len(value) < _SHORTEST:
        return False
    mixed = any(letter.isdigit() for letter in value) and any(letter.isalpha() for letter in value)
    words = re.split(r"[_\-A-Z]", key.lower())
    return mixed or (len(value) >= 16 and " " not in value) or any(word.removesuffix("s") in _PLAIN for word in words)


def _of_environment() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if names_secret(name) and _is_telling(value, name) and not os.path.exists(value)
    }
