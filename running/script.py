"""How a script starts and how it stops: one line for a mistake, an exit status for a signal."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

from running.config import check_early, check_paths, override
from running.errors import InputError, Stopped

# ---- arguments -----------------------------------------------------------------------------------


def check_arguments():
    """Answer --help and refuse wrong arguments of a script, before it imports anything heavy.

    Called when `running` is imported, which scripts do first. The program has to be a file beside
    running/ with a literal run_config, which is read from its source; under pytest, torchrun or a
    notebook nothing happens. `run_script` reads the arguments by the same functions.
    """
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    if path.parent != Path(__file__).resolve().parent.parent or path.suffix != ".py":
        return
    source = path.read_text(encoding="utf-8")
    try:
        run_config = ast.literal_eval(_find_run_config(source))
    except ValueError:  # none, or not a literal: left to run_script
        return
    if _asks_for_help():
        print_help(ast.get_docstring(ast.parse(source), clean=False), run_config, source)
        raise SystemExit
    try:
        check_early(read_arguments(run_config))
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


def read_arguments(run_config):
    """run_config with the arguments of the command line. InputError for a mistake in them."""
    config = override(run_config, sys.argv[1:])
    check_paths({key: value for key, value in config.items() if value != run_config[key]})
    return config


def _asks_for_help():
    return bool({"--help", "-h"} & set(sys.argv[1:]))


HELP_COLUMN = 28  # where the comments begin


def print_help(docstring, run_config, source):
    """Print the docstring of a script, and of each key the default and the comment beside it."""
    print(docstring.strip(), "\n\nKeys and their defaults, changed by key=value:")
    columns = min(shutil.get_terminal_size((100, 24)).columns, 100)
    width = max(columns - HELP_COLUMN, 20)
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    for key, text in _comments(source):
        if not key:
            print(f"\n{text}")
            continue
        value = run_config[key]
        shown = f"  {key}={str(value).lower() if isinstance(value, bool) else value}"
        beside = textwrap.indent(wrapper.fill(text), " " * HELP_COLUMN)
        in_line = len(shown) + 2 <= HELP_COLUMN or not text
        print(shown + (beside[len(shown) :] if in_line else f"\n{beside}"))


def _comments(source):
    """(key, comment beside it) of each key; ("", comment) of a line that is only a comment."""
    lines, config = source.splitlines(), _find_run_config(source)
    end = config.lineno
    for key, value in zip(config.keys, config.values, strict=True):
        own_lines = (line.strip() for line in lines[end : key.lineno - 1])
        yield from (("", line.strip("# ")) for line in own_lines if line.startswith("#"))
        end = value.end_lineno
        yield key.value, lines[end - 1][value.end_col_offset :].partition("#")[2].strip()


def _find_run_config(source):
    """The dict run_config of a script, as a node of its syntax tree; ValueError for none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "run_config":
            return node.value
    raise ValueError("no run_config")


# ---- start and stop ------------------------------------------------------------------------------


def run_script(main, run_config, docstring):
    """Call main with the overridden config; a user's mistake ends in one line and status 1."""
    if _asks_for_help():
        source = Path(main.__code__.co_filename).read_text(encoding="utf-8")
        print_help(docstring, run_config, source)
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        main(read_arguments(run_config))
    except (InputError, FloatingPointError, OSError) as error:
        # errors from loader workers carry a traceback; the last line is the message
        lines = str(error).strip().splitlines() or [type(error).__name__]
        line = lines[-1].removeprefix("running.errors.InputError: ")
        raise SystemExit(f"error: {line}") from None
    except Stopped as stop:
        print(stop)
        raise SystemExit(stop.status) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        dist = sys.modules.get("torch.distributed")  # not imported here: see check_arguments
        if dist and dist.is_initialized():
            dist.destroy_process_group()


def _end(number, _):
    """End a script as Ctrl-C does: half-written files are removed, child processes end."""
    raise Stopped("stopped", 128 + number)


def refuse_torchrun():
    """Raise InputError under torchrun, where every process would do all of a script's work."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise InputError(f"WORLD_SIZE={processes}: wanted one process (python, not torchrun)")


ROOT = Path(__file__).resolve().parent.parent  # of the scripts
TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def start_script(name, keys, **keywords):
    """Run a script in one process of its own, as a user would. Returns the CompletedProcess.

    keys: of its run_config, with their values; keywords: of subprocess.run. Raises Stopped where
    Ctrl-C or SIGTERM ended it.
    """
    words = [sys.executable, str(ROOT / name), *(f"{key}={value}" for key, value in keys.items())]
    alone = {key: value for key, value in os.environ.items() if key not in TORCHRUN}
    done = subprocess.run(words, env=alone, check=False, **keywords)
    for number in (signal.SIGINT, signal.SIGTERM):
        if done.returncode in (128 + number, -number):  # -: before the script could notice it
            raise Stopped(f"stopped in {name}", 128 + number)
    return done


class StopSignal:
    """Whether Ctrl-C or SIGTERM came; `status` is the exit status, 130 or 143, or 0 for none."""

    def __init__(self):
        self.status, self.before = 0, {}

    def is_set(self):
        return self.status > 0

    def release(self):
        """Restore the handlers of before: nothing can be lost any more."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def stop_on_signals():
    """A StopSignal, set by Ctrl-C and SIGTERM, so that a run ends between two steps."""
    stop = StopSignal()

    def note(number, _):
        stop.status = 128 + number

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            stop.before[number] = signal.signal(number, note)
    return stop


def leave_signals_to_trainer(worker):
    """Of a loader worker: signals reach all processes; the trainer saves, then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
