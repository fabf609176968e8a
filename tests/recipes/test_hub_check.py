"""What `check` finds out about a push before anything is trained, on the loopback Hub."""

import pytest
from loopback_hub import Repo
from typer.testing import CliRunner

from krontune.cli import app
from krontune.recipes.hub_check import hub_faults, hub_notes
from krontune.recipes.loader import load
from krontune.recipes.needs import notes
from krontune.recipes.preflight import check


def faults_of(small, *overrides):
    return [message for _, message in hub_faults(load(small, overrides))]


def test_a_recipe_that_can_be_pushed_has_no_fault_and_no_note_and_nothing_is_made(small, hub):
    recipe = load(small, ["hub.repo=me/new", "hub.dataset=lab/rows"])
    assert check(recipe) == [] and notes(recipe) == []
    assert hub.repos == {} and ("GET", "/api/whoami-v2") in hub.asked and ("POST", "/api/validate-yaml") in hub.asked


def test_without_a_place_to_push_to_the_hub_is_not_asked(small, hub):
    assert faults_of(small) == [] and hub_notes(load(small)) == [] and hub.asked == []


def test_the_command_names_the_line_and_exits_with_2(small, hub):
    small.write_text(small.read_text() + "hub: {repo: someone/model}\n")
    done = CliRunner().invoke(app, ["check", str(small)])
    assert done.exit_code == 2
    place = f"{small}:{len(small.read_text().splitlines())}:7: "
    assert (
        done.stderr
        == f"{place}your token is of 'me', who is no member of 'someone'; it may push to: me, lab, library\n"
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hub.repo='my model'"], "Repo id must use alphanumeric chars"),
        (["hub.repo=a/b/c"], "Repo id must be in the form"),
        (["hub.repo=model"], "repo 'model' has no owner; write owner/model"),
        (["hub.repo=me/x", "hub.base_model='/a/b'"], "Repo id must be in the form"),
        (["hub.repo=me/x", "stages=[{stage: select, raw: a.txt, target: b.txt, k: 1}]"], "no adapter to push"),
        (["hub.dataset=me/x", "stages=[{stage: sft, data: a.txt}]"], "there are no rows to push"),
        (["hub.dataset=me/x", "stages.select.push=me/x"], "pushes the same rows; leave one of them out"),
        (["hub.repo=me/x", "base.model=./folder"], "'./folder' is a folder of this machine.*base_model: owner/name"),
    ],
)
def test_what_can_never_be_pushed_is_a_fault_and_found_without_the_hub(small, hub, overrides, said):
    import re

    faults = faults_of(small, *overrides)
    assert len(faults) == 1 and re.search(said, faults[0]), faults
    assert hub.asked == []


def test_the_rows_pushed_are_those_of_the_last_select_stage_whatever_an_earlier_one_does(small, hub):
    sequence = "{stage: select, method: adapt_inf, datasets: [{name: a, raw: pool.jsonl}], k: 1}"
    other = "{stage: select, raw: pool.jsonl, target: target.jsonl, k: 1%s}"
    for first, last in ((sequence, other % ""), (other % ", push: me/y", other % "")):
        listed = f"stages=[{first}, {{stage: sft}}, {last}]"
        assert faults_of(small, "hub.dataset=me/x", listed) == []
    [fault] = faults_of(small, "hub.dataset=me/x", f"stages=[{other % ''}, {other % ', push: me/x'}]")
    assert "pushes the same rows" in fault


def test_no_token_is_a_fault(small, hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "you are not logged in" in faults_of(small, "hub.repo=me/x")[0] and hub.asked == []


def test_a_token_that_the_hub_does_not_know_is_a_fault_that_does_not_show_it(small, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped12345")
    [fault] = faults_of(small, "hub.repo=me/x")
    assert "does not know your token" in fault and "hf_mistyped" not in fault


def token(**rights):
    return {"accessToken": {"displayName": "t", **rights}}


def scoped(kind, name, *permissions):
    scope = [{"entity": {"type": kind, "name": name}, "permissions": list(permissions)}]
    return token(role="fineGrained", fineGrained={"global": [], "scoped": scope})


@pytest.mark.parametrize(
    ("repo", "auth", "fault"),
    [
        ("me/x", token(role="read"), "your token may only read"),
        ("me/x", token(role="write"), None),
        ("library/x", token(role="write"), "'me' may only read in the organisation 'library'"),
        ("lab/x", scoped("org", "lab", "repo.content.read", "repo.write"), None),
        ("lab/x", scoped("user", "me", "repo.write"), "has no write access to 'lab/x'"),
        ("me/x", scoped("user", "me", "repo.content.read"), "has no write access to 'me/x'; give it 'repo.write'"),
        ("me/x", scoped("model", "me/x", "repo.write"), None),
        ("me/x", scoped("dataset", "me/x", "repo.write"), "has no write access"),
        ("me/x", {"type": "oauth"}, None),
    ],
)
def test_a_token_has_to_be_one_that_may_write_there(small, hub, repo, auth, fault):
    hub.who["auth"] = auth
    found = faults_of(small, f"hub.repo={repo}")
    assert not found if fault is None else fault in found[0], found


def test_a_public_repository_is_a_fault_and_one_with_files_a_note(small, hub):
    hub.repos["model", "me/x"] = repo = Repo(True)
    recipe = load(small, ["hub.repo=me/x"])
    assert faults_of(small, "hub.repo=me/x") == [] and hub_notes(recipe) == []
    repo.put(a__txt=b"x")
    [note] = hub_notes(recipe)
    assert "'me/x' on the Hub holds 1 files already, a.txt among them" in note
    repo.private = False
    assert "is there and public" in faults_of(small, "hub.repo=me/x")[0]
    assert faults_of(small, "hub.repo=me/x", "hub.private=false") == []


def test_a_card_that_the_hub_refuses_is_a_fault_before_training(small, hub):
    hub.refuse_card = '"base_model" is not valid'
    [fault] = faults_of(small, "hub.repo=me/x")
    assert "refuses the model card" in fault and '"base_model" is not valid' in fault


def test_a_hub_out_of_reach_is_a_note_and_no_fault(small, hub, monkeypatch):
    from huggingface_hub import constants

    recipe = load(small, ["hub.repo=me/x"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert list(hub_faults(recipe)) == []
    [note] = hub_notes(recipe)
    assert "the Hub could not be asked" in note and "me/x" in note
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert list(hub_faults(recipe)) == []
    assert hub_notes(recipe) == ["HF_HUB_OFFLINE is set: whether the run can be pushed to me/x was not checked"]
