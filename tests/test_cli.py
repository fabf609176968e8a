import errno
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from krontune import __version__, recipes
from krontune.cli import app
from krontune.recipes import chain
from krontune.recipes.chain import Run
from krontune.recipes.json_schema import recipe_schema
from krontune.recipes.run_folder import RunError, RunFolder, WrongFolder
from krontune.rl import RlError

RECIPE = """\
name: mine
base: {model: smollm2-135m}
stages:
- {stage: select, raw: pool.txt, target: target.txt, k: 2}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "target.txt").write_text("two\n")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return "mine.yaml"


def krontune(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def refused(result, code: int) -> str:
    """The one message of a call that failed as it should."""
    assert result.exit_code == code, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr


# ---------------------------------------------------------------- a process of its own


HEAVY = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "numpy", "sklearn"]


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["copy", "quikstart"]])
def test_what_needs_no_model_imports_nothing_heavy(arguments):
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('loaded:', [name for name in {HEAVY} if name in sys.modules]))\n"
        "from krontune.cli import main\n"
        f"sys.argv = ['krontune', *{arguments}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("loaded: []\n"), done.stdout + done.stderr


def test_help_lists_the_verbs():
    text = krontune("--help").stdout
    assert all(f" {verb} " in text for verb in ("check", "run", "recipes", "copy", "schema"))


def test_a_process_exits_with_2_for_a_wrong_recipe_and_0_else(tmp_path):
    for name, code, said in [("quikstart", 2, "did you mean 'quickstart'?\n"), ("quickstart", 0, "")]:
        command = [sys.executable, "-m", "krontune", "copy", name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code and done.stderr.endswith(said), done.stderr
        assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- verbs


def test_version_is_that_of_the_package():
    assert krontune("--version").stdout == f"krontune {__version__}\n"


def test_recipes_lists_the_shipped_ones_with_what_they_do():
    result = krontune("recipes")
    assert result.exit_code == 0 and f"quickstart: {recipes.load('quickstart').description}\n" in result.stdout


def test_schema_prints_the_schema_and_nothing_else():
    result = krontune("schema")
    assert result.exit_code == 0 and result.stdout == recipe_schema() and result.stderr == ""


def test_a_copy_is_written_here_or_where_asked_and_never_over_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert krontune("copy", "quickstart").stdout == "wrote quickstart.yaml\n"
    assert krontune("copy", "quickstart", "other.yaml").exit_code == 0
    (tmp_path / "quickstart.yaml").write_text("mine now")
    message = refused(krontune("copy", "quickstart"), 2)
    assert message == "quickstart.yaml: the file exists and was left as it is; give another name\n"
    assert (tmp_path / "quickstart.yaml").read_text() == "mine now"


def test_check_of_a_sound_recipe_names_its_stages(recipe):
    result = krontune("check", recipe)
    assert result.exit_code == 0 and result.stdout == "mine.yaml: no faults; stages: select\n"


def test_check_prints_every_fault_of_the_file_and_of_the_overrides(recipe, tmp_path):
    (tmp_path / recipe).write_text(RECIPE.replace("name: mine", "nam: mine"))
    assert refused(krontune("check", recipe, "stages.select.k=many", "base.modl=x"), 2).splitlines() == [
        "mine.yaml:1:1: missing key 'name' (Also the name of the run folder)",
        "mine.yaml:1:1: unknown key 'nam'; did you mean 'name'?",
        "override 'base.modl=x': unknown key 'modl'; did you mean 'model'?",
        "override 'stages.select.k=many': k: 'many' is not a number",
    ]


BAD = [
    ("k larger than the pool", "stages.select.k=4", "k is 4 and the pool has 3 rows; give at most 3"),
    ("an empty target", "stages.select.target=empty.txt", "target is empty: its sources hold no rows"),
    ("a missing file", "stages.select.raw=gone.txt", "raw: there is no file 'gone.txt'"),
    ("a broken line", "stages.select.raw=broken.jsonl", "broken.jsonl:2: not JSON"),
    ("an unknown key", "stages.select.kk=1", "unknown key 'kk'; did you mean 'k'?"),
    (
        "an unknown stage",
        "stages.select.stage=selct",
        "allowed: 'dedup', 'select', 'sft', 'rl', 'verify'; did you mean 'select'?",
    ),
    (
        "an unknown task",
        "stages=[{stage: verify, task: {name: lsi, n: [3, 5]}}]",
        "'knapsack', 'lis'; did you mean 'lis'?",
    ),
    ("a missing model", "base.model=./gone", "model folder './gone' does not exist"),
    ("no override", "seed", "an override is written path.to.key=value"),
]


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize(("override", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_gives_one_message_and_code_2_before_anything_is_written(recipe, tmp_path, verb, override, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text\n')
    said = refused(krontune(verb, recipe, override), 2)
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", ["check", "run", "copy"])
def test_an_unknown_recipe_gets_the_nearest_name(tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    message = "quickstrt: there is no such file and no such shipped recipe; did you mean 'quickstart'?\n"
    assert refused(krontune(verb, "quickstrt"), 2) == message


def test_a_run_of_one_stage_writes_its_folder_reports_it_and_is_not_repeated(recipe, tmp_path):
    result = krontune("run", recipe, "--out", "here")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("select: done in ") and "select: 2 of 3 rows" in result.stdout
    assert len((tmp_path / "here" / "select" / "selected.jsonl").read_text().splitlines()) == 2
    again = krontune("run", recipe, "--out", "here")
    assert again.exit_code == 0 and again.stdout.startswith("select: done before, skipped\n")


def test_the_folder_of_another_recipe_is_refused_with_code_2_and_left_as_it_is(recipe, tmp_path):
    assert krontune("run", recipe).exit_code == 0
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    message = refused(krontune("run", recipe, "name=other", "--out", "runs/mine"), 2)
    assert "runs/mine holds a run of another recipe, 'mine', and this one is 'other'" in message
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before
    assert len(files) == len([file for file in (tmp_path / "runs").rglob("*") if file.is_file()])


def test_recipe_overrides_and_folder_arrive_where_they_are_used(recipe, tmp_path, monkeypatch):
    def run(loaded, out, say):
        assert (loaded.name, loaded.seed, str(out)) == ("mine", 7, "there")
        with RunFolder(out, loaded) as folder:
            return Run(folder.path, folder.record)

    monkeypatch.setattr(chain, "run", run)
    result = krontune("run", recipe, "seed=7", "--out", "there")
    assert result.exit_code == 0 and "run folder: there" in result.stdout
    assert json.loads((tmp_path / "there" / "run.json").read_text())["seed"] == 7


def test_audit_prints_a_table_writes_its_report_and_exits_by_the_verdicts(tmp_path, monkeypatch):
    from krontune.recipes import audit
    from krontune.rl.checks import CheckResult

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rlvr_report.json").write_text("a run's")
    verdict = CheckResult("verifier", 0.0, (0.0, 0.1), 40, 0.0, "pass")
    for outcome, code in (("pass", 0), ("warn", 0), ("fail", 1)):
        found = CheckResult("heuristics", 0.9, (0.8, 0.95), 256, 0.5, outcome, {"best": "heaviest"})
        monkeypatch.setattr(audit, "audit", lambda recipe, found=found: [verdict, found])
        result = krontune("audit", "quickstart", "--out", "report.json")
        assert result.exit_code == code and outcome in result.stdout and "[0.800, 0.950]" in result.stdout
        assert ("'heaviest' earns 0.90 of" in result.stdout) == (outcome != "pass")
        assert json.loads((tmp_path / "report.json").read_text())["verdicts"][outcome] >= 1
        told = krontune("audit", "quickstart", "--json")
        assert told.exit_code == code and json.loads(told.stdout)["checks"][1]["verdict"] == outcome
        assert (tmp_path / "audit_report.json").read_text() == told.stdout
    assert (tmp_path / "rlvr_report.json").read_text() == "a run's"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["audit_report.json", "report.json", "rlvr_report.json"]


def test_audit_of_a_recipe_without_a_reward_is_refused_with_code_2(recipe):
    assert "there is no rl stage" in refused(krontune("audit", recipe), 2)


def test_check_of_a_recipe_for_a_gpu_and_the_hub_says_what_it_needs_and_has_no_faults(monkeypatch):
    from krontune.recipes import needs

    monkeypatch.setattr(needs, "hub_answers", lambda: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("krontune.recipes.preflight._hub_faults", lambda repo, revision: iter(()))
    result = krontune("check", "grpo_math")
    assert result.exit_code == 0, result.output
    assert "'Qwen/Qwen3-0.6B-Base' is not on this machine and comes from the Hub" in result.stdout
    assert "data set 'open-r1/DAPO-Math-17k-Processed' comes from the Hub" in result.stdout
    assert "needs a GPU" in result.stdout


# ---------------------------------------------------------------- failures of a run

FULL = OSError(errno.ENOSPC, "No space left on device", "runs/mine/sft/x")
FAILURES = [
    (KeyboardInterrupt(), 1, "interrupted; what is finished is kept, run the same command to go on\n"),
    (FULL, 1, "no space left on the device (runs/mine/sft/x); free some and run the same command to go on\n"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "no space left on the device; free some"),
    (RunError("several processes"), 1, "several processes\n"),
    (RlError("unknown task"), 1, "unknown task\n"),
    (WrongFolder("not yours"), 2, "not yours\n"),
    (
        ZeroDivisionError("by\nzero"),
        1,
        "the run failed: ZeroDivisionError: by\nFinished stages are kept. Run again with",
    ),
    (AssertionError(), 1, "the run failed: AssertionError: no message\n"),
]


@pytest.mark.parametrize(("failure", "code", "message"), FAILURES, ids=[repr(failure[0])[:30] for failure in FAILURES])
def test_whatever_fails_ends_in_one_message_and_a_code_and_the_traceback_only_on_demand(
    recipe, monkeypatch, failure, code, message
):
    def run(loaded, out, say):
        raise failure

    monkeypatch.setattr(chain, "run", run)
    assert refused(krontune("run", recipe), code).startswith(message)
    told = krontune("run", recipe, "--traceback")
    assert told.exit_code == code and message in told.stderr
    assert told.stderr.startswith("Traceback (most recent call last)") and "raise failure" in told.stderr


def test_a_wrong_recipe_shows_its_traceback_too(recipe):
    told = krontune("check", recipe, "sed=1", "--traceback")
    assert told.exit_code == 2 and "Traceback" in told.stderr and "unknown key 'sed'" in told.stderr
