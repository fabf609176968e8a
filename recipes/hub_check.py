"""Whether a run could be pushed where its recipe says, asked before anything is trained."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..adapters.base import resolve_model
from ..adapters.embedded import HUB_ID, NAME
from .card import metadata
from .data_faults import Found, tried
from .needs import HUB_TIMEOUT_S
from .pictures import reads_pictures
from .run_folder import yaml_text
from .schema import Hub, Recipe

WRITE = "repo.write"  # the Hub's name for what a fine-grained token needs


def hub_faults(recipe: Recipe) -> Found:
    """Why a push can never work: a name that is no id, nothing to push, no token, one that may not write there, a card
    that the Hub refuses."""
    wanted = _wanted(recipe.hub)
    if not wanted:
        return
    plain = list(_plain_faults(recipe, wanted))
    yield from plain
    if plain:
        return
    faults, _ = _asked(recipe, wanted)
    yield from faults


def hub_notes(recipe: Recipe) -> list[str]:
    """What of the push could not be checked, or has to be known."""
    wanted = _wanted(recipe.hub)
    if not wanted or list(_plain_faults(recipe, wanted)):
        return []
    _, notes = _asked(recipe, wanted)
    return notes


def _wanted(hub: Hub) -> dict[str, tuple[str, str]]:
    """By key of the section: the kind of repository and its name."""
    named = {"repo": ("model", hub.repo), "dataset": ("dataset", hub.dataset)}
    return {key: (kind, name) for key, (kind, name) in named.items() if name is not None}


def _plain_faults(recipe: Recipe, wanted: dict[str, tuple[str, str]]) -> Found:
    """What shows without a network."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    for key, (_, name) in wanted.items():
        wrong = list(tried(("hub", key), lambda name=name: validate_repo_id(name)))
        yield from wrong
        if not wrong and name.count("/") != 1:
            yield ("hub", key), f"{key} {name!r} has no owner; write owner/{name}"
    kinds = {stage.stage for stage in recipe.stages}
    if "repo" in wanted and not kinds & {"sft", "rl"}:
        yield ("hub", "repo"), "there is no adapter to push: none of the stages trains one; leave repo out"
    if "dataset" in wanted and "select" not in kinds:
        yield ("hub", "dataset"), "there are no rows to push: only a select stage picks them; leave dataset out"
    picking = next(
        (stage for stage in reversed(recipe.stages) if stage.stage == "select"), None
    )  # whose rows are pushed
    if "dataset" in wanted and getattr(picking, "datasets", None):
        yield (
            ("hub", "dataset"),
            "over datasets the picks depend on the training and are not pushed; leave it out",
        )
    if "dataset" in wanted and getattr(picking, "push", None):
        yield ("hub", "dataset"), "the key 'push' of the select stage pushes the same rows; leave one of them out"
    given = recipe.hub.base_model
    if given is not None:
        yield from tried(("hub", "base_model"), lambda: validate_repo_id(given))
    elif "repo" in wanted and _base(recipe) is None:
        yield (
            ("hub", "repo"),
            f"the base {recipe.base.model!r} is a folder of this machine, which nobody who loads the adapter has; say "
            "which model of the Hub it is: hub: {base_model: owner/name}",
        )
    if get_token() is None:
        yield (
            ("hub", next(iter(wanted))),
            "you are not logged in to the Hub, so nothing can be pushed; run `hf auth login`, or set HF_TOKEN",
        )


def _base(recipe: Recipe) -> str | None:
    if recipe.hub.base_model is not None:
        return recipe.hub.base_model
    if recipe.base.model in (NAME, HUB_ID):
        return HUB_ID
    source = resolve_model(recipe.base.model)
    return None if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1 else source


