"""rlvr_report.json, report.html and the model card of a run folder, and several runs in one table."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml

from krontune.recipes.compare import compare, publish
from krontune.recipes.run_folder import RunError
from krontune.recipes.run_report import read_run
from krontune.rl import checks, get_task, heuristic_table, score

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder as a run leaves it: its stages' files, without the report."""
    path = tmp_path_factory.mktemp("runs") / "one"
    task = get_task("lis")
    instances = task.instances(60, (8, 10), 0, "test")
    policies = checks.scripted_policies(task)
    answers = {"base": [HOSTILE] * 60, "sft": policies["beam2"](instances), "rl": policies["noisy"](instances)}
    right = {name: [[task.mark(i, a).certificate_right] * 4 for i, a in zip(instances, answers[name], strict=True)]
             for name in answers}  # fmt: skip
    found = [
        checks.soundness(task, (8, 10)),
        checks.triplet(task, instances, answers["rl"]),
        checks.attribution(task, instances, answers["rl"]),
        checks.size_ladder(task, policies["noisy"], (6, 8), 20),
        checks.base_vs_tuned(right["base"], right["rl"]),
        checks.spurious_controls([0.0], [1.0], {}),
    ]
    (path / "verify").mkdir(parents=True)
    (path / "rl").mkdir()
    about = {"stage": "verify", "model": "rl"}
    curve = checks.pass_curve(right["rl"])
    verify = {
        "task": {"name": "lis", "n": [8, 10]},
        "instances": 60,
        "weights": "as loaded",
        "temperature": 1.0,
        "models": {name: score(task, instances, texts).to_dict() for name, texts in answers.items()},
        "heuristics": {name: one.to_dict() for name, one in heuristic_table(task, instances).items()},
        "samples": {
            name: dict.fromkeys(("pass_certificate", "pass_answer", "con_certificate", "con_answer"), curve)
            for name in answers
        },
        "checks": checks.write_report(found, path / "verify" / "rlvr_report.json", about)["checks"],
        "credit_picture": None,
    }
    (path / "verify" / "verify.json").write_text(json.dumps(verify))
    during = [checks.Alarms().result(), checks.collapse([])]
    checks.write_report(during, path / "rl" / "rlvr_report.json", {"stage": "rl"})
    metrics = [{"stage": "sft", "step": i, "loss": 2.0 - i / 5} for i in range(1, 6)]
    metrics += [{"stage": "rl", "step": i, "reward": i / 9, "lis/all/gap": 0.1 * i} for i in range(1, 6)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"stage": "rl", "st')
    trained = {"steps": 5, "trainable_parameters": 1234, "parameters": 99999}
    stages = {
        "sft": {"seconds": 3.0, **trained},
        "rl": {"seconds": 4.0, **trained, "reward": None},
        "verify": {"seconds": 5.0},
    }
    record = {
        "name": "one",
        "seed": 7,
        "stages": stages,
        "data": {"sft": {"rows": 9, "sha256": "ab" * 32}},
        "versions": {"krontune": "0.1.0", "peft": "0.21.2"},
        "machine": {"system": "Linux"},
    }
    (path / "run.json").write_text(json.dumps(record))
    recipe = {
        "name": "one",
        "description": f"a recipe {HOSTILE}",
        "base": {"model": "smollm2-135m", "quantization": "nf4"},
        "stages": [
            {"stage": "sft", "data": "/home/somebody/secret/pool.jsonl"},
            {"stage": "rl", "task": {"name": "lis"}},
            {"stage": "verify"},
        ],
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (path / "adapter").mkdir()
    config = {"peft_type": "MOKA", "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    (path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    publish(path)
    return path


class Outside(HTMLParser):
    """Collects what a browser would fetch or run, and whether tags are closed."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open = [], []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "img", "iframe", "object", "embed") or {"src", "href"} & {
            name for name, _ in attrs
        }:
            self.fetched.append(tag)
        if tag not in ("meta", "br", "rect", "line", "polyline", "polygon", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_page_is_one_file_that_asks_for_nothing_and_runs_nothing(finished):
    text = (finished / "report.html").read_text()
    page = Outside()
    page.feed(text)
    assert page.fetched == [] and page.open == []
    assert "@import" not in text and "url(" not in text and HOSTILE not in text and "&lt;script&gt;" in text
    assert 'name="viewport"' in text and "@media print" in text


def test_the_page_shows_models_curves_checks_and_pictures(finished):
    text = (finished / "report.html").read_text()
    assert "after rl" in text and "heuristic: beam2" in text
    for title in ("loss of sft", "mean reward of rl", "samples of rl", "pass@k, certificate", "con@k, answer"):
        assert f'aria-label="{title}"' in text, title
    assert 'aria-label="whose answers' in text and 'aria-label="certificate accuracy by size"' in text
    for one in read_run(finished).report["checks"]:
        assert one["name"].replace("_", " ") in text
    assert text.count('class="verdict') == len(read_run(finished).report["checks"])


def test_the_json_report_is_of_the_whole_run_with_a_schema_version_and_no_score(finished):
    report = json.loads((finished / "rlvr_report.json").read_text())
    assert report["schema_version"] == 1 and report["run"] == "one"
    places = {one["name"]: (one["phase"], one["stage"], one["model"]) for one in report["checks"]}
    assert places["soundness"] == ("before", "verify", None)
    assert places["collapse"] == ("during", "rl", None)
    assert places["attribution"] == ("after", "verify", "rl")
    phases = [one["phase"] for one in report["checks"]]
    assert phases == sorted(phases, key=["before", "during", "after"].index)
    assert sum(report["verdicts"].values()) == len(report["checks"]) and "score" not in report
    fields = {"name", "value", "ci", "n", "threshold", "verdict", "details"}
    assert all(fields <= set(one) for one in report["checks"])


def test_the_card_is_true_loads_and_names_no_path(finished):
    text = (finished / "adapter" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["library_name"] == "peft" and meta["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert meta["base_model_relation"] == "adapter" and {"krontune", "moka", "4-bit", "grpo"} <= set(meta["tags"])
    assert "import krontune.adapters" in body and "AutoPeftModelForCausalLM.from_pretrained(adapter)" in body
    certificate = read_run(finished).verify["models"]["rl"]["certificate"]
    row = next(line for line in body.splitlines() if line.startswith("| after rl"))
    assert f"{certificate['value']:.2f} [{certificate['low']:.2f}, {certificate['high']:.2f}]" in row
    for one in read_run(finished).report["checks"]:
        assert re.search(rf"^\| {one['name'].replace('_', ' ')}.* \| {one['verdict']} \|", body, re.M), one["name"]
    assert "/home" not in text and str(finished) not in text and "pool.jsonl" in text
    [snippet] = re.findall(r"## How to load\n\n```python\n(.*?)```", body, re.S)
    compile(snippet, "card", "exec")


def test_the_hub_reads_the_measured_rates_from_the_card_with_what_generates_the_task_again(finished):
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished / "adapter" / "README.md")
    result = read_run(finished).verify
    scores, found = result["models"]["rl"], {one.metric_name.split(",")[0]: one for one in card.data.eval_results}
    assert card.data.model_name == "one" and list(found) == ["certificate", "answer", "gap"]
    for name, one in found.items():
        assert one.metric_value == scores[name]["value"] and f"n = {scores[name]['n']}" in one.metric_name
        assert f"{scores[name]['low']:.3f} to {scores[name]['high']:.3f}" in one.metric_name
        assert (one.dataset_type, one.dataset_split, one.verified) == ("unknown", "test", None)
        assert one.dataset_args == {**result["task"], "instances": result["instances"], "seed": 0}


def test_a_run_that_did_not_measure_the_published_adapter_has_no_model_index(finished):
    from dataclasses import replace

    from krontune.recipes.card import model_index

    run = read_run(finished)
    assert model_index(run) and model_index(replace(run, verified={})) == {}
    early = {**run.verify, "models": {"base": run.verify["models"]["base"]}}
    assert model_index(replace(run, verified={"verify": early})) == {}
    again = replace(run, recipe={**run.recipe, "stages": [{"stage": kind} for kind in ("sft", "sft", "verify")]})
    assert model_index(again) == {}, "the published adapter is that of sft-2"
    models = {"sft-2": run.verify["models"]["rl"]}
    assert model_index(replace(again, verified={"verify": {**run.verify, "models": models}}))


def test_with_several_stages_of_a_kind_the_hub_reads_the_last_adapters_rates_of_the_last_verify_stage(finished):
    from dataclasses import replace

    from krontune.recipes.card import model_index

    run = read_run(finished)
    stages = [*run.recipe["stages"], {"stage": "rl", "task": {"name": "lis"}}, {"stage": "verify", "seed": 5}]
    first, models = run.verify, run.verify["models"]
    later = {**first, "models": {**models, "rl-2": models["sft"]}}
    run = replace(run, recipe={**run.recipe, "stages": stages}, verified={"verify": first, "verify-2": later})
    [entry] = model_index(run)["model-index"]
    [result] = entry["results"]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values["certificate_gap"] == models["sft"]["gap"]["value"] != models["rl"]["gap"]["value"]
    assert result["dataset"]["args"]["seed"] == 5
    assert model_index(replace(run, verified={"verify": first})) == {}, "nothing measured rl-2 yet"


def test_a_check_of_two_verify_stages_is_told_apart_on_the_card(finished):
    from dataclasses import replace

    from krontune.recipes.card import _checks

    run = read_run(finished)
    [one] = [one for one in run.report["checks"] if one["name"] == "attribution"]
    [text] = _checks(replace(run, report={"checks": [one, {**one, "stage": "verify-2"}]}))
    assert "| attribution (verify) |" in text and "| attribution (verify-2) |" in text


def test_a_base_that_is_a_folder_is_not_named_on_the_card(finished, tmp_path):
    from krontune.recipes.card import model_card

    config = {"peft_type": "MOKA", "base_model_name_or_path": str(tmp_path)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    text = model_card(read_run(finished), tmp_path)
    assert str(tmp_path) not in text and "base_model" not in text.split("---\n")[1]


def test_several_runs_stand_in_one_table(finished, tmp_path, capsys):
    import shutil

    other = tmp_path / "two"
    shutil.copytree(finished, other)
    record = json.loads((other / "run.json").read_text())
    del record["stages"]["verify"]
    (other / "run.json").write_text(json.dumps(record))
    compare([finished, other], tmp_path / "both.html")
    said = capsys.readouterr().out
    assert "one" in said and "two" in said
    row = next(line for line in said.splitlines() if "attribution" in line)
    assert "pass" in row and row.rstrip("│ ").count("│") < row.count("│"), "the second run has no such check"
    page = Outside()
    page.feed((tmp_path / "both.html").read_text())
    assert page.fetched == [] and page.open == []


def test_an_unfinished_run_has_a_page_and_a_wrong_folder_an_error(finished, tmp_path):
    (tmp_path / "half").mkdir()
    for name in ("recipe.yaml", "run.json"):
        text = (finished / name).read_text()
        if name == "run.json":
            text = json.dumps({**json.loads(text), "stages": {}})
        (tmp_path / "half" / name).write_text(text)
    assert "has not run" in publish(tmp_path / "half").read_text()
    with pytest.raises(RunError, match="is no run folder"):
        publish(tmp_path)
    (tmp_path / "half" / "run.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        publish(tmp_path / "half")


def test_the_verb_prints_the_page_and_refuses_another_folder(finished, tmp_path):
    command = [sys.executable, "-m", "krontune", "report"]
    done = subprocess.run([*command, str(finished)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(finished / "report.html"), done.stderr
    wrong = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert wrong.returncode == 1 and "is no run folder" in wrong.stderr and "Traceback" not in wrong.stderr


def copied(finished, tmp_path):
    import shutil

    return shutil.copytree(finished, tmp_path / "run")


def test_a_crafted_verify_json_puts_nothing_into_the_page(finished, tmp_path):
    run = copied(finished, tmp_path)
    verify = json.loads((run / "verify" / "verify.json").read_text())
    verify |= {"instances": HOSTILE, "weights": HOSTILE, "credit_picture": "../secret.txt"}
    verify["task"] = {"name": HOSTILE, "n": [HOSTILE, HOSTILE]}
    (run / "secret.txt").write_text("the secret")
    (run / "verify" / "verify.json").write_text(json.dumps(verify))
    report = json.loads((run / "verify" / "rlvr_report.json").read_text())
    [one] = [one for one in report["checks"] if one["name"] == "base_vs_tuned"]
    one["verdict"] = f'"{HOSTILE}'
    (run / "verify" / "rlvr_report.json").write_text(json.dumps(report))
    text = publish(run).read_text()
    page = Outside()
    page.feed(text)
    assert page.fetched == [] and HOSTILE not in text and text.count("&lt;script&gt;") > 5
    assert "the secret" not in text


def test_the_credit_picture_is_an_image_in_which_nothing_runs(finished, tmp_path):
    run = copied(finished, tmp_path)
    verify = json.loads((run / "verify" / "verify.json").read_text())
    (run / "verify" / "verify.json").write_text(json.dumps({**verify, "credit_picture": "credit.svg"}))
    picture = f'<svg xmlns="http://www.w3.org/2000/svg">{HOSTILE}</svg>'
    (run / "verify" / "credit.svg").write_text(picture)
    text = publish(run).read_text()
    [packed] = re.findall(r'<img alt="token credit" src="data:image/svg\+xml;base64,([^"]*)">', text)
    assert base64.b64decode(packed).decode() == picture and HOSTILE not in text


def test_keys_and_paths_of_a_recipe_are_not_published_and_words_stay(finished, tmp_path):
    run = copied(finished, tmp_path)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    caps = {"/home/me/secret/a.jsonl": 3, "/home/me/other/a.jsonl": 4, "web": 5}
    recipe["stages"][0] |= {"source_caps": caps, "tokens": 900}
    recipe["stages"][1] |= {
        "task": {"name": "lis", "instruction": "/no_think", "options": {"passwords": ["hunter2"], "mode": "/think"}},
        "reward_options": {"API_KEY": "sk-1", "judge": {"hub_token": "hf-1", "url": "x"}, "password": 771177},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = publish(run).read_text()
    card = (run / "adapter" / "README.md").read_text()
    for text in (page, card):
        assert not [one for one in ("hunter2", "sk-1", "hf-1", "771177") if one in text]
        assert "tokens: 900" in text and "instruction: /no_think" in text and "mode: /think" in text
    assert "/home" not in card
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.S)[0])["stages"]
    assert shown[0]["source_caps"] == {"a.jsonl": 4, "a.jsonl (2)": 3, "web": 5}
    assert set(shown[1]["reward_options"]) == {"API_KEY", "judge", "password"}


def test_curves_of_a_task_of_ones_own_are_drawn_under_the_name_it_logs(finished, tmp_path):
    run = copied(finished, tmp_path)
    verify = json.loads((run / "verify" / "verify.json").read_text())
    verify["task"]["name"] = "package:MyTask"
    (run / "verify" / "verify.json").write_text(json.dumps(verify))
    assert 'aria-label="samples of rl"' in publish(run).read_text()
