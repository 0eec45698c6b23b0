"""Timing on a GPU: graph replays between events, and the memory bandwidth that bounds them."""

import statistics
from collections.abc import Callable

import torch


def graph_of(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture `work`, after it ran twice (compilation, handles)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def milliseconds(replay: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a call whose work is on the device; the first two calls do not count."""
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def graph_milliseconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a replay of `work` captured in a graph."""
    return milliseconds(graph_of(work).replay, repeats)


def copy_bandwidth(size: int = 1 << 31) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source)) / 1e3)
