"""A server for comparison: deltamux without its gate, so that a step loads what it lacks, least recently used out.

python -m benchmarks.swap_plain CONFIG [vLLM flags]
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from deltamux.serve import compat
from deltamux.serve.launch import vllm_arguments
from deltamux.serve.settings import load_settings


def main() -> None:
    os.environ["VLLM_PLUGINS"] = "deltamux"
    from deltamux.serve.api.gate import Gate

    async def enter(_: Any, expert: Any) -> float:
        expert.entered += 1
        return 0.0

    Gate.enter = enter  # type: ignore[method-assign]
    module, prefix = compat.server_command()
    arguments = vllm_arguments(load_settings(Path(sys.argv[1])), sys.argv[2:])
    sys.argv = [module, *prefix, *arguments]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
