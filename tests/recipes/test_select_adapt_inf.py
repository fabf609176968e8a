"""The select stage with method adapt_inf, on a tiny model: picks, controls, where a cut stage goes on, faults."""

import importlib.util
import json
from pathlib import Path

import pytest

from krontune.data_selection import AdaptInf, Selection, Store
from krontune.recipes import lifelong as lifelong_stage
from krontune.recipes import select_adapt_inf
from krontune.recipes.chain import run as run_recipe
from krontune.recipes.compare import publish
from krontune.recipes.faults import RecipeError
from krontune.recipes.loader import load
from krontune.recipes.preflight import check
from krontune.recipes.run_folder import RunError, RunFolder
from krontune.recipes.select_adapt_inf import run_adapt_inf
from krontune.recipes.steps import steps

from .conftest import write_rows

specification = importlib.util.spec_from_file_location(
    "tiny_adapters", Path(__file__).parents[1] / "data_selection" / "tiny_adapters.py"
)
tiny = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tiny)

HEAD = "name: picks\nbase: {model: ./tiny, quantization: null}\nstages:\n"
PICK = "method: adapt_inf; raw: pool.jsonl; k: 12; clusters: 2"
BASE = f"{PICK}; warm_up: {{steps: 2, batch_size: 4}}"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch, tiny_folder):
    """pool.jsonl: sums and spelled words; tiny: the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_folder)
    sums = [{"prompt": f"{n}+{n}=", "completion": f"{2 * n}", "source": "sums", "n": n} for n in range(20)]
    words = [{"text": "".join(chr(97 + (n * k) % 26) for k in range(9)), "source": "words"} for n in range(20)]
    write_rows(tmp_path / "pool.jsonl", [row for pair in zip(sums, words, strict=True) for row in pair])
    return tmp_path


def recipe_of(folder, keys: str, rest: str = ""):
    lines = "".join(f"    {line}\n" for line in keys.split("; "))
    (folder / "r.yaml").write_text(HEAD + "  - stage: select\n" + lines + rest)
    return load(folder / "r.yaml")


def select_in(folder, keys: str = BASE, name="run"):
    recipe = recipe_of(folder, keys)
    assert check(recipe) == []
    with RunFolder(folder / name, recipe) as run:
        run_adapt_inf(recipe, steps(recipe)[0], run)
    return folder / name / "select", run.record["stages"]["select"]


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_picks_are_those_of_adapt_inf_on_the_store_beside_them(data):
    folder, facts = select_in(data)
    expected = AdaptInf(clusters=2).select(Store(folder / "store"), budget=12, seed=0)
    picked = Selection.load(folder / "selection")
    assert picked == expected and facts["n"] == 12 and facts["pool"] == 40
    pool = rows_of(data / "pool.jsonl")
    assert rows_of(folder / "selected.jsonl") == [pool[i] for i in picked.indices]
    assert rows_of(folder / "control.jsonl") == [pool[i] for i in picked.control.indices]
    balanced = AdaptInf(clusters=2, selector="random").select(Store(folder / "store"), budget=12, seed=0)
    assert rows_of(folder / "balanced.jsonl") == [pool[i] for i in balanced.indices]
    assert sum(facts["sources"]["selected"].values()) == 12 and facts["sources"]["pool"] == {"sums": 20, "words": 20}
    assert [one["rows"] for one in facts["clusters"]] and "warmed up for 2 steps" in facts["scored_with"]


def test_the_warm_up_scores_the_answers_alone(data, projected):
    write_rows(data / "pool.jsonl", [{"prompt": f"{n}+{n}=", "completion": "7"} for n in range(12)])
    select_in(data)
    assert projected == [4 * 2, 4 * 2], "four rows a step, each with an answer of one token and the end"


def test_settings_reach_the_scores_and_the_selection(data):
    keys = "scores: [nll, grand]; selector: grand; trim: 0.1; bins: 7; projection: 64; gradients: all; max_length: 8"
    folder, facts = select_in(data, f"{BASE.replace('k: 12', 'k: 0.25')}; {keys}")
    store = Store(folder / "store")
    assert store.vectors.shape == (40, 64) and list(store.scores) == ["nll", "grand"]
    assert store.key["layers"] == [0, 1] and store.key["max_length"] == 8
    assert facts["n"] == 10 and {one["selector"] for one in facts["clusters"]} == {"grand"}


@pytest.mark.slow
def test_both_factors_of_all_gradients_are_projected_where_a_side_is_given(data):
    folder, _ = select_in(data, f"{BASE}; gradients: all; projection: {{side: 4}}; adapter: {{r: 4}}")
    store = Store(folder / "store")
    assert store.key["projection"] == {"kind": "factorised", "side": 4} and store.key["layers"] == [0, 1]
    assert store.width < 1024 * 16 and store.norms.min() > 0


def test_the_score_epistemic_takes_dropout_masks_as_members(data):
    masks = "scores: [nll, epistemic]; members: 2; adapter: {r: 4, dropout: 0.3}"
    folder, _ = select_in(data, f"{BASE}; {masks}", name="one")
    store = Store(folder / "store")
    assert set(store.scores) == {"nll", "epistemic", "epistemic_reverse"} and store.scores["epistemic"].min() > 0


@pytest.mark.slow
def test_the_score_epistemic_takes_trained_adapters_as_members(data):
    select_in(data, name="one")
    select_in(data, BASE.replace("steps: 2", "steps: 4"), name="two")
    adapters = "members: [one/select/warm_up, two/select/warm_up]; adapter_from: one/select/warm_up"
    folder, facts = select_in(data, f"{PICK}; scores: [epistemic]; selector: epistemic; {adapters}", name="three")
    assert {one["selector"] for one in facts["clusters"]} == {"epistemic"}
    found = Store(folder / "store").scores["epistemic"]
    assert (found > 0).all()
    (data / "same").mkdir()
    same = "members: [one/select/warm_up, one/select/warm_up]; adapter_from: one/select/warm_up"
    folder, _ = select_in(data, f"{PICK}; scores: [epistemic]; {same}", name="same/four")
    assert Store(folder / "store").scores["epistemic"].max() < 1e-6 < found.max()


def test_a_cut_stage_goes_on_with_adapter_and_store_and_gives_the_same_bytes(data, monkeypatch):
    whole, _ = select_in(data)
    score, calls = select_adapt_inf.score_samples, []

    def cut(*args, **settings):
        store = score(*args, **{**settings, "part": (0, 2)})
        calls.append(int(store.done.sum()))
        raise KeyboardInterrupt

    monkeypatch.setattr(select_adapt_inf, "score_samples", cut)
    with pytest.raises(KeyboardInterrupt):
        select_in(data, name="cut")
    monkeypatch.setattr(select_adapt_inf, "score_samples", score)
    assert 0 < calls[0] < 40
    before = (data / "cut" / "select" / "warm_up" / "adapter_model.safetensors").stat().st_mtime_ns
    again, _ = select_in(data, name="cut")
    assert (again / "warm_up" / "adapter_model.safetensors").stat().st_mtime_ns == before
    for name in ("store/vectors.f16", "store/scores.arrow", "selection/picks.jsonl", "selected.jsonl"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    write_rows(data / "pool.jsonl", rows_of(data / "pool.jsonl")[:30])
    changed, facts = select_in(data, name="cut")
    assert facts["pool"] == 30, "a store of other rows is thrown away"


@pytest.mark.slow
def test_an_earlier_sft_stage_or_a_given_adapter_scores_instead_of_a_warm_up(data):
    select_in(data)
    folder, facts = select_in(data, f"{PICK}; adapter_from: run/select/warm_up", "given")
    assert facts["scored_with"] == "run/select/warm_up" and not (folder / "warm_up").exists()
    first = "  - stage: sft\n    data: pool.jsonl\n    trainer: {max_steps: 2, per_device_train_batch_size: 2}\n"
    (data / "r.yaml").write_text(HEAD + first + "  - stage: select\n" + "".join(f"    {k}\n" for k in PICK.split("; ")))
    run = run_recipe(load(data / "r.yaml"), data / "after", say=lambda line: None)
    assert run.record["stages"]["select"]["scored_with"] == "the adapter of the sft stage"
    assert Selection.load(run.path / "select" / "selection") != Selection.load(folder / "selection")


@pytest.mark.slow
def test_sft_trains_on_the_picks_and_on_both_controls_and_the_page_draws_them(data):
    sft = (
        "  - stage: sft\n    controls: [random, balanced]\n    adapter: {r: 4}\n"
        "    trainer: {max_steps: 1, per_device_train_batch_size: 2}\n"
    )
    run = run_recipe(recipe_of(data, BASE, sft), data / "run", say=lambda line: None)
    assert {"sft", "sft-random", "sft-balanced"} <= set(run.record["stages"])
    page = publish(run.path).read_text()
    for title in ("gradients, by the selector", "picks and rows of each cluster", "score: nll", "score: el2n"):
        assert f'aria-label="{title}' in page, title
    assert "One pick of each cluster" in page
    numbers = json.loads((run.path / "select" / "pictures.json").read_text())
    assert len(numbers["points"]) == 40 and sum(point[2] != "" for point in numbers["points"]) == 12
    assert all(sum(one["pool"]) == 40 and sum(one["picked"]) == 12 for one in numbers["scores"].values())
    numbers["clusters"][0]["selector"] = "<script>alert(1)</script>"
    (run.path / "select" / "pictures.json").write_text(json.dumps(numbers))
    assert "<script>" not in publish(run.path).read_text()
    numbers["points"][0][0] = "<b>"
    (run.path / "select" / "pictures.json").write_text(json.dumps(numbers))
    assert 'aria-label="gradients' not in publish(run.path).read_text(), "damaged numbers are not drawn"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("method: adapt_inf; k: 3", "missing key 'raw' (or 'datasets')"),
        ("method: adapt_inf; raw: pool.jsonl", "missing key 'k'"),
        ("method: adaptinf; raw: pool.jsonl; k: 3", "'adaptinf' is unknown; allowed: 'dsir', 'adapt_inf'"),
        (f"{BASE}; target: pool.jsonl", "unknown key 'target'"),
        (f"{BASE}; cluster: 3", "unknown key 'cluster'; did you mean 'clusters'?"),
        (f"{BASE}; scores: [nll, surprise]", "'surprise' is unknown"),
        (f"{BASE}; projection: 0", "projection"),
        (f"{BASE}; projection: {{size: 4}}", "unknown key 'size'"),
        (f"{BASE}; keep: 3", "'keep' prunes the pool between datasets"),
        (f"{BASE}; adapter_from: here; adapter: {{r: 2}}", "give one of them"),
        (f"{BASE}; scores: [nll, epistemic]", "give members: a number of dropout masks, or folders"),
        (f"{BASE}; members: 3", "'members' are compared by the score 'epistemic', which is not among"),
        (f"{BASE}; scores: [epistemic]; members: 1", "greater than or equal to 2"),
        (
            "method: adapt_inf; k: 3; datasets: [{name: a, raw: pool.jsonl}]; scores: [epistemic]; members: [a, b]",
            "adapters in 'members' do not",
        ),
        (
            f"{PICK}; adapter_from: here; warm_up: {{steps: 3}}",
            "'here' scores and is trained already, so that nothing is warmed up; leave 'warm_up' out",
        ),
        ("method: adapt_inf; k: 3; datasets: [{name: a, raw: pool.jsonl}]", "the sft stage trains between datasets"),
    ],
)
def test_faults_that_need_no_data(data, keys, said):
    with pytest.raises(RecipeError) as caught:
        recipe_of(data, keys)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (BASE.replace("k: 12", "k: 41"), "k is 41 and the pool has 40 rows"),
        (f"{BASE}; legacy: true; shares: density", "legacy=True is the published choice"),
        (f"{BASE}; legacy: true; trim: 0.1", "trim=0.1 does not belong"),
        (f"{BASE}; gradients: [0, 2]", "the base has the decoder layers 0 to 1, and 2 is none of them"),
        (f"{BASE}; gradients: []", "gradients is an empty list"),
        (f"{BASE}; selector: grand", "the selector 'grand' is not among the scores"),
        (f"{PICK}; adapter_from: nowhere", "no folder with an adapter"),
        (f"{BASE}; selector: epistemic", "the selector 'epistemic' is not among the scores"),
        (f"{BASE}; scores: [epistemic]; members: [here, there]", "'there' is no folder with an adapter"),
        (f"{BASE}; scores: [nll, log_ig]", "compares answers with and without their images, and the base"),
        (f"{BASE}; scores: [epistemic]; members: 2", "2 dropout masks need a dropout"),
        (BASE.replace("pool.jsonl", "none.jsonl"), "none.jsonl"),
    ],
)
def test_faults_that_a_check_finds(data, keys, said):
    assert any(said in fault.message for fault in check(recipe_of(data, keys)))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (f"{PICK}; adapter: {{r: 2}}", "the adapter of the sft stage scores, so that this"),
        (BASE, "the adapter of the sft stage scores and is trained already"),
    ],
)
def test_an_adapter_to_warm_up_is_refused_after_a_stage_that_trains_one(data, keys, said):
    lines = "".join(f"    {line}\n" for line in keys.split("; "))
    (data / "r.yaml").write_text(HEAD + "  - {stage: sft, data: pool.jsonl}\n  - stage: select\n" + lines)
    with pytest.raises(RecipeError, match=said):
        load(data / "r.yaml")


def test_more_picks_than_the_dedup_stage_leaves_end_the_run_before_anything_is_warmed_up(data, monkeypatch):
    write_rows(data / "pool.jsonl", [{"text": f"one and the same text {n % 10}" * 4} for n in range(30)])
    keys = BASE.replace("raw: pool.jsonl; ", "").replace("k: 12", "k: 20")
    (data / "r.yaml").write_text(
        HEAD
        + "  - {stage: dedup, data: pool.jsonl, method: exact}\n  - stage: select\n"
        + "".join(f"    {line}\n" for line in keys.split("; "))
    )
    recipe = load(data / "r.yaml")
    assert check(recipe) == []
    monkeypatch.setattr(select_adapt_inf, "warm_up", None)
    with pytest.raises(RunError, match="^select: k is 20 and the pool has 10 rows left by the dedup stage"):
        run_recipe(recipe, data / "run", say=lambda line: None)
    few = load(data / "r.yaml", ["stages.select.k=31"])
    assert any("k is 31 and dedup looks through 30 rows" in fault.message for fault in check(few))


def test_more_picks_than_rows_with_an_answer_are_refused_by_the_stage(data):
    with pytest.raises(RunError, match=r"^select: k is 38, and \d+ of 40 rows have an answer within max_length 5"):
        select_in(data, f"{BASE.replace('k: 12', 'k: 38')}; max_length: 5")


@pytest.mark.slow
def test_the_balanced_control_is_as_large_as_what_the_published_shares_add_up_to(data):
    folder, facts = select_in(data, f"{BASE.replace('k: 12', 'k: 13')}; legacy: true")
    sizes = {name: len(rows_of(folder / f"{name}.jsonl")) for name in ("selected", "control", "balanced")}
    assert set(sizes.values()) == {facts["n"]} == {14}


def test_controls_of_datasets_are_refused_elsewhere(data):
    with pytest.raises(RecipeError, match="'full' needs a select stage over datasets"):
        recipe_of(data, BASE, "  - {stage: sft, controls: [full]}\n")


SEQUENCE = "method: adapt_inf; k: 8; clusters: 2; keep: 12; held_out: 5; warm_up: {steps: 2, batch_size: 4}"
SETS = "datasets: [{name: sums, raw: sums.jsonl}, {name: words, raw: words.jsonl, test: tests.jsonl}]"
TRAINED = "  - stage: sft\n    adapter: {r: 4}\n    trainer: {num_train_epochs: 1, per_device_train_batch_size: 4"


def sequence(data, controls=""):
    pool = rows_of(data / "pool.jsonl")
    write_rows(data / "sums.jsonl", pool[::2])
    write_rows(data / "words.jsonl", pool[1:30:2])
    write_rows(data / "tests.jsonl", pool[31::2])
    rest = TRAINED + ", learning_rate: 1e-2, max_length: 64, logging_steps: 1}\n" + controls
    return recipe_of(data, f"{SEQUENCE}; {SETS}", rest)


@pytest.mark.slow
def test_a_sequence_is_learned_step_by_step_and_goes_on_where_it_was_cut(data, monkeypatch, projected):
    recipe = sequence(data)
    assert check(recipe) == []
    whole = run_recipe(recipe, data / "whole", say=lambda line: None)
    assert len(projected) == 6 and max(projected[:4]) <= 4 * 3, "of the sums, the two digits and the end alone"
    facts = whole.record["stages"]["sft"]
    assert whole.record["stages"]["select"]["datasets"] == {
        "sums": {"rows": 15, "test": 5},
        "words": {"rows": 15, "test": 5},
    }
    assert facts["lifelong"]["pool"] == [15, 27] and facts["steps"] == 4, "8 rows in batches of 4, twice"
    matrix = facts["lifelong"]["measures"]["probability"]["matrix"]
    assert len(matrix) == 3 and matrix[1][0] > matrix[0][0], "sums were practised first"

    def losses(run):
        lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["loss"]) for line in lines if line["stage"] == "sft" and "loss" in line]

    assert [step for step, _ in losses(whole)] == [1, 2, 3, 4]

    train, calls = lifelong_stage.AdapterLearner.train, []

    def cut(self, rows, count, folder):
        calls.append(count)
        train(self, rows, count, folder)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(lifelong_stage.AdapterLearner, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, data / "cut", say=lambda line: None)
    again = run_recipe(recipe, data / "cut", say=lambda line: None)
    assert calls == [8, 8, 8], "the first dataset is not trained on again"
    assert losses(again) == losses(whole), "each step once, those before the cut, too"
    for name in ("adapter/adapter_model.safetensors", "sft/lifelong/step-01/step.json"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    write_rows(data / "words.jsonl", rows_of(data / "words.jsonl")[:12])
    for stage in ("select", "sft"):
        (data / "cut" / stage / "done").unlink()
    changed = run_recipe(recipe, data / "cut", say=lambda line: None)
    assert changed.record["stages"]["sft"]["lifelong"]["pool"] == [15, 24], "steps on other data are thrown away"
    page = publish(again.path).read_text()
    assert 'aria-label="probability: sums"' in page and 'aria-label="accuracy: words"' in page


@pytest.mark.slow
def test_controls_over_a_sequence_begin_alike_and_train_for_as_many_steps(data):
    run = run_recipe(sequence(data, "    controls: [sequential, full]\n"), data / "run", say=lambda line: None)
    found = {name: run.record["stages"][name] for name in ("sft", "sft-sequential", "sft-full")}
    assert {one["steps"] for one in found.values()} == {4}
    starts = [one["lifelong"]["performance"][0] for one in found.values()]
    assert starts[0] == starts[1] == starts[2]
    assert found["sft-sequential"]["lifelong"]["picked"] == [{"sums": 8}, {"words": 8}]
    assert found["sft-full"]["lifelong"]["picked"] == [{"sums": 15}, {"sums": 15, "words": 15}]


def test_too_few_rows_to_hold_some_back_are_found_by_a_check(data):
    sequence(data)
    recipe = recipe_of(data, f"{SEQUENCE.replace('held_out: 5', 'held_out: 20')}; {SETS}", TRAINED + "}\n")
    [fault] = [fault for fault in check(recipe) if "held out" in fault.message]
    assert fault.message.startswith("'sums' has 20 rows, and 20 are held out")
