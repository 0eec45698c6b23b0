import json
import random
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.compression.choice.depth import TILTS, depth_factors, progression
from deltamux.compression.choice.evolution import Candidate, blend, evolve
from deltamux.compression.choice.knapsack import convex_hull, fill, hull_steps, knapsack
from deltamux.compression.choice.llm import FAILURES_BEFORE_GIVING_UP, LlmOperator
from deltamux.compression.choice.methods import ALLOCATORS, allocate
from deltamux.compression.choice.problem import (
    Curve,
    Rung,
    keep_rungs,
    pareto_front,
    predicted_loss,
    total_bytes,
)
from deltamux.compression.choice.threshold import Bridge, constrained_gradient, meet_budget
from deltamux.compression.choice.uniform import largest_fit, uniform

METHODS = sorted(ALLOCATORS)
FAST_METHODS = sorted(set(METHODS) - {"fcpts", "evolution"})
SHAPES = (1_024, 256, 256, 1_024, 4_096, 4_096, 4_096)


class ChatServer:
    """A chat endpoint that gives the same answer to every request."""

    def __init__(self, content, status=200):
        self.content, self.status = content, status
        # Answers wait for it; a test clears it to have the client give up first, whatever the machine does.
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.requests = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, dict(self.headers), json.loads(body)))
                outer.may_answer.wait()
                payload = outer.content
                if not isinstance(payload, bytes):
                    message = {"choices": [{"message": {"content": payload}}]}
                    payload = json.dumps(message).encode()
                try:
                    self.send_response(outer.status)
                    self.send_header("Content-Length", str(len(payload)))
                    self.end_headers()
                    self.wfile.write(payload)
                except ConnectionError:
                    pass

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class Depth:
    """Stands for a model whose layers at one end matter more than the importances say."""

    def __init__(self, curves, deep):
        last = max(curve.layer for curve in curves)
        self.curves = curves
        self.weights = [
            8.0 ** (curve.layer if deep else last - curve.layer) * curve.importance
            for curve in curves
        ]
        self.asked = []

    def __call__(self, choice):
        self.asked.append(tuple(choice))
        return sum(
            weight * curve.rungs[rung].error
            for weight, curve, rung in zip(self.weights, self.curves, choice, strict=True)
        )


def ladder(steps):
    """Rungs from (extra bytes, error factor) pairs."""
    rungs = [Rung(0, 1.0)]
    for extra, factor in steps:
        rungs.append(Rung(rungs[-1].num_bytes + extra, rungs[-1].error * factor))
    return tuple(rungs)


def make_model(num_layers=4, num_rungs=8, seed=0):
    """Curves of unlike matrices whose errors fall by unlike factors."""
    chance = random.Random(seed)
    curves = []
    for layer in range(num_layers):
        for index, num_weights in enumerate(SHAPES):
            steps = [
                (
                    num_weights // chance.choice([16, 32]) + chance.randrange(9),
                    chance.uniform(0.3, 0.95),
                )
                for _ in range(num_rungs - 1)
            ]
            importance = 10 ** chance.uniform(-3, 0)
            name = f"{layer}.{index}"
            curves.append(Curve(name, layer, num_weights, importance, ladder(steps)))
    return curves


def even_model(num_layers=8):
    """Layers that are all alike, with ten fine rungs each."""
    rungs = ladder([(64, 0.7)] * 10)
    return [Curve(f"{layer}", layer, 4_096, 1.0, rungs) for layer in range(num_layers)]


def top_bytes(curves):
    return sum(curve.rungs[-1].num_bytes for curve in curves)


def candidate(rates, loss=1.0):
    return Candidate(tuple(rates), (), loss)


@st.composite
def any_curves(draw, max_curves=5, max_rungs=5):
    """Ladders as bad as they come: flat, rising and worse than nothing."""
    curves = []
    for index in range(draw(st.integers(0, max_curves))):
        sizes = draw(st.lists(st.integers(1, 60), max_size=max_rungs))
        errors = [draw(st.floats(0, 1.2)) for _ in sizes]
        rungs = [Rung(0, 1.0), *map(Rung, sorted(sizes), errors)]
        importance = draw(st.sampled_from([0.0, 1e-12]) | st.floats(0.01, 100))
        layer = draw(st.integers(0, 3))
        num_weights = draw(st.integers(1, 200))
        curves.append(Curve(f"{index}", layer, num_weights, importance, tuple(rungs)))
    return curves


