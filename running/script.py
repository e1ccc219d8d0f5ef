"""How a script starts and how it stops: one line for a mistake, an exit status for a signal."""

import os
import signal
import sys
import threading

import torch.distributed as dist

from running.config import override
from running.errors import InputError, Stopped


def run_script(main, run_config, docstring):
    """Call main with the overridden config; a user's mistake ends in one line and status 1."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(docstring.strip(), "\n\nKeys and their defaults:")
        print("\n".join(f"  {key}={value}" for key, value in run_config.items()))
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        main(override(run_config, sys.argv[1:]))
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
        if dist.is_initialized():
            dist.destroy_process_group()


def _end(number, _):
    """End a script as Ctrl-C does: half-written files are removed, child processes end."""
    raise Stopped("stopped", 128 + number)


def refuse_torchrun():
    """Raise InputError under torchrun, where every process would do all of a script's work."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise InputError(f"WORLD_SIZE={processes}: wanted one process (python, not torchrun)")


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
