"""What deltamux changes in vLLM, all of it: the manager of adapters, the end of a step, compilation on the CPU.

`plugin.py` applies it in every process of vLLM; what is touched is named, and probed, in `compat.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

from deltamux.serve import compat


def keep_compilation() -> None:
    """Let the CPU build compile models that experts change; a second call does nothing.

    vLLM's CPU platform turns torch.compile off where LoRA is on, because of its own LoRA layers. Ours are opaque
    ops, so the platform is asked as if LoRA were off; that is all that it does with the answer.
    """
    if not compat.symbol("vllm.platforms", "current_platform").is_cpu():
        return
    platform = compat.symbol(*compat.CPU_PLATFORM)
    method = platform.check_and_update_config
    if getattr(method, "__name__", "") == _without_lora.__name__:
        return

    def check_and_update_config(config: Any) -> None:
        with _without_lora(config):
            method(config)

    check_and_update_config.__name__ = _without_lora.__name__
    platform.check_and_update_config = staticmethod(check_and_update_config)


@contextmanager
def _without_lora(config: Any) -> Iterator[None]:
    lora, config.lora_config = config.lora_config, None
    try:
        yield
    finally:
        config.lora_config = lora


def replace_manager(manager: type) -> None:
    """Make vLLM's model runners create deltamux's manager."""
    compat.symbol(*compat.MANAGER)
    module, name = compat.MANAGER
    setattr(import_module(module), name, manager)


def tell_ends_of_steps() -> None:
    """Let the worker tell the manager when a step has ended; a second call does nothing.

    vLLM says when a step begins (it sets the batch's adapters) but not when it is over. `execute_model` returns
    None where `sample_tokens` is to finish the step.
    """
    worker = compat.symbol(*compat.WORKER)
    for name in compat.STEP_METHODS:
        method = getattr(worker, name, None)
        if method is not None and not hasattr(method, "deltamux"):
            setattr(worker, name, _telling(method))


def _telling(method: Any) -> Any:
    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        finished = True
        try:
            output = method(self, *args, **kwargs)
            finished = output is not None
        finally:
            tell = getattr(getattr(self.model_runner, "lora_manager", None), "step_ended", None)
            if finished and tell is not None:
                tell()
        return output

    run.deltamux = True  # type: ignore[attr-defined]
    return run
