"""The command line. Nothing heavy is imported before a verb needs it."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

WRONG_RECIPE, FAILED_RUN = 2, 1

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Make a 4-bit language model better at something: select data, train a small adapter, reinforce, verify.",
)

FIRST = """\
krontune doctor                  what is installed here, and what would go wrong
krontune recipes                 the shipped recipes; quickstart runs on a CPU in minutes
krontune copy quickstart         a recipe of your own to edit
krontune check quickstart.yaml   every fault, before anything is trained; plan: what it will take
krontune run quickstart.yaml     run it; run it again to go on where it was cut; --help: all else"""


def _complete_shipped(incomplete: str) -> list[str]:
    """Names of shipped recipes, by their files: reading them would take longer than a key press."""
    from importlib.resources import files

    names = sorted(file.name for file in files("krontune.recipes").iterdir() if file.name.endswith(".yaml"))
    return [name.removesuffix(".yaml") for name in names if name.startswith(incomplete)]


def _complete_recipe(incomplete: str) -> list[str]:
    here = sorted(file.name for file in Path().glob("*.y*ml") if file.name.startswith(incomplete))
    return [*here, *_complete_shipped(incomplete)]


RecipeName = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a shipped recipe.", autocompletion=_complete_recipe)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="path.to.key=value, e.g. stages.sft.trainer.max_steps=10", metavar="[KEY=VALUE]..."),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Print the whole traceback of an error.")]


@app.callback(invoke_without_command=True)
def _front(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from . import __version__

        typer.echo(f"krontune {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(FIRST)


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None, show_traceback: Traceback = False) -> None:
    """Find every fault of a recipe that shows without training."""

    def body() -> None:
        from krontune.recipes import RecipeError, load, notes
        from krontune.recipes import check as find_faults
        from krontune.recipes.sweep import points

        loaded = load(recipe, overrides or ())
        faults = [
            fault for one in (points(loaded).values() if loaded.sweep else [loaded]) for fault in find_faults(one)
        ]
        if faults:
            raise RecipeError(faults)
        typer.echo(f"{recipe}: no faults; stages: {', '.join(loaded.names)}")
        from krontune.recipes.preview import print_preview

        print_preview(loaded)
        for note in notes(loaded):
            typer.echo(f"{recipe}: note: {note}")

    _guarded(body, show_traceback)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, with the resolved recipe.")] = False,
    probe: Annotated[
        bool | None,
        typer.Option("--probe/--no-probe", help="Time a few tokens on the loaded model (default: where it is here)."),
    ] = None,
    show_traceback: Traceback = False,
) -> None:
    """Say what a recipe will take: steps, tokens, memory and time of each stage."""

    def body() -> None:
        from krontune.recipes import RecipeError, load
        from krontune.recipes import check as find_faults
        from krontune.recipes.plan import SweepPlan, plan_sweep, print_plan, print_sweep_plan
        from krontune.recipes.plan import plan as make_plan
        from krontune.recipes.sweep import points

        loaded = load(recipe, overrides or ())
        todo = points(loaded) if loaded.sweep else {"": loaded}
        faults = [fault for one in todo.values() for fault in find_faults(one)]
        if faults:
            raise RecipeError(faults)
        found = plan_sweep(loaded, todo, probe) if loaded.sweep else make_plan(loaded, probe)
        if as_json:
            typer.echo(found.as_json(), nl=False)
        elif isinstance(found, SweepPlan):
            print_sweep_plan(found)
        else:
            print_plan(found)

    _guarded(body, show_traceback)


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder (default: runs/<name of the recipe>).")] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            help='Run in several processes, with these options of `accelerate launch`; "ddp" or "fsdp2" as the first '
            "word takes a configuration that comes with krontune.",
        ),
    ] = None,
    show_traceback: Traceback = False,
) -> None:
    """Run a recipe; run it again to go on where it was cut."""

    def body() -> None:
        from krontune.recipes import load

        loaded = load(recipe, overrides or ())
        if launch is not None:
            from krontune.recipes.launch import launch as launch_again

            options = (["--out", str(out)] if out else []) + (["--traceback"] if show_traceback else [])
            sys.exit(launch_again(launch, [*options, "--", recipe, *(overrides or ())]))
        from krontune.recipes import run as run_recipe
        from krontune.recipes.processes import processes
        from krontune.recipes.report import print_report

        if loaded.sweep:
            from krontune.recipes.sweep import run_sweep

            run_sweep(loaded, out, say=typer.echo)
            return
        finished = run_recipe(loaded, out, say=typer.echo)
        if processes().first:
            print_report(finished)
        processes().leave()

    _guarded(body, show_traceback)


@app.command()
def audit(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="The report to write, as JSON.")] = Path("audit_report.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and no table.")] = False,
    show_traceback: Traceback = False,
) -> None:
    """Check the task, the data and the reward of a recipe before training; exit 1 where a check fails."""

    def body() -> None:
        from krontune.recipes import load
        from krontune.recipes.audit import audit as run_checks
        from krontune.recipes.audit import must_stop, print_audit, write_audit

        loaded = load(recipe, overrides or ())
        results = run_checks(loaded)
        report = write_audit(results, loaded, out)
        if as_json:
            typer.echo(report, nl=False)
        else:
            print_audit(results)
        if must_stop(results):
            sys.exit(FAILED_RUN)

    _guarded(body, show_traceback)


@app.command()
def doctor() -> None:
    """Look at this machine: versions, devices, known traps and their cures; exit 1 where something is broken."""

    def body() -> None:
        from krontune.recipes.doctor import examine, print_findings

        findings = examine()
        print_findings(findings)
        if any(finding.state == "broken" for finding in findings):
            sys.exit(FAILED_RUN)

    _guarded(body, show_traceback=False)


@app.command("recipes")
def list_recipes() -> None:
    """List the shipped recipes."""

    def body() -> None:
        from krontune.recipes.shipped import shipped

        for name, description in shipped().items():
            typer.echo(f"{name}: {description}")

    _guarded(body, show_traceback=False)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe.", autocompletion=_complete_shipped)],
    to: Annotated[Path | None, typer.Argument(help="The new file (default: NAME.yaml here).")] = None,
) -> None:
    """Copy a shipped recipe, to be edited."""

    def body() -> None:
        from krontune.recipes.shipped import copy_recipe

        typer.echo(f"wrote {copy_recipe(name, to or Path(f'{name}.yaml'))}")

    _guarded(body, show_traceback=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""

    def body() -> None:
        from krontune.recipes.json_schema import recipe_schema

        typer.echo(recipe_schema(), nl=False)

    _guarded(body, show_traceback=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option("--out", help="Also write the table as an HTML page.")] = None,
    show_traceback: Traceback = False,
) -> None:
    """Write a run's report.html and rlvr_report.json anew; of several runs, also print one table."""

    def body() -> None:
        from krontune.recipes.compare import compare, publish

        for path in [publish(run) for run in runs]:
            typer.echo(path)
        if len(runs) > 1 or out:
            compare(runs, out)

    _guarded(body, show_traceback)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run that is done.")],
    repo: Annotated[
        str | None, typer.Option("--repo", help="owner/name for the adapter (default: the recipe's).")
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="owner/name for the selected rows.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The Hub id of the base, where the run used a folder.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that this run did not put there.")
    ] = False,
    show_traceback: Traceback = False,
) -> None:
    """Push a run's adapter, card and reports to the Hub; push again to go on where it was cut."""

    def body() -> None:
        from krontune.recipes.hub import push as push_run

        private = False if public else None
        push_run(run, repo, dataset, private=private, base_model=base_model, overwrite=overwrite, say=typer.echo)

    _guarded(body, show_traceback)


