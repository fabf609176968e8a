import hashlib
import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from krontune.data_selection import AdaptInf, DataSelectionError, Selection, Store
from krontune.data_selection.encoding import encode
from krontune.data_selection.lifelong import forgetting, lifelong, relative_gain
from krontune.data_selection.performance import answer_performance

specification = importlib.util.spec_from_file_location("tiny_adapters", Path(__file__).parent / "tiny_adapters.py")
tiny = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tiny)

SKILLS = ("add", "spell", "sort")
DATA = {name: [{"skill": name, "n": n} for n in range(size)] for name, size in zip(SKILLS, (40, 30, 20), strict=True)}


class Stopped(Exception):
    pass


class Toy:
    """Knows each skill to a degree: practice raises it by the rows trained on, and skills left out fade.

    Its scores and vectors depend on what it knows. `stop_at` calls it raises, half way through its work."""

    def __init__(self, stop_at=None):
        self.stop_at, self.calls, self.trained = stop_at, 0, []

    def count(self):
        self.calls += 1
        if self.calls == self.stop_at:
            raise Stopped

    def restore(self, folder):
        self.knows = dict.fromkeys(SKILLS, 0.1) if folder is None else json.loads((folder / "m.json").read_text())
        self.count()

    def score(self, rows, folder):
        rng = [np.random.default_rng(int(hashlib.sha256(repr(row).encode()).hexdigest()[:8], 16)) for row in rows]
        vectors = np.array(
            [np.eye(8)[SKILLS.index(row["skill"])] + 0.2 * r.normal(size=8) for row, r in zip(rows, rng, strict=True)]
        )
        vectors *= 1 + self.knows["add"]
        scores = np.array([[r.normal() + self.knows[row["skill"]], n] for r, row, n in
                           zip(rng, rows, np.linalg.norm(vectors, axis=1), strict=True)])  # fmt: skip
        store = Store.prepare(folder, {"projection": None}, len(rows), ["nll", "gradient_norm"], 8)
        store.write(range(len(rows) // 2), scores[: len(rows) // 2], vectors[: len(rows) // 2])
        self.count()
        store.write(range(len(rows)), scores, vectors)
        return store

    def train(self, rows, count, folder):
        folder.mkdir(parents=True)
        seen = [row["skill"] for row in rows]
        self.trained.append((rows, count))
        for name in SKILLS:
            share = seen.count(name) / len(seen)
            self.knows[name] = 0.5 * self.knows[name] + 0.5 * share
        (folder / "half").write_text("")
        self.count()
        (folder / "m.json").write_text(json.dumps(self.knows))

    def performance(self, skill):
        self.count()
        return {"accuracy": self.knows[skill]}


def learn(out, policy="adapt_inf", stop_at=None, **settings):
    toy = Toy(stop_at)
    method = AdaptInf(clusters=2, min_cluster=1)
    settings = {"budget": 12, "keep": 25} | settings
    return toy, lifelong(DATA, toy, policy=policy, method=method, out_dir=out, **settings)


def test_the_formulas_equal_slow_ones():
    rng = np.random.default_rng(0)
    for steps, skills in itertools.product((2, 3, 7), (1, 4)):
        matrix = rng.uniform(size=(steps, skills))
        matrix[:, 0] *= rng.integers(2)
        lost = 0.0
        for s in range(skills):
            best = max(matrix[t, s] for t in range(steps - 1))
            if best > 0:
                lost += max(0.0, (best - matrix[-1, s]) / best)
        assert forgetting(matrix) == pytest.approx(100 * lost / skills)
        reference = rng.uniform(0.1, 1, size=skills)
        gain = sum(matrix[-1, s] / reference[s] for s in range(skills)) * 100 / skills
        assert relative_gain(matrix[-1], reference) == pytest.approx(gain)
    assert forgetting(np.array([[0.2, 0.8], [0.9, 0.4]])) == pytest.approx(25.0)
    assert relative_gain(np.array([0.5, 0.5]), np.array([0.5, 0.25])) == pytest.approx(150.0)


def test_formulas_refuse_what_has_no_meaning():
    with pytest.raises(DataSelectionError, match="relative to 0"):
        relative_gain(np.ones(2), np.array([1.0, 0.0]))
    with pytest.raises(DataSelectionError, match="two rows"):
        forgetting(np.ones((1, 3)))
    with pytest.raises(DataSelectionError, match=r"exp\(-loss\)"):
        forgetting(np.array([[1.0], [np.nan]]))


def test_adapt_inf_picks_from_the_growing_pool_and_what_is_pruned_never_comes_back(tmp_path):
    toy, found = learn(tmp_path)
    rows = [row for name in SKILLS for row in DATA[name]]
    kept, method = [], AdaptInf(clusters=2, min_cluster=1)
    for number, (name, start) in enumerate(zip(SKILLS, (0, 40, 70), strict=True)):
        pool = kept + list(range(start, start + len(DATA[name])))
        store = Store(tmp_path / f"step-{number:02d}" / "store")
        picked = method.select(store, budget=12, seed=number)
        assert Selection.load(tmp_path / f"step-{number:02d}" / "selection") == picked
        assert toy.trained[number] == ([rows[pool[i]] for i in picked.indices], 12)
        kept = [pool[i] for i in method.prune(store, keep=25, seed=number).indices]
        record = json.loads((tmp_path / f"step-{number:02d}" / "step.json").read_text())
        assert record["kept"] == kept and record["pool"] == len(pool) == found.pool[number]
    assert found.pool == (40, 55, 45) and len(kept) == 25
    assert all(sum(counts.values()) == 12 for counts in found.picked)
    assert found.matrix("accuracy").shape == (4, 3) and found.matrix("accuracy")[0].tolist() == [0.1] * 3
    summary = found.summary("accuracy")
    assert summary["forgetting"] == forgetting(found.matrix("accuracy"))
    assert json.loads(json.dumps(found.to_dict()))["measures"]["accuracy"]["final"] == summary["final"]


@pytest.mark.parametrize("policy", ["balanced", "random", "sequential", "full"])
def test_controls_train_on_what_they_say(tmp_path, policy):
    toy, found = learn(tmp_path, policy)
    skills = [[row["skill"] for row in rows] for rows, _ in toy.trained]
    assert all(count == 12 for _, count in toy.trained), "an equal budget for all"
    if policy == "sequential":
        assert [set(one) for one in skills] == [{name} for name in SKILLS] and found.pool == (40, 30, 20)
    elif policy == "full":
        assert [len(one) for one in skills] == [40, 70, 90] == list(found.pool)
    else:
        assert [len(one) for one in skills] == [12] * 3 and len(set(skills[2])) > 1 and found.pool == (40, 55, 45)
    assert (tmp_path / "step-00" / "store").exists() == (policy == "balanced")


@pytest.mark.parametrize("policy", ["adapt_inf", pytest.param("balanced", marks=pytest.mark.slow), "random"])
def test_a_run_stopped_at_any_call_goes_on_to_the_same_end(tmp_path, policy):
    whole, expected = learn(tmp_path / "whole", policy)
    for stop_at in range(1, whole.calls + 1):
        out = tmp_path / f"stopped-{stop_at}"
        with pytest.raises(Stopped):
            learn(out, policy, stop_at)
        again, found = learn(out, policy)
        assert found == expected, stop_at
        for step in range(3):
            name = f"step-{step:02d}/step.json"
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(again.trained) == 0, "steps that are done are not trained again"


def test_a_learner_that_measures_or_saves_what_nobody_can_use_is_refused_before_more_is_trained(tmp_path, monkeypatch):
    for number, said in enumerate(({"accuracy": float("nan")}, {"accuracy": -0.5}, {})):
        monkeypatch.setattr(
            Toy, "performance", lambda self, skill, said=said: said if skill == "sort" else {"accuracy": 1}
        )
        with pytest.raises(DataSelectionError, match=r"learner.performance\('sort'\) is .*exp\(-loss\)"):
            learn(tmp_path / str(number))
        assert not list((tmp_path / str(number)).glob("step-*"))
    monkeypatch.undo()
    monkeypatch.setattr(Toy, "train", lambda self, rows, count, folder: None)
    with pytest.raises(DataSelectionError, match="learner.train left no folder"):
        learn(tmp_path / "unsaved")
    monkeypatch.undo()
    _, found = learn(tmp_path / "whole")
    with pytest.raises(DataSelectionError, match=r"measure 'loss': the learner measured \['accuracy'\]"):
        found.summary("loss")
    with pytest.raises(DataSelectionError, match="datasets is a list; give a mapping"):
        lifelong([DATA["add"]], Toy(), budget=1, out_dir=tmp_path / "list")


def test_a_finished_run_is_read_back_and_another_one_refused(tmp_path):
    _, expected = learn(tmp_path)
    toy, found = learn(tmp_path)
    assert found == expected and not toy.trained
    with pytest.raises(DataSelectionError, match="belongs to another run .budget: 12 there, 13 now"):
        learn(tmp_path, budget=13)
    with pytest.raises(DataSelectionError, match="datasets"):
        lifelong(dict(reversed(DATA.items())), Toy(), budget=12, keep=25, method=AdaptInf(clusters=2, min_cluster=1),
                 out_dir=tmp_path)  # fmt: skip
    with pytest.raises(DataSelectionError, match="policy='best'"):
        learn(tmp_path / "new", policy="best")
    with pytest.raises(DataSelectionError, match="no rows in"):
        lifelong({"a": []}, Toy(), budget=1, out_dir=tmp_path / "new")


def test_performance_is_that_of_greedy_answers_and_of_their_probability():
    words = tiny.tokenizer()
    model = tiny.with_lora(tiny.tiny_llama())
    rows = [{"prompt": f"{i}+{i}=" + "?" * (i % 3), "completion": ""} for i in range(12)]
    for row in rows[:5]:  # what the model would say itself, and once more with another end
        prompt = words(row["prompt"])["input_ids"]
        ids = list(prompt)
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        row |= {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}
    rows[0]["input_ids"][-1] = rows[0]["labels"][-1] = (rows[0]["labels"][-1] + 1) % 100
    rows.append({"input_ids": [5, 6], "labels": [-100, -100]})  # no answer: does not count
    right, nll = [], []
    for row in rows[:-1]:
        encoded = encode(words, row, "row")
        with torch.no_grad():
            logits = model(input_ids=encoded.input_ids[None]).logits[0, :-1]
        kept = encoded.labels[1:] != -100
        right.append(bool((logits.argmax(-1) == encoded.labels[1:])[kept].all()))
        nll.append(torch.nn.functional.cross_entropy(logits[kept], encoded.labels[1:][kept]).item())
    found = answer_performance(model, words, rows, batch_size=5)
    assert 4 <= sum(right) < 12 and found["accuracy"] == sum(right) / 12
    assert found["probability"] == pytest.approx(np.exp(-np.mean(nll)), rel=1e-5)
    with pytest.raises(DataSelectionError, match="nothing to measure by"):
        answer_performance(model, words, rows[-1:])
