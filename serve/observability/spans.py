"""Who answered, on vLLM's trace spans.

Where vLLM traces (`--otlp-traces-endpoint`), it makes one span per finished sequence in
`OutputProcessor.do_tracing`. That method is wrapped to say whose sequence it is, and a span processor
of OpenTelemetry's own interface adds the attributes when the span starts.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from deltamux.serve import compat
from deltamux.serve.observability.journal import RequestRecord

PREFIX = "deltamux."

_traced_record: ContextVar[RequestRecord | None] = ContextVar("traced_record", default=None)


def install(observability: Any) -> None:
    """Add attributes to the spans of a server that traces; does nothing for others.

    Args:
        observability: vLLM's ObservabilityConfig.
    """
    if getattr(observability, "otlp_traces_endpoint", None) is None:
        return
    from opentelemetry import trace
    from opentelemetry.sdk.trace import SpanProcessor

    class RecordAttributes(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            del parent_context
            record = _traced_record.get()
            if record is not None:
                span.set_attributes(attributes(record))

    provider: Any = trace.get_tracer_provider()
    provider.add_span_processor(RecordAttributes())
    processor: Any = compat.symbol(*compat.OUTPUT)
    processor.do_tracing = _naming(processor.do_tracing)


def attributes(record: RequestRecord) -> dict[str, str | float]:
    """A record as span attributes."""
    return {
        f"{PREFIX}expert": record.expert,
        f"{PREFIX}domain": record.decision.domain,
        f"{PREFIX}reason": record.decision.reason,
        f"{PREFIX}confidence": record.decision.confidence,
        f"{PREFIX}swap_wait_seconds": record.swap_wait_seconds,
    }


def _naming(do_tracing: Callable[..., None]) -> Callable[..., None]:
    def named(self: Any, output: Any, state: Any, *args: Any, **kwargs: Any) -> None:
        mark = _traced_record.set(getattr(state.stats, "deltamux_record", None))
        try:
            do_tracing(self, output, state, *args, **kwargs)
        finally:
            _traced_record.reset(mark)

    return named
