"""Entry point of the `vllm.general_plugins` group: runs in every process that vLLM starts.

It replaces one symbol, the LoRA manager class (see `compat.py`), and nothing else.
"""


def register() -> None:
    """Install deltamux's manager; cheap, and harmless when called again."""
    from deltamux.serve import compat
    from deltamux.serve.status import status_directory

    compat.check_vllm()
    status_directory()
    from deltamux.serve.manager import ExpertManager

    compat.replace_manager(ExpertManager)
