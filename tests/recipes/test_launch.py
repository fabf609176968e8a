"""Several processes: who does what, how they end, and the command that starts them.

The quick tests run the processes as threads with a store in memory; the slow ones are of two real launches.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from krontune.recipes import chain, launch, run_folder
from krontune.recipes.faults import Fault, RecipeError
from krontune.recipes.loader import load
from krontune.recipes.processes import AnotherProcessFailed, Processes
from krontune.recipes.run_folder import RunError

from .conftest import write_model


def several(count: int) -> list[Processes]:
    store, found = HashStore(), []
    store.set_timeout(timedelta(seconds=30))
    for rank in range(count):
        one = Processes()
        one.rank, one.count, one.join = rank, count, lambda timeout_s: None
        vars(one)["_store"] = store
        found.append(one)
    return found


def together(*bodies) -> list:
    """What each returns or raises, run at the same time."""
    results = [None] * len(bodies)

    def work(number):
        try:
            results[number] = bodies[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


# ---------------------------------------------------------------- talking


def test_one_process_agrees_with_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes()
    assert alone.first and alone.agree(lambda: 7) == 7 and alone.collect(8) == [8] and alone.fail(2) == (True, 2)


def test_all_get_what_the_first_has_made_and_it_gets_what_all_have():
    def body(one):
        made = [one.agree(lambda n=n: (one.rank, n)) for n in range(3)]
        return made, one.collect(one.rank * 10), one.agree(lambda: "end")

    first, second, third = together(*(lambda one=one: body(one) for one in several(3)))
    made = [(0, 0), (0, 1), (0, 2)]
    assert first == (made, [0, 10, 20], "end") and second == third == (made, [], "end")


def test_whoever_waits_learns_that_another_has_failed_and_the_first_failure_gives_the_code():
    first, second, third = several(3)
    found = together(lambda: first.collect(0), lambda: second.agree(lambda: 0), lambda: third.fail(2))
    assert isinstance(found[0], AnotherProcessFailed) and isinstance(found[1], AnotherProcessFailed)
    assert found[2] == (True, 2)
    assert third.fail(1) == (True, 2)  # asked again
    assert first.fail(1) == (False, 2)


def test_a_world_without_a_launcher_is_an_error_for_people(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RunError, match="Start it with accelerate launch, or unset WORLD_SIZE"):
        Processes().agree(lambda: 0)


# ---------------------------------------------------------------- the chain


@pytest.fixture
def two(monkeypatch):
    """Runs a recipe in two threads that stand for two processes; `did` notes which process ran which stage."""
    here, did = threading.local(), []
    for module in (chain, run_folder):
        monkeypatch.setattr(module, "processes", lambda: here.one)
    monkeypatch.setattr(chain, "check", lambda recipe: two.faults)
    monkeypatch.setattr(chain, "publish", lambda path: None)

    def alone(name):
        def run(recipe, step, folder):
            did.append((name, here.one.rank))
            folder.begin(name)
            folder.finish(name)

        return run

    def trained(name):
        def run(recipe, step, folder):
            did.append((name, here.one.rank))
            place = folder.processes.agree(lambda: folder.begin(name))
            if (name, here.one.rank) == two.fails:
                raise RuntimeError("boom")
            if folder.processes.first:
                (place / "adapter").mkdir()
            folder.add_data(name, rows=here.one.rank)
            folder.log(name, 1, {"rank": here.one.rank})
            folder.processes.collect(None)
            folder.finish(name, rank=here.one.rank)

        return run

    for name in ("select", "verify"):
        monkeypatch.setattr(chain, f"run_{name}", alone(name))
    for name in ("sft", "rl"):
        monkeypatch.setattr(chain, f"run_{name}", trained(name))

    def two(recipe, out):
        did.clear()
        two.said = []

        def body(one):
            here.one = one
            return chain.run(recipe, out, say=two.said.append)

        return together(*(lambda one=one: body(one) for one in several(2)))

    two.did, two.faults, two.fails = did, [], None
    return two


def test_the_first_process_selects_and_verifies_and_all_train(small, tmp_path, two):
    recipe = load(small)
    first, second = two(recipe, tmp_path / "run")
    assert sorted(two.did) == [("rl", 0), ("rl", 1), ("select", 0), ("sft", 0), ("sft", 1), ("verify", 0)]
    assert first.record == second.record == json.loads((tmp_path / "run" / "run.json").read_text())
    assert first.record["stages"]["rl"]["rank"] == 0 and first.record["data"]["sft"] == {"rows": 0}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["rank"]) for line in lines] == [("sft", 0), ("rl", 0)]
    assert len(two.said) == 4

    two(recipe, tmp_path / "run")
    assert two.did == [] and [line.split(": ")[1] for line in two.said] == ["done before, skipped"] * 4


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_process_fails_the_other_does_not_wait(small, tmp_path, two, rank):
    two.fails = ("rl", rank)
    found = two(load(small), tmp_path / "run")
    assert isinstance(found[rank], RuntimeError) and str(found[rank]) == "boom"
    assert isinstance(found[1 - rank], AnotherProcessFailed)
    assert (tmp_path / "run" / "sft" / "done").is_file() and not (tmp_path / "run" / "rl" / "done").exists()


def test_a_recipe_with_faults_ends_all_processes(small, tmp_path, two):
    two.faults = [Fault("r:1:1", "no")]
    first, second = two(load(small), tmp_path / "run")
    assert isinstance(first, RecipeError) and isinstance(second, AnotherProcessFailed)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the command


def test_the_command_starts_the_same_run_under_the_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    start, end = [sys.executable, "-m", "krontune.recipes.launch"], ["-m", "krontune", "run", "--", "r.yaml", "seed=1"]
    given = ["--", "r.yaml", "seed=1"]
    assert launch.command("--num_processes 2 --main_process_ip 'a b'", given) == [
        *start,
        "--num_processes",
        "2",
        "--main_process_ip",
        "a b",
        *end,
    ]
    named = launch.command("fsdp2 --num_processes 4", given)
    assert named == [
        *start,
        "--config_file",
        str(launch.config_path("fsdp2")),
        "--num_processes",
        "4",
        *end,
    ]
    assert launch.command("", given) == [*start, *end]


@pytest.mark.parametrize(
    ("options", "says"),
    [("fdsp2", "'fdsp2' is neither an option .* those are ddp, fsdp2"), ("--a 'b", "cannot be read as options")],
)
def test_options_that_cannot_be_meant_are_refused(options, says, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RunError, match=says):
        launch.command(options, ["r.yaml"])


def test_a_launch_within_a_launch_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="leave out one of the two"):
        launch.command("ddp", ["r.yaml"])


@pytest.mark.parametrize("name", launch.CONFIGS)
def test_the_configurations_are_read_by_accelerate_and_leave_the_number_of_processes_open(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(launch.config_path(name)))
    assert config.num_processes == -1 and config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]


def test_signals_reach_every_process_and_the_exit_code_is_kept(tmp_path, monkeypatch):
    script = (
        "import signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(40 - child.wait()))\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(launch, "command", lambda options, arguments: [sys.executable, "-c", script])

    def stop():
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert launch.launch("", []) == 40 + signal.SIGTERM


# ---------------------------------------------------------------- real launches

RECIPE = """\
name: tiny
base: {model: ./model, quantization: null}
stages:
  - stage: sft
    data: {puzzles: [lis], size: 12}
    adapter: {r: 2, n_shapes: 2, target_modules: [q_proj, v_proj]}
    trainer: {max_steps: 3, per_device_train_batch_size: 2, logging_steps: 1, save_steps: 1, learning_rate: 1e-2}
  - stage: rl
    task: {name: lis, n: [3, 4]}
    instances: 4
    reward: random
    credit: {horizon: [2, 8], credit_truncated: true, head_refresh: 2}
    trainer: {max_steps: 2, per_device_train_batch_size: 2, num_generations: 4, max_completion_length: 9, save_steps: 1}
  - stage: verify
    instances: 4
    max_new_tokens: 8
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_model(tmp_path / "model")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def started(*arguments: str, by: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *by, "-m", "krontune", "run", "tiny.yaml", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)


ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
DRIVER = ("--launch", "ddp --num_processes 2 --main_process_port 0")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == "sft" and "loss" in line]


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_train_as_one_and_a_cut_run_goes_on(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    done = started("--out", "two", by=ACCELERATE)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("sft", "rl", "verify"):
        assert done.stdout.count(f"{stage}: done in") == 1
    assert done.stdout.count("run folder: two") == 1
    record = json.loads(Path("two/run.json").read_text())
    for stage in ("sft", "rl"):
        assert record["stages"][stage]["processes"] == 2 and record["stages"][stage]["same_adapter_in_all"] is True
        weights = load_file(f"two/{stage}/adapter/adapter_model.safetensors")
        assert all(torch.isfinite(one).all() for one in weights.values())

    whole = [f"stages.{stage}.trainer.per_device_train_batch_size=4" for stage in ("sft", "rl")]
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    chain.run(load("tiny.yaml", whole), "one", say=lambda line: None)
    assert losses(Path("two")) == pytest.approx(losses(Path("one")), rel=1e-3) and len(losses(Path("one"))) == 3

    # As a kill after the first step of rl leaves it: the last checkpoint is not of the end.
    adapter = Path("two/rl/adapter/adapter_model.safetensors").read_bytes()
    for name in ("rl/done", "verify/done"):
        Path("two", name).unlink()
    Path("two/rl/begun").write_text(json.loads(Path("two/rl/trainer/checkpoint-1/complete.json").read_text())["key"])
    shutil.rmtree("two/rl/adapter")
    again = started("--out", "two", *DRIVER)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("rl: goes on after step 1") == 1
    assert "sft: done before, skipped" in again.stdout
    assert Path("two/rl/adapter/adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.slow
def test_a_run_that_fails_in_several_processes_ends_with_one_message_and_the_exit_code(tiny):
    stage = "{stage: sft, data: {puzzles: [lis], size: 4}, trainer: {max_steps: 3, learning_rate: 1e30}}"
    failed = started("--out", "bad", *DRIVER, f"stages=[{stage}]")
    assert failed.returncode == 1 and failed.stderr.count("is not finite after training") == 1, failed.stderr[-3000:]
    assert "Traceback" not in failed.stderr and not Path("bad/sft/done").exists()
