"""The dedup stage: what stays, what goes and why, where a cut stage goes on, what stages after it read, and faults."""

import json
import random
from pathlib import Path

import pytest

from krontune.recipes import dedup
from krontune.recipes.card import _datasets
from krontune.recipes.compare import publish
from krontune.recipes.dedup import removed_rows, run_dedup
from krontune.recipes.faults import RecipeError
from krontune.recipes.hub import _pool
from krontune.recipes.loader import load
from krontune.recipes.needs import notes
from krontune.recipes.plan import plan
from krontune.recipes.preflight import check
from krontune.recipes.run_folder import RunError, RunFolder, recipe_text
from krontune.recipes.select import run_select
from krontune.recipes.steps import steps

from .conftest import write_rows

HEAD = "name: clean\nbase: {model: smollm2-135m}\nstages:\n"
SELECT = "- {stage: select, target: target.jsonl, k: 4}\n"
WORDS = [f"word{n}" for n in range(60)]


def edited(rng, text: str) -> str:
    words = text.split()
    words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """a.jsonl, b.jsonl: texts of forty words, a third of them copies with a word changed or with other letter case;
    exam.jsonl: one of them."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(1)
    texts: list[str] = []
    while len(texts) < 60:
        kind = rng.random() if texts else 1.0
        new = " ".join(rng.choices(WORDS, k=40))
        texts.append(
            edited(rng, rng.choice(texts)) if kind < 0.2 else rng.choice(texts).upper() if kind < 0.35 else new
        )
    write_rows(tmp_path / "a.jsonl", [{"text": text, "source": "mine", "n": n} for n, text in enumerate(texts[:30])])
    write_rows(tmp_path / "b.jsonl", [{"text": text, "n": n} for n, text in enumerate(texts[30:], start=30)])
    write_rows(tmp_path / "exam.jsonl", [{"text": texts[0]}])
    write_rows(tmp_path / "target.jsonl", [{"text": " ".join(WORDS)}])
    return tmp_path


def recipe_of(stages: str):
    Path("r.yaml").write_text(HEAD + stages)
    return load("r.yaml")


def dedup_in(stages: str = "- {stage: dedup, data: [a.jsonl, b.jsonl]}\n", name="run"):
    """Run the first stage; its folder and what run.json says of it."""
    recipe = recipe_of(stages)
    assert check(recipe) == []
    with RunFolder(name, recipe) as run:
        run_dedup(recipe, steps(recipe)[0], run)
    return Path(name) / "dedup", run.record["stages"]["dedup"]


def rows_of(*files) -> list[dict]:
    return [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]


def shingles(text: str) -> set:
    words = text.lower().split()
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def test_each_row_stays_or_is_as_like_a_row_that_stays_as_the_file_says(data):
    folder, facts = dedup_in()
    pool = rows_of("a.jsonl", "b.jsonl")
    kept, removed = rows_of(folder / "kept.jsonl"), list(removed_rows(folder))
    assert sorted([row["n"] for row in kept] + [row["row"] for row in removed]) == list(range(60))
    assert {row["source"] for row in kept} == {"mine", "b.jsonl"}
    kinds = []
    for row in removed:
        stays = kept[row["kept_line"] - 1]
        assert stays["n"] == row["duplicate_of"] < row["row"] and row["text"] == pool[row["row"]]["text"]
        one, other = shingles(row["text"]), shingles(stays["text"])
        assert row["similarity"] == pytest.approx(len(one & other) / len(one | other)) and row["similarity"] >= 0.7
        kinds.append(row["copy"])
    for place, one in enumerate(kept):
        for other in kept[:place]:
            a, b = shingles(one["text"]), shingles(other["text"])
            assert len(a & b) / len(a | b) < 0.7
    assert {"exact", "near"} == set(kinds)
    assert (facts["rows"], facts["kept"], facts["removed"]) == (60, len(kept), len(removed))
    assert facts["left_out"] == {kind: kinds.count(kind) for kind in ("exact", "near")}
    line = json.loads(Path("run/metrics.jsonl").read_text())
    assert line["stage"] == "dedup" and (line["rows"], line["kept"]) == (60, len(kept))
    assert line["removed/exact"] == kinds.count("exact") and line["removed/near"] == kinds.count("near")
    page = publish(Path("run")).read_text()
    assert f"{len(kept)} of 60 rows stay" in page and "near copy of row" in page and "The least alike" in page


def test_the_page_shows_rows_whose_messages_have_parts(data):
    def row(words):
        asked = [{"type": "image"}, {"type": "text", "text": " ".join(words)}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]
        return {"messages": turns, "images": []}

    write_rows(data / "parts.jsonl", [row(WORDS), row([*WORDS[:-1], "other"])])
    folder, _ = dedup_in("- {stage: dedup, data: parts.jsonl}\n")
    assert [one["copy"] for one in removed_rows(folder)] == ["near"]
    assert f"<pre>{' '.join(WORDS)[:200]}" in publish(Path("run")).read_text()


def test_a_row_with_a_forbidden_text_goes_and_says_which(data):
    folder, facts = dedup_in("- {stage: dedup, data: a.jsonl, method: none, against: {exam: exam.jsonl}}\n")
    removed = list(removed_rows(folder))
    assert removed[0]["row"] == 0 and all((row["against"], row["against_row"]) == ("exam", 0) for row in removed)
    assert facts["left_out"] == {"against:exam": len(removed)} and facts["kept"] == 30 - len(removed)
    with pytest.raises(RunError, match="dedup: no row is left"):
        dedup_in("- {stage: dedup, data: exam.jsonl, against: {exam: exam.jsonl}}\n", "none")
    assert not Path("none/dedup/done").exists()


def test_a_cut_stage_goes_on_with_the_copies_it_found_unless_the_data_changed(data, monkeypatch):
    whole, _ = dedup_in()
    split, find, calls = dedup._split, dedup.deduplicate, []

    def noting(*args, **rules):
        calls.append(rules["method"])
        return find(*args, **rules)

    def cut(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(dedup, "deduplicate", noting)
    monkeypatch.setattr(dedup, "_split", cut)
    with pytest.raises(KeyboardInterrupt):
        dedup_in(name="cut")
    monkeypatch.setattr(dedup, "_split", split)
    again, _ = dedup_in(name="cut")
    assert calls == ["near"]
    for name in ("kept.jsonl", "removed.jsonl"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    (again / "done").unlink()
    write_rows(data / "b.jsonl", rows_of("b.jsonl")[:10])
    _, facts = dedup_in(name="cut")
    assert calls == ["near", "near"] and facts["rows"] == 40


def test_the_kept_rows_are_the_pool_of_a_select_stage_without_raw(data):
    dedup_in()
    recipe = recipe_of("- {stage: dedup, data: [a.jsonl, b.jsonl]}\n- {stage: select, target: target.jsonl, k: 0.5}\n")
    assert check(recipe) == [] and steps(recipe)[1].needs == ("dedup",)
    with RunFolder("run", recipe) as run:
        run_select(recipe, steps(recipe)[1], run)
    kept, facts = rows_of("run/dedup/kept.jsonl"), run.record["stages"]["select"]
    assert facts["pool"] == len(kept) and facts["n"] == 20
    assert all(row in kept for row in rows_of("run/select/selected.jsonl"))
    write_rows(data / "kept.jsonl", kept)
    recipe = recipe_of("- {stage: select, raw: kept.jsonl, target: target.jsonl, k: 0.5}\n")
    with RunFolder("other", recipe) as run:
        run_select(recipe, steps(recipe)[0], run)
    assert rows_of("other/select/selected.jsonl") == rows_of("run/select/selected.jsonl")


def test_a_dedup_stage_looks_through_what_was_picked(data):
    stages = "- {stage: select, raw: a.jsonl, target: target.jsonl, k: 20}\n- {stage: dedup, data: select}\n"
    recipe = recipe_of(stages + "- {stage: sft, data: dedup}\n")
    select, after, sft = steps(recipe)
    assert check(recipe) == [] and (after.rows, sft.rows) == ("select", "dedup")
    with RunFolder("run", recipe) as run:
        run_select(recipe, select, run)
        run_dedup(recipe, after, run)
    assert run.record["stages"]["dedup"]["rows"] == 20


def test_sources_are_named_as_the_recipe_names_them(data):
    dedup = "- {stage: dedup, data: [a.jsonl, {path: b.jsonl, text: text}]}\n"
    recipe = recipe_of(dedup + SELECT.replace("k: 4", "k: 4, source_caps: {./b.jsonl: 1}"))
    assert check(recipe) == []
    with RunFolder("run", recipe) as run:
        for step, stage in zip(steps(recipe), (run_dedup, run_select), strict=True):
            stage(recipe, step, run)
    picked = rows_of("run/select/selected.jsonl")
    assert len(picked) == 4 and sum(row["source"] == "b.jsonl" for row in picked) <= 1
    whole = recipe.model_dump()
    assert [one if isinstance(one, str) else one["path"] for one in _pool(whole, "select")] == ["a.jsonl", "b.jsonl"]
    own = recipe_of("- {stage: dedup, data: {hub: me/rows}}\n" + SELECT).model_dump()
    assert list(_datasets(own)) == ["me/rows"]


def test_plan_and_check_know_the_stage_and_the_kept_recipe_begins_with_its_kind(data):
    recipe = recipe_of("- {stage: dedup, data: a.jsonl}\n" + SELECT + "- {stage: sft, trainer: {max_steps: 1}}\n")
    assert [(one.stage, one.rows) for one in plan(recipe, probe=False).stages][:2] == [("dedup", 30), ("select", 4)]
    assert "- stage: dedup\n" in recipe_text(recipe)
    again = Path("again.yaml")
    again.write_text(recipe_text(recipe))
    assert load(again).model_dump() == recipe.model_dump()
    recipe = recipe_of("- {stage: dedup, data: a.jsonl}\n" + SELECT.replace("target:", "raw: b.jsonl, target:"))
    assert any("no stage reads the rows that dedup keeps" in note for note in notes(recipe))


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        ("- {stage: dedup}\n", "r.yaml:4:3: missing key 'data' (The rows to look through: sources, or select, what"),
        ("- {stage: dedup, data: a.jsonl, treshold: 1}\n", "r.yaml:4:33: unknown key 'treshold'; did you mean 'thr"),
        ("- {stage: dedup, data: a.jsonl, threshold: 1.5}\n", "r.yaml:4:33: threshold: must be less than or equal to"),
        ("- {stage: dedup, data: no.jsonl}\n", "r.yaml:4:18: data: there is no file 'no.jsonl'"),
        ("- {stage: dedup, data: bad.jsonl}\n", "r.yaml:4:18: bad.jsonl:2: not JSON"),
        ("- {stage: dedup, data: empty.jsonl}\n", "r.yaml:4:18: data is empty: its sources hold no rows"),
        ("- {stage: dedup, data: a.jsonl, method: code}\n", "r.yaml:4:33: method='code': give language"),
        ("- {stage: dedup, data: a.jsonl, language: python}\n", "r.yaml:4:33: language='python' with method='near'"),
        ("- {stage: dedup, data: a.jsonl, method: none}\n", "r.yaml:4:33: method='none' without against"),
        ("- {stage: dedup, data: a.jsonl, against: {x: no.txt}}\n", "r.yaml:4:43: against.x: there is no file 'no.t"),
        ("- {stage: dedup, data: select}\n", "r.yaml:4:18: the dedup stage looks through what 'select' picked, and no"),
        ("- {stage: sft, data: dedup}\n", "r.yaml:4:16: the sft stage trains on what 'dedup' kept, and none comes be"),
        (SELECT, "r.yaml:4:4: missing key 'raw' (The pool to pick from; or put a dedup stage before)"),
        (SELECT.replace("target:", "raw: dedup, target:"), "r.yaml:4:4: missing key 'raw' (The pool to pick from; or"),
        ("- {stage: dedup, data: a.jsonl}\n- {stage: sft}\n", "r.yaml:5:4: the sft stage trains on what 'select' pi"),
        (
            "- {stage: dedup, data: a.jsonl}\n- {stage: sft, data: dedup, controls: [random]}\n",
            "r.yaml:5:29: a random control needs the pool of a select stage; give data: select",
        ),
        ("- {stage: dedup, data: a.jsonl}\n" + SELECT.replace("k: 4", "k: 31"), "r.yaml:5:41: k is 31 and dedup looks"),
    ],
)
def test_faults_stand_at_their_place_and_say_what_to_do(data, stages, fault):
    Path("bad.jsonl").write_text('{"text": "a"}\nno\n')
    Path("empty.jsonl").write_text("")
    try:
        found = [str(one) for one in check(recipe_of(stages))]
    except RecipeError as error:
        found = str(error).split("\n")
    assert len(found) == 1 and found[0].startswith(fault), found
