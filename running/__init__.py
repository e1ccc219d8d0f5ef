"""How any script runs: errors, config, start and stop, device, files, checkpoints, log.

Imported before torch (ruff sorts it there), since OpenMP reads its settings when torch is loaded,
and since a mistake in the arguments need not wait for the seconds that torch takes.
"""

import os

from running.script import check_arguments

# Threads of OpenMP may spin while they wait for work. Where another process wants the cores, they
# take them from those that compute (a training step took seven times as long), but threads that
# sleep at once cost a fifth on a quiet machine. So they spin for a moment, then sleep.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
check_arguments()
