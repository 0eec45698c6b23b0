"""A replica's process: `deltamux serve`, which ends when the process that started it does.

python -m deltamux.serve.fleet.child deltamux.yaml …
"""

import ctypes
import os
import signal
import sys

# Of prctl(2): the signal that a process gets when its parent ends; it stays through exec.
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the server."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    command = [sys.executable, "-m", "deltamux.serve", "serve", *sys.argv[1:]]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
