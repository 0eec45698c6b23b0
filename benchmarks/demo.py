"""Run the demo and keep its figures with the hardware and versions they were measured on.

python -m benchmarks.demo [--root .demo]
"""

import argparse
import json
import subprocess
import sys

from benchmarks.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=".demo")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "deltamux.serve", "demo", "--root", arguments.root]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        lines = []
        for line in demo.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if demo.returncode:
        sys.exit(demo.returncode)
    record("demo", json.loads(lines[-1]))


if __name__ == "__main__":
    main()
