"""Pushing a run to a Hub that stands in for the real one, on 127.0.0.1 and in memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from typer.testing import CliRunner

from krontune.adapters.embedded import HUB_ID
from krontune.cli import app
from krontune.data_selection import Dsir
from krontune.recipes import push
from krontune.recipes.run_folder import RunError

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "recipe.yaml",
    "report.html",
    "rlvr_report.json",
    "tokenizer_config.json",
}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run that is done, over a pool in a folder that nobody needs to know."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    pool = tmp_path / "home" / "pool.jsonl"
    rows = [{"text": f"word{i % 5} stone {i}", "source": str(pool)} for i in range(20)]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "runs" / "one"
    dsir = Dsir(buckets=500).fit(target=["word3 stone"], raw=pool)
    picked = dsir.select(pool, k=4)
    picked.save(path / "select" / "selection")
    dsir.save(path / "select" / "dsir")
    chosen = [rows[i] for i in picked.indices]
    (path / "select" / "selected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    counts = {part: {str(pool): n} for part, n in (("pool", 20), ("selected", 4), ("control", 4))}
    stages = {
        "select": {"seconds": 1.0, "n": 4, "pool": 20, "method": "gumbel", "sources": counts},
        "sft": {"seconds": 3.0, "steps": 5, "trainable_parameters": 12, "parameters": 99},
    }
    (path / "sft").mkdir()
    for name in stages:
        (path / name / "done").write_text("{}")
    record = {"name": "one", "seed": 0, "stages": stages, "data": {}, "machine": {}, "versions": {"krontune": "0.1.0"}}
    (path / "run.json").write_text(json.dumps(record))
    recipe = {
        "name": "one",
        "base": {"model": "smollm2-135m", "quantization": "nf4"},
        "stages": [
            {"stage": "select", "raw": [str(pool)], "target": "~/mine.txt"},
            {"stage": "sft"},
        ],
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    adapter = path / "adapter"
    adapter.mkdir()
    save_file({"a": torch.zeros(3)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "MOKA", "r": 4, "base_model_name_or_path": HUB_ID})
    )
    (adapter / "tokenizer_config.json").write_text("{}")
    return path


def quiet(line: str) -> None:
    pass


def pushed(run, *arguments, **options):
    return push(run, *arguments, say=quiet, **options)


def krontune(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# ---------------------------------------------------------------- what is pushed


def test_a_push_is_one_commit_of_the_adapter_the_card_the_recipe_and_the_reports_and_private(run, hub):
    said = krontune("push", run, "--repo", "me/one")
    assert said.exit_code == 0, said.output
    repo = hub.model("me/one")
    assert repo.private and len(repo.commits) == 2 and set(repo.files) == {*FILES, ".gitattributes"}
    assert said.stdout == f"adapter: pushed 7 files in one commit, {hub.url}/me/one/commit/{repo.sha} (private)\n"
    assert repo.files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(repo.files["adapter_config.json"]) == {
        "peft_type": "MOKA",
        "r": 4,
        "base_model_name_or_path": HUB_ID,
    }


def test_nothing_that_is_pushed_names_a_folder_of_this_machine(run, hub, tmp_path):
    pushed(run, "me/one", "me/rows")
    assert "home" in (run / "recipe.yaml").read_text()
    for repo in hub.repos.values():
        for name, data in repo.files.items():
            assert str(tmp_path).encode() not in data and b"~/" not in data, name
    files = hub.model("me/one").files
    for name in ("README.md", "recipe.yaml", "report.html"):
        assert b"pool.jsonl" in files[name], name


def test_the_report_that_is_pushed_shows_no_row_of_the_data(run, hub):
    from krontune.recipes.compare import publish

    assert "stone" in publish(run).read_text()
    pushed(run, "me/one")
    assert b"stone" not in hub.model("me/one").files["report.html"]


def test_the_card_has_metadata_that_the_hub_takes_and_says_how_to_load_this_repository(run, hub):
    pushed(run, "me/one")
    card = ModelCard(hub.model("me/one").files["README.md"].decode())
    card.validate()
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": HUB_ID,
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["krontune", "moka", "4-bit", "sft"],
    }
    assert 'adapter = "me/one"' in card.text and "import krontune.adapters" in card.text
    assert f'load_base("{HUB_ID}", "nf4")' in card.text


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "state.pkl"])
def test_a_pickle_is_never_pushed(run, hub, name):
    (run / "adapter" / name).write_bytes(b"x")
    with pytest.raises(RunError, match=f"{name} may run code when it is loaded"):
        pushed(run, "me/one")
    assert hub.repos == {}


def test_a_pickle_under_another_name_is_not_pushed_either(run, hub):
    torch.save({"a": 1}, run / "adapter" / "adapter_model.safetensors")
    with pytest.raises(RunError, match="is no safetensors file"):
        pushed(run, "me/one")
    assert hub.repos == {}


def test_what_is_no_file_of_an_adapter_is_left_out_and_named(run, hub, tmp_path):
    (run / "adapter" / "notes.md").write_text("mine")
    (run / "adapter" / "secret.json").symlink_to(tmp_path / "home" / "pool.jsonl")
    (run / "adapter" / "checkpoint-1").mkdir()
    lines = []
    push(run, "me/one", say=lines.append)
    assert [line.split()[2] for line in lines[:3]] == ["checkpoint-1", "notes.md", "secret.json"]
    assert set(hub.model("me/one").files) == {*FILES, ".gitattributes"}


def test_a_base_in_a_folder_needs_a_hub_id(run, hub, tmp_path):
    config = {"peft_type": "MOKA", "base_model_name_or_path": str(tmp_path / "home")}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="'home', a folder of this machine.*--base-model owner/name"):
        pushed(run, "me/one")
    assert hub.repos == {}
    pushed(run, "me/one", base_model="big/base")
    sent = json.loads(hub.model("me/one").files["adapter_config.json"])
    assert sent["base_model_name_or_path"] == "big/base"
    assert ModelCard(hub.model("me/one").files["README.md"].decode()).data.base_model == "big/base"


def test_the_cache_folder_of_the_embedded_model_becomes_its_hub_id(run, hub):
    from krontune.adapters.embedded import NAME, cache_folder

    config = {"peft_type": "MOKA", "base_model_name_or_path": str(cache_folder() / f"{NAME}-0.1.2")}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    pushed(run, "me/one")
    assert json.loads(hub.model("me/one").files["adapter_config.json"])["base_model_name_or_path"] == HUB_ID


def test_the_revision_of_the_base_is_kept_for_those_who_load_the_adapter(run, hub):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["base"]["revision"] = "v1"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pushed(run, "me/one")
    assert json.loads(hub.model("me/one").files["adapter_config.json"])["revision"] == "v1"


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit", {"license": "mit"}),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE",
            {
                "license": "other",
                "license_name": "own",
                "license_link": "https://huggingface.co/big/base/blob/main/LICENSE",
            },
        ),
        ("tags: [x]", {}),
        (None, {}),
    ],
)
def test_the_licence_is_that_of_the_base_and_never_guessed(run, hub, front, expected):
    from loopback_hub import Repo

    if front is not None:
        hub.repos["model", "big/base"] = Repo(False, [{"README.md": f"---\n{front}\n---\n# base\n".encode()}])
    pushed(run, "me/one", base_model="big/base")
    data = ModelCard(hub.model("me/one").files["README.md"].decode()).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected


def test_the_card_names_data_sets_of_the_hub_and_no_files(run, hub, tmp_path):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stages"][0]["push"] = "me/picks"
    sources = ["local.jsonl", {"hub": "big/math"}, {"hub": str(tmp_path)}, {"hub": "../data"}]
    recipe["stages"].append({"stage": "rl", "data": sources})
    (run / "rl").mkdir()
    (run / "rl" / "done").write_text("{}")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pushed(run, "me/one")
    assert ModelCard(hub.model("me/one").files["README.md"].decode()).data.datasets == ["me/picks", "big/math"]


# ---------------------------------------------------------------- again, and after a cut


def test_a_second_push_makes_no_commit_and_says_so(run, hub):
    pushed(run, "me/one")
    said = krontune("push", run, "--repo", "me/one")
    assert said.exit_code == 0 and said.stdout.startswith("adapter: nothing changed")
    assert len(hub.model("me/one").commits) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cut_push_is_resumed_by_the_same_command_and_makes_one_commit(run, hub, when):
    hub.drop = when
    said = krontune("push", run, "--repo", "me/one")
    assert said.exit_code == 1 and "Traceback" not in said.stderr
    assert said.stderr.startswith("not pushed to me/one: ") and f"krontune push {run} --repo me/one" in said.stderr
    assert len(hub.model("me/one").commits) == (2 if when == "after" else 1)
    again = krontune("push", run, "--repo", "me/one")
    assert again.exit_code == 0 and len(hub.model("me/one").commits) == 2
    assert set(hub.model("me/one").files) == {*FILES, ".gitattributes"}


def test_only_what_changed_is_sent_and_a_cut_in_between_does_not_make_it_foreign(run, hub):
    pushed(run, "me/one")
    (run / "adapter" / "tokenizer_config.json").write_text('{"a": 1}')
    hub.drop = "before"
    with pytest.raises(RunError, match="not pushed"):
        pushed(run, "me/one")
    (run / "adapter" / "tokenizer_config.json").write_text('{"a": 2}')
    [done] = pushed(run, "me/one")
    assert done.files == 1 and len(hub.model("me/one").commits) == 3
    assert hub.model("me/one").files["tokenizer_config.json"] == b'{"a": 2}'


def test_files_of_somebody_else_are_not_replaced_unless_asked(run, hub):
    from loopback_hub import Repo

    hub.repos["model", "me/one"] = theirs = Repo(True)
    theirs.put(README__md=b"# theirs", weights__safetensors=b"x")
    with pytest.raises(RunError, match="holds README.md, weights.safetensors, which this run did not put there"):
        pushed(run, "me/one")
    assert len(theirs.commits) == 2
    pushed(run, "me/one", overwrite=True)
    assert theirs.files["README.md"] != b"# theirs" and theirs.files["weights.safetensors"] == b"x"


def test_a_file_edited_on_the_hub_is_not_replaced_and_one_added_there_is_no_matter(run, hub):
    pushed(run, "me/one")
    hub.model("me/one").put(picture__png=b"x")
    (run / "adapter" / "tokenizer_config.json").write_text('{"a": 1}')
    pushed(run, "me/one")
    assert hub.model("me/one").files["picture.png"] == b"x"
    hub.model("me/one").put(tokenizer_config__json=b"{}  ")
    with pytest.raises(RunError, match="holds tokenizer_config.json, which this run did not put there"):
        pushed(run, "me/one")


def test_a_commit_of_somebody_else_at_the_same_time_stops_the_push(run, hub, monkeypatch):
    from huggingface_hub import HfApi

    real = HfApi.create_commit

    def late(self, repo, *arguments, **options):
        hub.model(repo).put(other__txt=b"x")
        return real(self, repo, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(RunError, match="not pushed to me/one.*A commit has happened since"):
        pushed(run, "me/one")
    assert set(hub.model("me/one").files) == {".gitattributes", "other.txt"}


# ---------------------------------------------------------------- refusals


def test_a_public_repository_is_only_pushed_to_when_it_is_asked_for(run, hub):
    from loopback_hub import Repo

    hub.repos["model", "me/one"] = Repo(False)
    with pytest.raises(RunError, match="it is public.*--public"):
        pushed(run, "me/one")
    assert krontune("push", run, "--repo", "me/one", "--public").exit_code == 0
    assert krontune("push", run, "--repo", "me/two", "--public").exit_code == 0
    assert not hub.model("me/two").private


def test_a_card_that_the_hub_refuses_is_named_and_nothing_is_sent(run, hub):
    hub.refuse_card = '"license" must be one of [...]'
    with pytest.raises(RunError, match=r'Invalid metadata in README.md. - "license" must be one of'):
        pushed(run, "me/one")
    assert len(hub.model("me/one").commits) == 1


def test_without_a_login_nothing_is_asked(run, hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(RunError, match="you are not logged in"):
        pushed(run, "me/one")
    assert not [path for _, path in hub.asked if "repo" in path or "/models/" in path]


def test_a_push_needs_a_run_that_is_done_and_a_place(run, hub, tmp_path):
    with pytest.raises(RunError, match="nothing says where to push: give --repo"):
        pushed(run)
    with pytest.raises(RunError, match="is no run folder"):
        pushed(tmp_path, "me/one")
    (run / "sft" / "done").unlink()
    with pytest.raises(RunError, match="sft is not done"):
        pushed(run, "me/one")
    record = json.loads((run / "run.json").read_text())
    begun = record["stages"].pop("sft")  # as a stage leaves it that runs anew and is cut
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="sft is not done"):
        pushed(run, "me/one")
    record["stages"]["sft"] = begun
    (run / "run.json").write_text(json.dumps(record))
    (run / "sft" / "done").write_text("{}")
    shutil.rmtree(run / "adapter")
    with pytest.raises(RunError, match="holds no adapter"):
        pushed(run, "me/one")
    shutil.rmtree(run / "select")
    (run / "select").mkdir()
    (run / "select" / "done").write_text("{}")
    with pytest.raises(RunError, match="holds no selection"):
        pushed(run, dataset="me/rows")


def test_a_name_that_is_no_id_is_refused_by_the_client(run, hub):
    with pytest.raises(RunError, match="not pushed to my model: Repo id must"):
        pushed(run, "my model")


# ---------------------------------------------------------------- rows


def test_the_picked_rows_are_pushed_as_a_data_set_with_a_card_without_reading_the_pool(run, hub, tmp_path):
    import datasets

    (tmp_path / "home" / "pool.jsonl").unlink()
    said = krontune("push", run, "--dataset", "me/rows")
    assert said.exit_code == 0, said.output
    assert said.stdout.startswith("data set: pushed 4 files in one commit") and "model" not in dict(hub.repos)
    repo = hub.dataset("me/rows")
    assert repo.private and len(repo.commits) == 2
    (tmp_path / "train.parquet").write_bytes(repo.files["data/train.parquet"])
    rows = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet")).to_list()
    kept = [json.loads(line) for line in (run / "select" / "selected.jsonl").read_text().splitlines()]
    assert rows == [{**row, "source": "pool.jsonl"} for row in kept]
    card = repo.files["README.md"].decode()
    assert "| pool | pool.jsonl |" in card and "| rows of the pool | 20 |" in card and "DSIR" in card
    assert krontune("push", run, "--dataset", "me/rows").stdout.startswith("data set: nothing changed")


def test_the_recipe_may_name_both(run, hub):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["hub"] = {"repo": "me/one", "dataset": "me/rows", "private": False, "base_model": None}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert [(one.kind, one.private) for one in pushed(run)] == [("dataset", False), ("model", False)]
    assert ModelCard(hub.model("me/one").files["README.md"].decode()).data.datasets == ["me/rows"]