def _guarded(body: Callable[[], Any], show_traceback: bool) -> None:
    """One clear message and an exit code for whatever goes wrong: 2 for a wrong recipe, 1 for a failed run."""
    _settle_libraries()
    try:
        body()
    except KeyboardInterrupt:
        _fail("interrupted; what is finished is kept, run the same command to go on", FAILED_RUN, show_traceback)
    except Exception as error:
        from krontune.recipes.errors import explain

        message, wrong_recipe = explain(error)
        _fail(message, WRONG_RECIPE if wrong_recipe else FAILED_RUN, show_traceback)


def _fail(message: str, code: int, show_traceback: bool) -> None:
    """Of several processes, the first that fails says why, and all end with its code."""
    from krontune.recipes.masking import hide
    from krontune.recipes.processes import processes

    others = processes()
    if others.count > 1:  # the launcher passes on what the terminal has sent already
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    speaks, code = others.fail(code)
    if not speaks:
        others.wait_until_told()
        sys.stdout.flush()
        os._exit(code)
    if show_traceback:
        typer.echo(hide(traceback.format_exc()), err=True, nl=False)
    typer.echo(hide(message if others.first else f"process {others.rank} of {others.count}: {message}"), err=True)
    others.told()
    if others.count > 1:
        sys.stdout.flush()
        os._exit(code)  # whatever of the collectives still waits for another process would keep this one
    sys.exit(code)


def _settle_libraries() -> None:
    """Keep the libraries' progress bars and advice off the terminal, and their threads from fighting over cores."""
    import logging
    import warnings

    # A thread that waits by spinning takes the core from the one it waits for wherever the machine is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if os.environ.get("RANK", "0") != "0":  # of several processes one is enough to say it
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)


def main() -> None:
    # A batch system's time limit ends like Ctrl-C: with a word, and with what is finished kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
