"""`krontune run RECIPE --launch OPTIONS`: the same command in the processes that accelerate starts.

One launch carries a whole run: stages that are no training run in the first process while the others wait for it
without a timeout, so nothing is gained by a launch of its own for each stage.
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from .run_folder import RunError

CONFIGS = ("ddp", "fsdp2")


def config_path(name: str) -> Path:
    """The file of a configuration of accelerate that comes with krontune."""
    return Path(str(files("krontune.recipes") / f"accelerate_{name}.yml"))


def command(options: str, arguments: Sequence[str]) -> list[str]:
    """The command that starts `krontune run` with these arguments under `accelerate launch` with these options.

    Raises:
        RunError: the options are no command line, or this process was started by a launcher itself.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("--launch starts a launcher, and this process was started by one; leave out one of the two")
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise RunError(f"--launch {options!r} cannot be read as options: {error}") from error
    if words and words[0] in CONFIGS:
        words[:1] = ["--config_file", str(config_path(words[0]))]
    elif words and not words[0].startswith("-"):
        raise RunError(
            f"--launch {options!r}: {words[0]!r} is neither an option of accelerate launch nor a configuration that "
            f"comes with krontune; those are {', '.join(CONFIGS)}"
        )
    return [sys.executable, "-m", "krontune.recipes.launch", *words, "-m", "krontune", "run", *arguments]


def launch(options: str, arguments: Sequence[str]) -> int:
    """Run it to its end; the exit code is that of the process that failed first, or 0.

    SIGINT and SIGTERM are passed on to all processes, each of which ends as `krontune run` does.
    """
    child = subprocess.Popen(command(options, arguments), process_group=0)

    def pass_on(number: int, frame: Any) -> None:
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            pass

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 1


def main(arguments: Sequence[str]) -> int:
    """`accelerate launch` with these arguments, but for its traceback where a process of the run has failed: that one
    has said why. On a machine without an accelerator the processes are those of a CPU."""
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    asked = launch_command_parser().parse_args(arguments)
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if asked.num_processes is None and asked.config_file in [str(config_path(name)) for name in CONFIGS]:
        asked.num_processes = max(torch.accelerator.device_count(), 1)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        launch_command(asked)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 1
    except (SignalException, KeyboardInterrupt):
        return 1
    except ValueError as error:
        print(f"accelerate launch: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
