"""Entry point of the `vllm.general_plugins` group: runs in every process that vLLM starts.

It changes of vLLM what `compat.py` lists and nothing else, the LoRA manager class first; and only where
`VLLM_PLUGINS` names deltamux. vLLM loads every installed plugin while that variable is unset, and
somebody who serves ordinary LoRA adapters must not notice that deltamux is installed.
"""

import os
from typing import Any

from deltamux.serve.names import MOVE_METHOD

PLUGIN_NAME = "deltamux"


def register() -> None:
    """Install deltamux's manager; cheap, and harmless when called again."""
    if PLUGIN_NAME not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from deltamux.serve import compat
    from deltamux.serve.status import status_directory

    compat.check_vllm()
    compat.keep_compilation()
    status_directory()
    from deltamux.serve.worker.manager import ExpertManager

    compat.replace_manager(ExpertManager)
    setattr(compat.symbol(*compat.WORKER), MOVE_METHOD, _move)


def _move(worker: Any, how: str, expert_id: int) -> bool:
    """Moves that vLLM has no call for; the API process asks for them by `collective_rpc`."""
    moved: bool = getattr(worker.model_runner.lora_manager, how)(expert_id)
    return moved
