"""Count what is promised of faults: run the tests that count, and print their numbers.

    python benchmarks/promises.py      # about five minutes on two CPU cores

Each number is printed by the test that keeps it, and holds where that test has passed.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ["test_kill.py", "test_bad_input.py", "test_hostile.py", "test_numerics.py"]
FILES += ["test_faults.py", "test_silent.py", "test_resume.py"]
FILES += ["test_map_faults.py", "test_map_input.py"]


def main():
    """Print a table: test file, tests that passed, numbers it printed. Returns the exit status."""
    status = 0
    print("| tests | passed | counted |\n|---|---|---|")
    for name in FILES:
        command = [sys.executable, "-m", "pytest", "-n", "0", "-s", "-q", f"tests/{name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        passed = re.findall(r"(\d+) passed", done.stdout)
        counted = re.findall(
            r"^(\d+) (kills|malformed inputs|awkward inputs|damaged files)$", done.stdout, re.M
        )
        numbers = ", ".join(f"{number} {what}" for number, what in counted)
        print(f"| `{name}` | {passed[-1] if passed else 0} | {numbers} |")
        if done.returncode:
            status = 1
            print(done.stdout[-3000:], file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