@st.composite
def any_model(draw):
    """Random, but plausible, ladders of a few layers."""
    seed = draw(st.integers(0, 10_000))
    return make_model(draw(st.integers(1, 4)), draw(st.integers(2, 8)), seed)


budgets = st.integers(0, 320)
shares = st.floats(0, 1.1)


def check_within_rules(method, curves, budget):
    choice = allocate(method, curves, budget)
    assert total_bytes(curves, choice) <= budget
    for curve, rung in zip(curves, choice, strict=True):
        assert rung in pareto_front(curve)
    assert allocate(method, curves, budget) == choice


@pytest.mark.parametrize("method", FAST_METHODS)
@settings(deadline=None, max_examples=60)
@given(curves=any_curves(), budget=budgets)
def test_no_method_exceeds_the_budget_or_takes_a_dominated_rung(method, curves, budget):
    check_within_rules(method, curves, budget)


@settings(deadline=None, max_examples=25)
@given(curves=any_curves(), budget=budgets)
def test_evolution_keeps_the_budget_and_takes_no_dominated_rung(curves, budget):
    check_within_rules("evolution", curves, budget)


@settings(deadline=None, max_examples=8)
@given(curves=any_curves(), budget=budgets)
def test_fcpts_keeps_the_budget_and_takes_no_dominated_rung(curves, budget):
    check_within_rules("fcpts", curves, budget)


