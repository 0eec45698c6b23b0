"""Prometheus metrics, in the default registry, so that vLLM's `/metrics` shows them.

Labels take configured names only: an expert's name, `base` or `unknown`, a router's domain, a reason of
`deltamux.router.decide.decision`, an outcome of `journal.py`; never a client's text. Here are the metrics that
count events; `collector.py` has those that are read at each scrape.
"""

from prometheus_client import Counter, Gauge, Histogram

# Upper bounds in seconds. Chosen, not measured: dense where the times of a 135M model on two cores and of a
# 7B model on a GPU lie, coarse beyond.
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
ITL_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300)
# The first bucket holds the requests that did not wait at all.
SWAP_WAIT_BUCKETS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
ROUTER_BUCKETS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1)
CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

requests_total = Counter("deltamux_requests", "Requests by who answers.", ["expert", "reason"])
request_outcomes = Counter(
    "deltamux_request_outcomes",
    "Ended requests: ok, aborted by the client, invalid (4xx), unavailable (503), error (5xx).",
    ["expert", "reason", "outcome"],
)
tokens_total = Counter(
    "deltamux_tokens",
    "Tokens of prompts (kind prompt) and answers (generated).",
    ["expert", "kind"],
)
ttft_seconds = Histogram(
    "deltamux_ttft_seconds",
    "Arrival to first token, swaps included.",
    ["expert"],
    buckets=TTFT_BUCKETS,
)
itl_seconds = Histogram(
    "deltamux_itl_seconds", "Time between tokens.", ["expert"], buckets=ITL_BUCKETS
)
e2e_seconds = Histogram(
    "deltamux_e2e_seconds",
    "Arrival to the end of a complete response.",
    ["expert"],
    buckets=E2E_BUCKETS,
)
swap_wait_seconds = Histogram(
    "deltamux_swap_wait_seconds",
    "Part of the time to first token in which an expert was brought to host cache and slot.",
    ["expert"],
    buckets=SWAP_WAIT_BUCKETS,
)
speculative_steps = Counter(
    "deltamux_speculative_steps", "Steps that checked drafted tokens of a sequence.", ["expert"]
)
speculative_accepted = Counter(
    "deltamux_speculative_accepted_tokens", "Drafted tokens that an expert accepted.", ["expert"]
)
router_decisions = Counter("deltamux_router_decisions", "Routed requests.", ["domain", "reason"])
router_seconds = Histogram(
    "deltamux_router_seconds", "Time to decide, with tokenization.", buckets=ROUTER_BUCKETS
)
router_confidence = Histogram(
    "deltamux_router_confidence", "Confidence of decisions.", buckets=CONFIDENCE_BUCKETS
)
tenant_requests = Counter(
    "deltamux_tenant_requests", "Ended requests of a tenant.", ["tenant", "outcome"]
)
tenant_tokens = Counter(
    "deltamux_tenant_tokens", "Tokens of a tenant's prompts and answers.", ["tenant", "kind"]
)
tenant_refusals = Counter(
    "deltamux_tenant_refusals",
    "What a tenant was refused: for want of requests, tokens or concurrency, of an expert, of an admin's rights.",
    ["tenant", "reason"],
)
build_info = Gauge("deltamux_build_info", "Versions.", ["version", "vllm_version"])
