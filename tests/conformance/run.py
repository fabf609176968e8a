"""Run the installed PEFT's own tests over MokaConfig: `make conformance`.

The tests come from the source distribution of the very version that is installed. They are fetched from the package
index, unpacked in a cache folder, and run suite by suite with `plugin.py`. One line a suite is printed, then every
failure. The exit status is 1 if a test failed that `explained.txt` does not name, or one passed that it names.

    python tests/conformance/run.py [SUITE ...]
"""

import os
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as xml
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUITES = (
    "test_custom_models",
    "test_decoder_models",
    "test_seq_classifier",
    "test_feature_extraction_models",
    "test_config",
    "test_quantization",
    "test_low_level_api",
    "test_torch_compile",
)


def main(suites: list[str]) -> int:
    if unknown := set(suites) - set(SUITES):
        print(f"unknown suites {sorted(unknown)}; there are {', '.join(SUITES)}")
        return 2
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "krontune" / "conformance"
    source = fetch(version("peft"), cache)
    sys.path.insert(0, str(HERE))
    import models

    models.build(cache / "models")
    explained = read_explained()
    unexplained, stale = [], []
    print(f"PEFT {version('peft')}, its own tests over MokaConfig")
    print(f"{'suite':<32}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for suite in suites or SUITES:
        start = time.perf_counter()
        outcomes, log = run(suite, source, cache)
        counts = [sum(state == wanted for state, _ in outcomes.values()) for wanted in ("passed", "failed", "skipped")]
        print(f"{suite:<32}{counts[0]:>8}{counts[1]:>8}{counts[2]:>8}{time.perf_counter() - start:>9.0f}", flush=True)
        if not outcomes:
            unexplained.append(f"{suite}: no test was run\n{log[-3000:]}")
        for name, (state, words) in outcomes.items():
            if state == "failed":
                known = f"explained: {explained[name]}" if name in explained else words
                print(f"  failed {name}\n    {known}")
                unexplained += [name] if name not in explained else []
            elif state == "passed" and name in explained:
                stale.append(name)
        for reason in sorted({words for state, words in outcomes.values() if state == "skipped"}):
            print(f"  skipped: {reason}")
    for name in stale:
        print(f"passes now, take it out of explained.txt: {name}")
    for name in unexplained:
        print(f"unexplained: {name}")
    return 1 if unexplained or stale else 0


def fetch(peft: str, cache: Path) -> Path:
    """The folder of PEFT's source distribution, which holds its tests; the wheel does not."""
    folder = cache / f"peft-{peft}"
    if not (folder / "tests").is_dir():
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(cache)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, f"peft=={peft}"], check=True)
        with tarfile.open(cache / f"peft-{peft}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    (folder / "tests" / "__init__.py").touch()
    return folder


def run(suite: str, source: Path, cache: Path) -> tuple[dict[str, tuple[str, str]], str]:
    """Test -> (passed, failed or skipped, first line of the reason); and what pytest printed."""
    report = cache / f"{suite}.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")])),
        "KRONTUNE_CONFORMANCE_MODELS": str(cache / "models"),
        "KRONTUNE_CONFORMANCE_SUITE": suite,
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # PEFT turns FutureWarnings into errors, and the installed transformers has one for PEFT's own code.
    options = [
        "-o",
        "addopts=",
        "-o",
        "filterwarnings=",
        "-p",
        "plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        f"--junitxml={report}",
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"tests/{suite}.py"],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
    )
    if not report.is_file():
        return {}, finished.stdout + finished.stderr
    outcomes = {}
    for case in xml.parse(report).iter("testcase"):
        child = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        state = "passed" if child is None else "skipped" if child.tag == "skipped" else "failed"
        words = "" if child is None else (child.get("message") or "").splitlines()[0][:200]
        name = case.get("name", "").replace(f"{cache / 'models'}{os.sep}", "")
        outcomes[f"{suite}::{name}"] = (state, words)
    return outcomes, finished.stdout


def read_explained() -> dict[str, str]:
    """Test -> why it fails. A line is `test: reason`; # begins a comment."""
    lines = [line for line in (HERE / "explained.txt").read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.rpartition(": ") for line in lines]
    return {name: reason for name, _, reason in pairs}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