@pytest.mark.parametrize("share", [0.03, 0.4, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_budget_of_a_plausible_model(method, share):
    curves = make_model()
    check_within_rules(method, curves, int(share * top_bytes(curves)))


@pytest.mark.parametrize("method", METHODS)
def test_no_budget_gives_no_deltas(method):
    curves = make_model(num_layers=2)
    assert allocate(method, curves, 0) == [0] * len(curves)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spare", [0, 10**12])
def test_a_budget_for_everything_gives_all_top_rungs(method, spare):
    curves = make_model(num_layers=2, num_rungs=6)
    assert allocate(method, curves, top_bytes(curves) + spare) == [5] * len(curves)


@pytest.mark.parametrize("method", METHODS)
def test_no_curves_give_no_choice(method):
    assert allocate(method, [], 100) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_single_curve_gets_its_best_rung_that_fits(method):
    rungs = (Rung(0, 1.0), Rung(10, 0.9), Rung(20, 0.2), Rung(30, 0.25), Rung(40, 0.1))
    curve = Curve("only", 3, 100, 2.0, rungs)
    chosen = [allocate(method, [curve], budget) for budget in (9, 10, 19, 20, 39, 40)]
    assert chosen == [[0], [1], [1], [2], [2], [4]]


@pytest.mark.parametrize("method", METHODS)
def test_a_top_rung_that_gains_nothing_is_not_bought(method):
    curve = Curve("flat", 0, 100, 1.0, (Rung(0, 1.0), Rung(10, 0.5), Rung(20, 0.5)))
    assert allocate(method, [curve, curve], 1_000) == [1, 1]


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of \['atp', 'evolution'.*got 'magic'"):
        allocate("magic", [], 0)


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="'budget_bytes' must be 0 or more, got -1"):
        allocate("uniform", [], -1)


@pytest.mark.parametrize(
    "rungs",
    [
        (),
        (Rung(1, 1.0),),
        (Rung(0, 1.0), Rung(0, 0.5)),
        (Rung(0, 1.0), Rung(9, 0.5), Rung(8, 0.4)),
        (Rung(0, 1.0), Rung(9, float("nan"))),
        (Rung(0, 1.0), Rung(9, -0.1)),
    ],
)
def test_a_malformed_ladder_is_refused(rungs):
    with pytest.raises(ValueError, match="'q_proj' must"):
        Curve("q_proj", 0, 1, 1.0, rungs)


@pytest.mark.parametrize(("num_weights", "importance"), [(0, 1.0), (1, -1.0), (1, float("inf"))])
def test_a_curve_without_weights_or_with_a_senseless_importance_is_refused(num_weights, importance):
    with pytest.raises(ValueError, match="'q_proj' must"):
        Curve("q_proj", 0, num_weights, importance, (Rung(0, 1.0),))


def test_the_objective_sees_rungs_of_the_whole_ladder_and_each_choice_once():
    curve = Curve("gap", 0, 8, 1.0, (Rung(0, 1.0), Rung(4, 1.1), Rung(5, 0.3), Rung(6, 0.2)))
    objective = Depth([curve, curve], deep=True)
    assert allocate("evolution", [curve, curve], 10, objective) == [2, 2]
    assert len(objective.asked) == len(set(objective.asked))
    assert not any(1 in choice for choice in objective.asked)


def test_a_choice_whose_loss_is_not_a_number_loses():
    curves = even_model()
    even = allocate("uniform", curves, 1_600)

    def objective(choice):
        return float("nan") if choice == even else predicted_loss(curves, choice)

    assert allocate("atp", curves, 1_600, objective) != even


@given(curves=any_curves(max_curves=1))
def test_the_front_holds_the_cheapest_rung_of_every_attainable_error(curves):
    for curve in curves:
        front = [curve.rungs[index] for index in pareto_front(curve)]
        for rung in curve.rungs:
            assert any(
                kept.num_bytes <= rung.num_bytes and kept.error <= rung.error for kept in front
            )
        for low, high in pairwise(front):
            assert low.num_bytes < high.num_bytes
            assert low.error > high.error


@given(curves=any_curves(max_curves=1, max_rungs=8))
def test_gains_per_byte_fall_along_the_hull_and_no_rung_lies_below_it(curves):
    for whole in curves:
        curve = keep_rungs(whole, pareto_front(whole))
        corners = [curve.rungs[index] for index in convex_hull(curve)]
        slopes = []
        for low, high in pairwise(corners):
            slope = (low.error - high.error) / (high.num_bytes - low.num_bytes)
            slopes.append(slope)
            for rung in curve.rungs:
                line = low.error - slope * (rung.num_bytes - low.num_bytes)
                assert rung.error >= line - 1e-9
        assert slopes == sorted(set(slopes), reverse=True)


def test_uniform_takes_the_largest_common_rate_and_leaves_the_rest():
    fine = Curve("fine", 0, 800, 1.0, (Rung(0, 1.0), Rung(100, 0.5), Rung(200, 0.2)))
    coarse = Curve("coarse", 0, 800, 1.0, (Rung(0, 1.0), Rung(200, 0.5)))
    wide = Curve("wide", 0, 8_000, 1.0, (Rung(0, 1.0), Rung(1_000, 0.5)))
    assert uniform([fine, coarse, wide], 1_099) == [0, 0, 0]
    assert uniform([fine, coarse, wide], 1_399) == [1, 0, 1]
    assert uniform([fine, coarse, wide], 1_400) == [2, 1, 1]


@given(curves=any_curves(), budget=budgets)
def test_uniform_could_not_have_afforded_the_next_rate(curves, budget):
    curves = [keep_rungs(curve, pareto_front(curve)) for curve in curves]
    choice = uniform(curves, budget)
    above = [
        curve.rungs[rung + 1].num_bytes / curve.num_weights
        for curve, rung in zip(curves, choice, strict=True)
        if rung + 1 < len(curve.rungs)
    ]
    if above:
        rate = min(above)
        affordable = [
            max(i for i, rung in enumerate(c.rungs) if rung.num_bytes / c.num_weights <= rate)
            for c in curves
        ]
        assert total_bytes(curves, affordable) > budget


def test_an_item_with_no_share_gets_nothing():
    assert largest_fit([[0, 5], [0, 5]], [0.0, 1.0], 100) == [0, 1]


@settings(deadline=None, max_examples=300)
@given(curves=any_curves(max_curves=4, max_rungs=3), budget=budgets)
def test_the_knapsack_is_within_one_step_of_the_optimum(curves, budget):
    choices = product(*(range(len(curve.rungs)) for curve in curves))
    affordable = (choice for choice in choices if total_bytes(curves, choice) <= budget)
    optimum = min(predicted_loss(curves, choice) for choice in affordable)
    pruned = [keep_rungs(curve, pareto_front(curve)) for curve in curves]
    largest_gain = max((step.gain for step in hull_steps(pruned)), default=0.0)
    loss = predicted_loss(curves, allocate("knapsack", curves, budget))
    assert optimum - 1e-9 <= loss <= optimum + largest_gain + 1e-9


@settings(deadline=None, max_examples=300)
@given(curves=any_curves(max_curves=6), low=budgets, extra=st.integers(0, 30))
def test_a_larger_budget_never_raises_the_predicted_loss_of_the_knapsack(curves, low, extra):
    less, more = (predicted_loss(curves, knapsack(curves, b)) for b in (low, low + extra))
    assert more <= less + 1e-9


@settings(deadline=None, max_examples=30)
@given(curves=any_model(), share=shares, extra=st.integers(0, 300))
def test_a_larger_budget_never_raises_the_loss_of_a_plausible_model(curves, share, extra):
    low = int(share * top_bytes(curves))
    less, more = (predicted_loss(curves, knapsack(curves, b)) for b in (low, low + extra))
    assert more <= less + 1e-9


@settings(deadline=None, max_examples=60)
@given(curves=any_curves() | any_model(), share=shares)
def test_the_knapsack_is_never_worse_than_uniform(curves, share):
    budget = int(share * top_bytes(curves))
    loss = predicted_loss(curves, allocate("knapsack", curves, budget))
    assert loss <= predicted_loss(curves, allocate("uniform", curves, budget)) + 1e-9


def test_the_knapsack_spends_all_but_a_small_step_of_the_budget():
    curves = make_model(num_layers=8)
    smallest_matrix = min(curve.rungs[-1].num_bytes for curve in curves)
    for share in (0.1, 0.33, 0.7):
        budget = int(share * top_bytes(curves))
        assert budget - total_bytes(curves, knapsack(curves, budget)) < smallest_matrix


@given(curves=any_curves(), budget=budgets)
def test_filling_ends_when_nothing_more_fits(curves, budget):
    curves = [keep_rungs(curve, pareto_front(curve)) for curve in curves]
    filled = fill(curves, [0] * len(curves), budget)
    left = budget - total_bytes(curves, filled)
    assert left >= 0
    for curve, rung in zip(curves, filled, strict=True):
        if rung + 1 < len(curve.rungs):
            assert curve.rungs[rung + 1].num_bytes - curve.rungs[rung].num_bytes > left


def test_the_progression_is_arithmetic_in_depth():
    curves = [
        Curve("", layer, 10_000, 1.0, ladder([(1, 0.99)] * 2_000)) for layer in (2, 4, 6, 8, 10)
    ]
    rates = progression(curves, 2_500, 0.5)
    assert rates == pytest.approx([750, 625, 500, 375, 250], abs=1)
    assert 2_490 <= sum(rates) <= 2_500


def test_a_single_layer_has_no_tilt():
    assert depth_factors(make_model(num_layers=1), 0.8) == [1.0] * len(SHAPES)


@pytest.mark.parametrize("method", ["atp", "knapsack-atp"])
@pytest.mark.parametrize("deep", [True, False])
def test_the_tilt_favours_the_end_that_the_objective_favours(method, deep):
    curves = even_model()
    objective = Depth(curves, deep)
    choice = allocate(method, curves, 2_560, objective)
    early, late = sum(choice[:4]), sum(choice[4:])
    assert (late > early) is deep
    assert len(objective.asked) <= len(TILTS)
    assert objective(choice) < objective(allocate("uniform", curves, 2_560))


def test_without_an_objective_like_layers_are_not_tilted():
    curves = even_model()
    assert allocate("atp", curves, 2_560) == allocate("uniform", curves, 2_560)


@settings(deadline=None, max_examples=10)
@given(curves=any_model(), share=shares, deep=st.booleans())
def test_no_search_ends_worse_than_its_starting_points(curves, share, deep):
    objective = Depth(curves, deep)
    budget = int(share * top_bytes(curves))
    even, packed, depth, packed_depth, evolved = (
        objective(allocate(method, curves, budget, objective))
        for method in ("uniform", "knapsack", "atp", "knapsack-atp", "evolution")
    )
    assert depth <= even
    assert packed_depth <= packed
    assert evolved <= min(even, packed)


def test_evolution_improves_on_the_knapsack_where_the_importances_mislead():
    curves = make_model()
    objective = Depth(curves, deep=True)
    budget = int(0.3 * top_bytes(curves))
    packed, evolved = (
        objective(allocate(method, curves, budget, objective))
        for method in ("knapsack", "evolution")
    )
    assert evolved < 0.8 * packed


def test_evolution_takes_its_parameters_through_a_partial():
    curves = make_model(num_layers=2)
    objective = Depth(curves, deep=True)
    allocate(partial(evolve, population=3, generations=2), curves, 3_000, objective)
    assert len(objective.asked) <= 3 + 2


@pytest.mark.parametrize("sizes", [{"population": 2}, {"generations": -1}])
def test_a_population_that_cannot_evolve_is_refused(sizes):
    with pytest.raises(ValueError, match="'population' must be above 2"):
        evolve(even_model(), 1_000, lambda choice: 0.0, **sizes)


def test_blending_gives_every_layer_a_rate():
    chance = random.Random(0)
    rates = blend(candidate([0.0] * 50), candidate([2.0] * 50), chance)
    assert len(rates) == 50
    assert min(rates) >= 0
    assert {0.0, 2.0} < set(rates)


def test_learned_thresholds_beat_a_uniform_rate_and_come_near_the_knapsack():
    curves = make_model()
    for share in (0.1, 0.3, 0.6):
        even, packed, learned = (
            predicted_loss(curves, allocate(method, curves, int(share * top_bytes(curves))))
            for method in ("uniform", "knapsack", "fcpts")
        )
        assert packed <= learned + 1e-9
        # Rounded down and filled, the places end within a few steps of the optimum.
        assert learned < packed + 0.1 * (even - packed)


def test_thresholds_meet_the_budget_and_their_gradient_keeps_it():
    curves = make_model()
    bridge = Bridge.of(curves)
    budget = int(0.4 * top_bytes(curves))
    generator = torch.Generator().manual_seed(0)
    thresholds = torch.randn(len(curves), generator=generator, dtype=torch.float64)
    importances = torch.tensor([curve.importance for curve in curves], dtype=torch.float64)

    def loss(thresholds):
        places = bridge.places(meet_budget(bridge, thresholds, budget))
        assert float(bridge.num_bytes(places).sum()) == pytest.approx(budget, rel=1e-9)
        return float(importances @ bridge.errors(places))

    gradient = constrained_gradient(bridge, importances, thresholds, budget)
    step = 1e-6
    for index in range(len(curves)):
        nudge = torch.zeros_like(thresholds)
        nudge[index] = step
        slope = (loss(thresholds + nudge) - loss(thresholds - nudge)) / (2 * step)
        # Relative to the whole: central differences of a loss of order 1 are good to 1e-8 or so.
        assert slope == pytest.approx(float(gradient[index]), abs=1e-5)


def test_a_lossless_rung_does_not_unsettle_the_thresholds():
    lossless = [
        Curve(
            curve.name, curve.layer, curve.num_weights, curve.importance, (*curve.rungs[:-1], last)
        )
        for curve in make_model()
        for last in [Rung(2 * curve.rungs[-1].num_bytes, 0.0)]
    ]
    even, packed, learned = (
        predicted_loss(lossless, allocate(method, lossless, top_bytes(lossless) // 2))
        for method in ("uniform", "knapsack", "fcpts")
    )
    assert learned < packed + 0.1 * (even - packed)


@pytest.mark.parametrize(
    "content", ["[2, 1.5, 0]", "Parents [1, 1, 1] suggest\n```json\n[2.0, 1.5, 0]\n```"]
)
def test_a_good_answer_is_the_offspring(content):
    with ChatServer(content) as server:
        operator = LlmOperator(server.base_url, "tiny", api_key="secret")
        rates = operator(candidate([1, 1, 1], 0.5), candidate([2, 1, 0], 0.25), random.Random(0))
    assert rates == [2.0, 1.5, 0.0]
    assert (operator.proposals, operator.fallbacks) == (1, 0)
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "tiny"
    question = body["messages"][0]["content"]
    assert "loss 0.25: [2, 1, 0]" in question
    assert "JSON list of 3 numbers" in question


@pytest.mark.parametrize(
    "content",
    [
        "I cannot help with that.",
        "[1, 2]",
        "[1, 2, 3, 4]",
        "[1, -1, 1]",
        "[1, 11, 1]",
        "[0, 0, 0]",
        "[1, NaN, 1]",
        "[1, true, 1]",
        '[1, "2", 1]',
        "[1, , 1]",
        None,
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"choices": []}',
        b'{"choices": null}',
        b"[" * 100_000,
    ],
)
def test_a_useless_answer_is_replaced(content):
    mother, father = candidate([1, 1, 1]), candidate([2, 1, 0])
    with ChatServer(content) as server:
        operator = LlmOperator(server.base_url, "tiny")
        rates = operator(mother, father, random.Random(5))
    assert rates == blend(mother, father, random.Random(5))
    assert (operator.proposals, operator.fallbacks) == (1, 1)
    assert "Authorization" not in server.requests[0][1]


def test_a_slow_answer_is_replaced():
    with ChatServer("[1, 1]") as server:
        server.may_answer.clear()
        operator = LlmOperator(server.base_url, "tiny", timeout_seconds=0.05)
        operator(candidate([1, 1]), candidate([1, 1]), random.Random(0))
        server.may_answer.set()
        assert operator.fallbacks == 1


@pytest.mark.parametrize("status", [404, 500])
def test_a_failing_endpoint_is_given_up(status):
    with ChatServer("[1, 1]", status=status) as server:
        operator = LlmOperator(server.base_url, "tiny")
        for _ in range(FAILURES_BEFORE_GIVING_UP + 4):
            operator(candidate([1, 1]), candidate([1, 1]), random.Random(0))
    assert operator.fallbacks == operator.proposals == FAILURES_BEFORE_GIVING_UP + 4
    assert len(server.requests) == FAILURES_BEFORE_GIVING_UP


def test_an_unreachable_endpoint_leaves_the_plain_search():
    with ChatServer("") as server:
        operator = LlmOperator(server.base_url, "tiny")
    curves = make_model(num_layers=2)
    budget = int(0.4 * top_bytes(curves))
    objective = Depth(curves, deep=True)
    method = partial(evolve, operator=operator)
    assert allocate(method, curves, budget, objective) == allocate(
        "evolution", curves, budget, objective
    )
    assert operator.fallbacks == operator.proposals == 14 * 12


def test_evolution_uses_what_the_model_proposes():
    curves = even_model()
    best = "[0, 0, 0, 0.4, 0.8, 1.6, 2.4, 2.8]"
    objective = Depth(curves, deep=True)
    with ChatServer(best) as server:
        operator = LlmOperator(server.base_url, "tiny")
        method = partial(evolve, operator=operator, population=3, generations=1)
        advised = allocate(method, curves, 2_560, objective)
    plain = allocate(partial(evolve, population=3, generations=1), curves, 2_560, objective)
    assert objective(advised) < objective(plain)
    assert (operator.proposals, operator.fallbacks) == (1, 0)


def test_an_endpoint_that_is_no_web_address_is_refused():
    with pytest.raises(ValueError, match="'base_url' must be an http or https address"):
        LlmOperator("file:///etc", "tiny")


def test_the_key_is_not_shown():
    assert "secret" not in repr(LlmOperator("http://127.0.0.1", "tiny", api_key="secret"))
