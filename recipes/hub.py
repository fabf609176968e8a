"""Push a finished run to the Hugging Face Hub: the adapter with its card, the recipe and the reports, and the picked
rows as a data set. Each is one commit, and the same push again does what is still to be done.

What is sent holds no pickle, no secret (see `masking`) and no path of this machine.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..data_selection import Dsir, Selection
from ..data_selection.outputs import write_dataset
from ..data_selection.selection import write_atomic
from .card import CARD, hub_base, model_card
from .compare import PAGE
from .masking import each_text, hide, short_name, without_paths
from .names import numbered, parts
from .page import run_page
from .pictures import holds_pictures, located
from .run_folder import RunError, yaml_text
from .run_report import REPORT_JSON, RunFiles, read_run
from .select import ESTIMATOR, SELECTED
from .training import ADAPTER

RECORD = "hub.json"  # in the run folder: what was sent where
KINDS = (".safetensors", ".json", ".jinja", ".txt", ".model")  # of the files of an adapter and its tokenizer
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
MADE_BY_THE_HUB = (".gitattributes",)

Files = Mapping[str, bytes | Path]  # by their path in the repository


@dataclass(frozen=True)
class Pushed:
    """kind: "model" or "dataset". url: of the repository's last commit. files: how many were sent; 0 where nothing had
    changed."""

    kind: str
    repo: str
    url: str
    private: bool
    files: int

    def __str__(self) -> str:
        what = "adapter" if self.kind == "model" else "data set"
        seen = "private" if self.private else "public"
        if not self.files:
            return f"{what}: nothing changed, {self.url} ({seen}) is as this run left it"
        return f"{what}: pushed {self.files} files in one commit, {self.url} ({seen})"


def push(
    path: str | Path,
    repo: str | None = None,
    dataset: str | None = None,
    *,
    private: bool | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> list[Pushed]:
    """Push a run that is done. What is not given is taken from the section `hub` of its recipe.

    Args:
        path: the run folder.
        repo: "owner/name" of the adapter; made where it is new.
        dataset: "owner/name" for the rows that the select stage picked; a data set, pushed before the adapter.
        private: of a repository that is made; one that is there keeps what it has.
        base_model: the Hub id of the base, where the run used a folder.
        overwrite: replace files that this run did not send.
        say: gets a line on each push, and on what was left out.

    Raises:
        RunError: the run is not done, there is nothing to push or it may not be, or the Hub did not take it; the
            message says what to do. Nothing is half pushed: a commit is there or not.
    """
    run = read_run(path)
    given = run.recipe.get("hub") or {}
    if repo is None and dataset is None:
        repo, dataset = given.get("repo"), given.get("dataset")
    if repo is None and dataset is None:
        raise RunError("nothing says where to push: give --repo owner/name, or hub: {repo: owner/name} in the recipe")
    cut = [
        name
        for name in dict.fromkeys([*run.stages, *_step_names(run.recipe)])
        if not (run.path / name / "done").is_file()
    ]
    if cut:
        raise RunError(f"{run.path}: {', '.join(cut)} is not done; go on with the run first, and push then")
    settings = (bool(given.get("private", True) if private is None else private), overwrite, say)
    done, refused = [], None
    if dataset is not None:
        try:
            with TemporaryDirectory() as folder:
                done.append(_push_files(run.path, "dataset", dataset, _dataset_files(run, Path(folder)), *settings))
        except RunError as error:  # which is no reason to keep the adapter back
            refused = error
    if repo is not None:
        done.append(_push_files(run.path, "model", repo, _adapter_files(run, repo, base_model, say), *settings))
    if refused is not None:
        raise refused
    return done


def _step_names(recipe: dict[str, Any]) -> Iterator[str]:
    """Of the stages and their controls; one that runs anew is in no record until it is done."""
    for name, stage in zip(_names(recipe), recipe["stages"], strict=True):
        yield name
        yield from (f"{name}-{control}" for control in stage.get("controls") or ())


def _names(recipe: dict[str, Any]) -> list[str]:
    return numbered(stage["stage"] for stage in recipe["stages"])


# ---------------------------------------------------------------- what is pushed


def _adapter_files(run: RunFiles, repo: str, base_model: str | None, say: Callable[[str], None]) -> Files:
    adapter = run.path / ADAPTER
    if not (adapter / "adapter_config.json").is_file():
        raise RunError(f"{run.path} holds no adapter: the run is not done, or none of its stages trains")
    files: dict[str, bytes | Path] = {}
    for file in sorted(adapter.iterdir()):
        if file.suffix in PICKLES:
            raise RunError(f"{file} may run code when it is loaded, and is not pushed; take it out of the folder")
        if file.is_symlink() or not file.is_file() or file.suffix not in KINDS:
            if file.name != CARD:
                say(f"left out: {file.name} is no file of an adapter")
            continue
        if file.suffix == ".safetensors":
            _check_safetensors(file)
        files[file.name] = file
    if not any(name.endswith(".safetensors") for name in files):
        raise RunError(f"{adapter} holds no weights (*.safetensors), so there is nothing to push")

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    recipe = {
        **run.recipe,
        "hub": {**(run.recipe.get("hub") or {}), **({"base_model": base_model} if base_model else {})},
    }
    base = hub_base(recipe, config)
    if base is None:
        raise RunError(
            f"the base of this adapter is {short_name(str(config.get('base_model_name_or_path')))!r}, a folder of this "
            "machine, which nobody else can load; say which model of the Hub it is: --base-model owner/name, or "
            "hub: {base_model: owner/name} in the recipe"
        )
    _fetch_card(base)
    public = published(replace(run, recipe=recipe))
    revision = None if recipe["hub"].get("base_model") else recipe["base"].get("revision")
    pinned = {"revision": revision} if revision else {}
    files["adapter_config.json"] = _json({**config, "base_model_name_or_path": base, **pinned})
    files[CARD] = model_card(replace(public, recipe=recipe), adapter, repo).encode()
    files["recipe.yaml"] = public.recipe_text.encode()
    files[REPORT_JSON] = _json(public.report)
    files[PAGE] = run_page(public, texts=False).encode()
    _refuse_paths(run, files)
    return files


def published(run: RunFiles) -> RunFiles:
    """The run without paths of this machine: of the files that its recipe names the names are left."""
    recipe = without_paths(run.recipe)
    names = {text: short_name(text) for text in _texts(run.recipe) if short_name(text) != text}
    folders = [f"{folder}/" for folder in _folders(run)]
    replaced = sorted([*names.items(), *((folder, "") for folder in folders)], key=lambda pair: -len(pair[0]))

    def cut(text: str) -> str:
        for path, name in replaced:
            text = text.replace(path, name)
        return text

    record, verified, report = (each_text(part, cut) for part in (run.record, run.verified, run.report))
    return replace(run, recipe=recipe, recipe_text=yaml_text(recipe), record=record, verified=verified, report=report)


def _dataset_files(run: RunFiles, folder: Path) -> Files:
    """The rows that the last select stage picked, as `krontune.data_selection.outputs` writes them. The pool is not
    read again."""
    name = next((name for name in reversed(_names(run.recipe)) if parts(name).kind == "select"), "select")
    place = run.path / name
    if not (place / "selection").is_dir() or not (place / SELECTED).is_file():
        raise RunError(f"{run.path} holds no selection: only a select stage has rows to push")
    with (place / SELECTED).open(encoding="utf-8") as lines:
        if any(holds_pictures(located(json.loads(line), place)) for line in lines):
            raise RunError("the picked rows hold pictures, which are not pushed; leave the data set out")
    picked = Selection.load(place / "selection")
    paths = [source if isinstance(source, str) else source.get("path") for source in _pool(run.recipe, name)]
    names = {path: Path(path).name for path in paths if path}
    recorded = run.stages.get(name, {})
    facts: dict[str, Any] = dict(picked.details)
    facts["pool"] = ", ".join(names.values()) or "made by krontune"
    if "kl_reduction" in recorded:
        facts["KL reduction (nats)"] = f"{recorded['kl_reduction']['selected']:.4f}"
        facts["KL reduction of a random pick of equal size"] = f"{recorded['kl_reduction']['control']:.4f}"
    cut = replace(picked, details=each_text(facts, lambda text: names.get(text, short_name(text))))
    dsir = Dsir.load(place / ESTIMATOR) if (place / ESTIMATOR / "dsir.json").is_file() else None
    write_dataset(cut, folder, _Picks(place / SELECTED, cut, names), dsir)
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def _pool(recipe: dict[str, Any], name: str) -> list[Any]:
    """The sources that the rows of a select or dedup stage come from in the end."""
    stages = dict(zip(_names(recipe), recipe["stages"], strict=True))
    kind = "dedup" if parts(name).kind == "select" else "select"
    named = stages[name].get("raw" if kind == "dedup" else "data")
    if named not in (None, kind):
        return _listed(named)
    before = [one for one in list(stages)[: list(stages).index(name)] if parts(one).kind == kind]
    return _pool(recipe, before[-1]) if before else []


class _Picks:
    """As many rows as the pool has: the picked ones where they stood, and nothing between them."""

    def __init__(self, file: Path, picked: Selection, names: Mapping[str, str]) -> None:
        self.file, self.picked, self.names = file, picked, names

    def __iter__(self) -> Iterator[dict[str, Any]]:
        chosen = set(self.picked.indices.tolist())
        with self.file.open(encoding="utf-8") as lines:
            for number in range(self.picked.pool_size):
                row = json.loads(next(lines)) if number in chosen else {}
                yield {**row, "source": self.names[row["source"]]} if row.get("source") in self.names else row


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise RunError(f"{file} is no safetensors file ({error}), whatever its name says; it is not pushed") from error


def _fetch_card(base: str) -> None:
    """The card of the base into the cache, where `card.licence` reads it; without it the licence is left out."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(base, CARD), str):
        try:
            hf_hub_download(base, CARD)
        except Exception:  # no such card, none that this token may read, no network: of many kinds
            return