def _asked(
    recipe: Recipe, wanted: dict[str, tuple[str, str]]
) -> tuple[list[tuple[tuple[str | int, ...], str]], list[str]]:
    """Faults and notes, as the Hub answers."""
    from huggingface_hub import constants

    where = ", ".join(name for _, name in wanted.values())
    if constants.HF_HUB_OFFLINE:
        return [], [f"HF_HUB_OFFLINE is set: whether the run can be pushed to {where} was not checked"]
    faults: list[tuple[tuple[str | int, ...], str]] = []
    notes: list[str] = []
    try:
        who = _who()
        if isinstance(who, str):
            return [(("hub", next(iter(wanted))), who)], []
        for key, (kind, name) in wanted.items():
            faults += [(("hub", key), message) for message in _owner_faults(who, kind, name)]
            for is_fault, message in _repo_findings(recipe.hub, kind, name):
                if is_fault:
                    faults.append((("hub", key), message))
                else:
                    notes.append(message)
        if "repo" in wanted:
            faults += [(("hub", "repo"), message) for message in _card_faults(recipe)]
    except Exception as error:  # the network's, of many kinds: the Hub said nothing, so nothing is known
        reason = " ".join(str(error).split()) or type(error).__name__
        notes.append(f"the Hub could not be asked ({reason[:200]}): whether {where} can be pushed to was not checked")
    return faults, notes


def _who() -> dict[str, Any] | str:
    """whoami, or why the token is no good."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session, hf_raise_for_status

    headers = {"Authorization": f"Bearer {get_token()}"}
    response = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=HUB_TIMEOUT_S)
    if response.status_code == 401:
        return "the Hub does not know your token: it is mistyped, expired or withdrawn; run `hf auth login` again"
    hf_raise_for_status(response)
    return response.json()


def _owner_faults(who: dict[str, Any], kind: str, repo: str) -> Iterator[str]:
    """What the token may not do. who: the Hub's answer to whoami, in which a user's token has a role "read", "write" or
    "fineGrained", the last with permissions by user, organisation or repository."""
    owner = repo.partition("/")[0]
    orgs = {one["name"]: one.get("roleInOrg") for one in who.get("orgs") or ()}
    if owner != who.get("name") and owner not in orgs:
        mine = ", ".join([str(who.get("name")), *orgs])
        yield f"your token is of {who.get('name')!r}, who is no member of {owner!r}; it may push to: {mine}"
        return
    if orgs.get(owner) == "read":
        yield f"{who.get('name')!r} may only read in the organisation {owner!r}; ask there for the role contributor"
        return
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        yield "your token may only read; make one with the role write at https://huggingface.co/settings/tokens"
    elif token.get("role") == "fineGrained" and not _may_write((token.get("fineGrained") or {}), kind, owner, repo):
        yield (
            f"your fine-grained token has no write access to {repo!r}; give it {WRITE!r} for the repositories of "
            f"{owner!r} at https://huggingface.co/settings/tokens"
        )


def _may_write(rights: dict[str, Any], kind: str, owner: str, repo: str) -> bool:
    places = {("user", owner), ("org", owner), (kind, repo)}
    return WRITE in (rights.get("global") or ()) or any(
        WRITE in (one.get("permissions") or ())
        and ((one.get("entity") or {}).get("type"), (one.get("entity") or {}).get("name")) in places
        for one in rights.get("scoped") or ()
    )


def _repo_findings(hub: Hub, kind: str, name: str) -> Iterator[tuple[bool, str]]:
    """Of a repository that is there already: (whether it is a fault, what)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        info = ask(name, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        return
    if hub.private and not info.private:
        yield True, f"{name!r} is there and public, and hub.private is true; give another name, or private: false"
    files = [one.rfilename for one in info.siblings or () if one.rfilename != ".gitattributes"]
    if files:
        yield (
            False,
            f"{name!r} on the Hub holds {len(files)} files already, {files[0]} among them; files that the run did not "
            "put there are replaced by `krontune push --overwrite` alone",
        )


def _card_faults(recipe: Recipe) -> Iterator[str]:
    """What the Hub has against the metadata of the card, by its own check of them."""
    from huggingface_hub import ModelCard

    front = metadata(recipe.model_dump(), "MOKA", _base(recipe), reads_pictures(recipe.base))
    try:
        ModelCard(f"---\n{yaml_text(front)}---\n").validate()
    except ValueError as error:
        yield f"the Hub refuses the model card that this run would have: {_said(str(error))}"


def _said(answer: str) -> str:
    """The messages of the Hub's answer, or all of it where it has another form."""
    try:
        return "; ".join(one["message"] for one in json.loads(answer)["errors"])
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.split())
