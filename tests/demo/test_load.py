"""The demo's load and its reading of metrics."""

import http.server
import math
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from deltamux.serve.demo.load import Ask, Scrape, mixed_load


@pytest.fixture
def scrape() -> Iterator[Scrape]:
    registry = CollectorRegistry()
    counter = Counter("deltamux_requests", "r", ["expert", "reason"], registry=registry)
    counter.labels("math", "router").inc(3)
    counter.labels("math", "explicit").inc(2)
    counter.labels("sql", "router").inc(5)
    latency = Histogram(
        "deltamux_ttft_seconds", "t", ["expert"], buckets=(1, 2, 4), registry=registry
    )
    for seconds in (0.5, 1.5, 1.5, 3.0):
        latency.labels("math").observe(seconds)
    latency.labels("slow").observe(100)
    page = generate_latest(registry)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Scrape(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()


def test_totals_sum_over_the_labels_that_are_not_named(scrape: Scrape) -> None:
    assert scrape.total("deltamux_requests_total", expert="math") == 5
    assert scrape.total("deltamux_requests_total", reason="router") == 8
    assert scrape.total("deltamux_requests_total", expert="nobody") == 0


def test_quantiles_are_linear_within_a_bucket(scrape: Scrape) -> None:
    # Buckets hold 1, 3 and 4 of 4: the median's rank 2 lies half-way from 1 s to 2 s.
    assert scrape.quantile("deltamux_ttft_seconds", 0.5, expert="math") == pytest.approx(1.5)
    assert scrape.quantile("deltamux_ttft_seconds", 1.0, expert="math") == pytest.approx(4)
    assert scrape.quantile("deltamux_ttft_seconds", 0.5, expert="slow") == 4
    assert math.isnan(scrape.quantile("deltamux_ttft_seconds", 0.5, expert="none"))


def test_the_load_is_half_routed_half_named_half_streamed() -> None:
    asks = mixed_load({"math": list("abcdefgh"), "sql": list("ijklmnop")})
    assert len(asks) == 16
    assert sum(ask.model == "auto" for ask in asks) == 8
    assert sum(ask.stream for ask in asks) == 8
    assert {ask.model for ask in asks} == {"auto", "math", "sql"}
    assert all(isinstance(ask, Ask) for ask in asks)
