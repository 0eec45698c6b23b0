"""Entry point of the `vllm.general_plugins` group: runs in every process that vLLM starts.

It changes of vLLM what `compat.py` lists and nothing else, the LoRA manager class first; and only where
`VLLM_PLUGINS` names deltamux. vLLM loads every installed plugin while that variable is unset, and
somebody who serves ordinary LoRA adapters must not notice that deltamux is installed.
"""

import os

PLUGIN_NAME = "deltamux"


def register() -> None:
    """Install deltamux's manager; cheap, and harmless when called again."""
    if PLUGIN_NAME not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from deltamux.serve import compat, patches
    from deltamux.serve.status import begin_server
    from deltamux.serve.threads import watch_threads

    compat.check_vllm()
    patches.keep_compilation()
    watch_threads()
    begin_server()
    from deltamux.serve.worker.manager import ExpertManager

    patches.replace_manager(ExpertManager)
    patches.tell_ends_of_steps()