def _refuse_paths(run: RunFiles, files: Files) -> None:
    """Stop where a folder of this machine is still named in what people read, or load by."""
    for name, content in files.items():
        if isinstance(content, Path) and not name.endswith("config.json"):
            continue
        text = content.read_text(encoding="utf-8") if isinstance(content, Path) else content.decode()
        for folder in _folders(run):
            if f"{folder}/" in text:
                raise RunError(f"{name} names a folder of this machine, {folder}, and is not pushed; take it out")
        if hide(text) != text:
            raise RunError(f"{name} holds what looks like a key or a password, and is not pushed; take it out")


def _folders(run: RunFiles) -> list[str]:
    folders = [run.path.absolute(), run.path.resolve(), Path.cwd(), Path.home()]
    return sorted({str(folder) for folder in folders if len(folder.parts) > 1}, key=len, reverse=True)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, Mapping) else ():
        yield from _texts(item)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------- the Hub


def _push_files(
    run: Path, kind: str, repo: str, files: Files, private: bool, overwrite: bool, say: Callable[[str], None]
) -> Pushed:
    try:
        done = _commit(run, kind, repo, files, private, overwrite)
    except RunError:
        raise
    except Exception as error:  # the Hub's, and the network library's, which differ between versions
        reason = " ".join(hide(str(error)).split()) or type(error).__name__
        again = f"krontune push {run} --{'dataset' if kind == 'dataset' else 'repo'} {repo}"
        raise RunError(f"not pushed to {repo}: {reason}; the run is kept as it is, and `{again}` goes on") from error
    say(str(done))
    return done


