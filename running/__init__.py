"""How any script runs: errors, config, start and stop, device, files, checkpoints, log.

Imported before torch (ruff sorts it there), since OpenMP reads its settings when torch is loaded,
and since a mistake in the arguments need not wait for the seconds that torch takes.
"""

import os

from running.script import check_arguments

# Threads that wait without spinning: where another process wants the cores, spinning threads take
# them from those that compute, and a training step took seven times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
check_arguments()