def _commit(run: Path, kind: str, repo: str, files: Files, private: bool, overwrite: bool) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    if get_token() is None:
        raise RunError(f"not pushed to {repo}: you are not logged in; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        info = api.repo_info(repo, repo_type=kind)
    except RepositoryNotFoundError:
        api.create_repo(repo, repo_type=kind, private=private)
        info = api.repo_info(repo, repo_type=kind)
    if private and not info.private:
        raise RunError(
            f"not pushed to {repo}: it is public, and what krontune pushes is private unless you say otherwise; give "
            "--public, or hub: {private: false} in the recipe"
        )
    there = {}
    if info.sha:
        tree = api.list_repo_tree(repo, recursive=True, revision=info.sha, repo_type=kind)
        there = {item.path: item for item in tree if isinstance(item, RepoFile)}
    prefix = "datasets/" if kind == "dataset" else ""
    address = f"{constants.ENDPOINT}/{prefix}{repo}"

    digests = {name: _digests(content) for name, content in files.items()}
    changed = [name for name in files if not _is_there(digests[name], there.get(name))]
    if not changed:
        _remember(run, address, digests)
        return Pushed(kind, repo, f"{address}/commit/{info.sha}", bool(info.private), 0)
    foreign = _foreign(there, changed, _remembered(run).get(address, {}))
    if foreign and not overwrite:
        raise RunError(
            f"not pushed to {repo}: it holds {', '.join(foreign[:5])}{' and more' if len(foreign) > 5 else ''}, which "
            "this run did not put there; give another repository, or --overwrite to replace what has the same name"
        )
    _remember(run, address, digests)  # before: a commit may arrive whose answer is lost
    operations = [CommitOperationAdd(name, content) for name, content in files.items() if name in changed]
    commit = api.create_commit(
        repo,
        operations,
        commit_message="Adapter, card and reports, by krontune" if kind == "model" else "Picked rows, by krontune",
        repo_type=kind,
        parent_commit=info.sha,  # refused where somebody else commits at the same time
    )
    return Pushed(kind, repo, str(commit.commit_url), bool(info.private), len(changed))


def _digests(content: bytes | Path) -> dict[str, str]:
    """By git's name of a file and by that of its large file storage."""
    data = content.read_bytes() if isinstance(content, Path) else content
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return {"git": git.hexdigest(), "sha256": hashlib.sha256(data).hexdigest()}


def _is_there(digests: Mapping[str, str], file: Any) -> bool:
    if file is None:
        return False
    return file.lfs.sha256 == digests["sha256"] if file.lfs is not None else file.blob_id == digests["git"]


def _foreign(there: Mapping[str, Any], changed: list[str], sent: Mapping[str, Any]) -> list[str]:
    """Files that this run did not send and would replace; in a repository it never pushed to, all files."""
    if not sent:
        return [name for name in there if name not in MADE_BY_THE_HUB]
    ours = {name: any(_is_there(one, there.get(name)) for one in sent.get(name, ())) for name in changed}
    return [name for name in changed if name in there and not ours[name]]


def _remembered(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _remember(run: Path, address: str, digests: Mapping[str, Any]) -> None:
    """Beside what was sent before: where a push is cut, the older one is what is there."""
    content = _remembered(run)
    sent = content.setdefault(address, {})
    for name, digest in digests.items():
        sent[name] = [*(one for one in sent.get(name, []) if one != digest), digest]
    write_atomic(run / RECORD, json.dumps(content, indent=1).encode())
