"""The controller and the pilot's search on synthetic models: numbers in, numbers out."""

import json
import math

import pytest

from soul.run.aim import (
    ALPHA_RANGE,
    MAX_BACKS,
    MAX_TRIES,
    Controller,
    Search,
    Target,
    advice,
    parse_aim,
    summary,
    verdict,
)
from soul_kernels.errors import ArgumentError
from tests.support.helpers import mutant

STEPS = 60


def target(aim=0.16, forget=0.667, control=0.666, keep=0.95):
    return Target(aim, "as given", forget, control, keep)


class Model:
    """A synthetic model: each step moves two log-probabilities.

    The forget term lowers both, the control rows by a fraction ``shared``; the retain term brings the control rows back, the
    more the larger its share of the step is. One unit of lr moves the forget rows by one nat.
    """

    def __init__(self, forget=0.667, control=0.666, shared=0.3, recovery=1.0, noise=0.0):
        self.forget = math.log(forget)
        self.control = self.start = math.log(control)
        self.shared = shared
        self.recovery = recovery
        self.noise = noise

    def step(self, lr, alpha):
        push = 10.0 / (10.0 + alpha)
        self.forget -= lr * push
        self.control -= lr * push * self.shared
        self.control += lr * (1 - push) * self.recovery * (self.start + 0.05 - self.control)
        self.control -= self.noise * lr * lr

    @property
    def probabilities(self):
        return math.exp(self.forget), math.exp(self.control)


class Known(Model):
    """Rows known by heart: they give way late and then at once, and a forget term that fades as they are forgotten (NPO)."""

    def __init__(self, fading):
        super().__init__(forget=0.997, control=0.997)
        self.first = self.forget
        self.fading = fading

    def step(self, lr, alpha):
        fallen = self.first - self.forget
        weight = 20.0 / (1 + math.exp(self.fading * fallen))
        push = weight / (weight + alpha)
        move = lr * push * (0.02 + min(1.0, fallen / 0.3))
        self.forget -= move
        self.control -= move * self.shared
        self.control += lr * (1 - push) * min(0.05, self.start - self.control)


def steered(model, controller, every=4, steps=STEPS):
    """Run a synthetic model; return the step at which the aim was reached, or None, and the evaluations."""
    seen = []
    nearest = (1.0, model.forget, model.control)
    for step in range(1, steps + 1):
        model.step(controller.lr_at(step), controller.alpha)
        if step % every:
            continue
        forget, control = model.probabilities
        seen.append((step, forget, control, controller.lr, controller.alpha))
        nearest = min(nearest, (controller.target.distance(forget, control), model.forget, model.control))
        if controller.observe(step, forget, control):
            _, model.forget, model.control = nearest
        if controller.reached:
            return step, seen
    return None, seen


def controller(aim=None, lr=0.1, alpha=10.0):
    return Controller(aim or target(), lr=lr, alpha=alpha, warmup=6, steps=STEPS)


@pytest.mark.parametrize("lr", [0.2, 0.3, 0.6])
def test_reaches_the_aim_and_keeps_the_control_rows(lr):
    step, seen = steered(Model(), controller(lr=lr))
    assert step is not None and step < STEPS
    aim = target()
    assert all(aim.holds(forget, control) for _, forget, control, _, _ in seen[-2:])
    assert not aim.holds(*seen[-3][1:3])  # it ends at the second such evaluation, not later


@pytest.mark.parametrize("lr", [0.2, 0.6, 2.0])
@pytest.mark.parametrize("fading", [0.5, 1.5, 3.0])
def test_reaches_the_aim_where_the_forget_term_fades(lr, fading):
    """Only an alpha below its start lets such a term go on: with it at its start the run stalls just above the aim."""
    aim = target(aim=0.095, forget=0.997, control=0.997)
    step, seen = steered(Known(fading), Controller(aim, lr=lr, alpha=10.0, warmup=10, steps=200), every=5, steps=200)
    assert step is not None and aim.holds(*seen[-1][1:3])


def test_rows_that_fall_too_fast_lead_back_with_a_lower_rate():
    steering = controller(lr=1.0)
    assert not steering.observe(4, 0.64, 0.66)
    assert steering.observe(6, 0.25, 0.66)
    assert steering.lr == 0.5 and steering.alpha > 10
    assert not steering.observe(10, 0.25, 0.66)  # measured anew from the point that it went back to
    steering = controller(lr=1.0)
    assert not steering.observe(4, 0.18, 0.66)  # not if they are near their aim


def test_alpha_moves_less_after_fewer_steps():
    alphas = []
    for steps in (1, 4, 8):
        steering = Controller(target(), lr=0.1, alpha=10.0, warmup=6, steps=STEPS, interval=4)
        steering.observe(steps, 0.5, 0.62)
        alphas.append(steering.alpha)
    assert 10 < alphas[0] < alphas[1] == alphas[2]


def test_alpha_rises_while_the_constraint_binds_and_falls_where_there_is_room():
    steering = controller()
    for step, control in ((4, 0.60), (8, 0.58)):
        before = steering.alpha
        steering.observe(step, 0.5, control)
        assert steering.alpha > before
    before = steering.alpha
    for step in (12, 16, 20):
        steering.observe(step, 0.5, 0.70)
    assert steering.alpha < before
    low, high = ALPHA_RANGE
    for step in range(24, 60, 4):
        steering.observe(step, 0.5, 0.70)
    assert steering.alpha == steering.alpha_start
    for step in range(24, 60, 4):  # half of the way is done
        steering.observe(step, 0.3, 0.70)
    assert steering.alpha == low * steering.alpha_start
    steering.backs = MAX_BACKS  # no more going back
    for step in range(1, 60):
        steering.observe(step, 0.5, 0.3)
    assert steering.alpha == high * steering.alpha_start


def test_a_constraint_that_cannot_hold_is_not_reached_and_the_nearest_point_is_known():
    step, seen = steered(Model(shared=1.0, recovery=0.0), controller())
    assert step is None
    assert max(alpha for *_, alpha in seen) > 5 * seen[0][-1]


def test_goes_back_with_a_lower_rate_where_a_model_is_worse_off_than_before():
    steering = controller(lr=1.0)
    assert steering.observe(4, 0.6, 0.3)
    assert steering.lr == 0.5 and steering.alpha == 20.0
    assert steering.lr_at(5) < steering.lr_at(9)  # it rises again
    for step in range(5, 5 + 2 * MAX_BACKS):
        steering.observe(step, 0.6, 0.3)
    assert steering.backs == MAX_BACKS
    assert not steering.observe(30, 0.6, 0.3)


def test_goes_back_from_lost_control_rows_only_where_the_nearest_point_has_kept_more_of_them():
    assert controller().observe(4, 0.2, 0.55, nearest_control=0.64)
    assert not controller().observe(4, 0.2, 0.55, nearest_control=0.56)
    assert not controller().observe(4, 0.2, 0.60, nearest_control=0.66)  # not far below the level


def test_too_slow_a_run_hurries_and_a_noisy_one_calms_down():
    steering = controller(lr=0.01)
    for step in range(8, 40, 4):
        steering.observe(step, 0.66, 0.70)
    assert steering.lr > 0.02
    steering = controller()
    for step in range(8, 40, 4):
        steering.observe(step, 0.3, 0.60)
    assert steering.lr < 0.1


def test_where_the_retain_rows_are_known_by_heart_the_rate_falls_in_place_of_a_rise_of_alpha():
    rises, falls = controller(), controller()
    for retain_nll, steering in ((0.5, rises), (0.001, falls)):
        steering.observe(4, 0.5, 0.61, retain_nll=retain_nll)
    assert falls.alpha == 10 < rises.alpha
    assert falls.lr * falls.fall == pytest.approx(0.1 * 10 / rises.alpha) and rises.lr > falls.lr
    assert falls.observe(8, 0.6, 0.3, retain_nll=0.001) and falls.alpha == 10  # going back does not raise it either
    falls.observe(12, 0.3, 0.7, retain_nll=0.001)
    assert falls.alpha < 10  # it may still fall


def test_the_learning_rate_falls_near_the_aim_and_at_the_end():
    steering = controller()
    assert [steering.lr_at(step) for step in (3, 6, 20)] == pytest.approx([0.05, 0.1, 0.1])
    assert steering.lr_at(STEPS) < steering.lr_at(50) < steering.lr_at(45)
    steering.observe(8, 0.17, 0.66)
    assert steering.lr_at(20) == pytest.approx(0.03)


def test_beyond_the_aim_alpha_rises_even_where_there_is_room():
    steering = controller()
    steering.observe(8, 0.15, 0.70)
    little = steering.alpha
    steering.observe(12, 0.10, 0.70)
    assert steering.alpha_start < little < steering.alpha / 2


def test_only_exact_evaluations_decide():
    steering = controller()
    for step in (4, 8, 12):  # an estimate may be a little off
        steering.observe(step, 0.17, 0.63, exact=False)
    assert not steering.reached
    steering.observe(16, 0.1, 0.60)  # not kept: counted anew
    steering.observe(20, 0.1, 0.66)
    assert not steering.reached
    steering.observe(24, 0.17, 0.66)  # exact: not forgotten
    steering.observe(28, 0.1, 0.66, exact=False)
    assert not steering.reached
    steering.observe(32, 0.1, 0.66)
    assert steering.reached


def test_a_resumed_controller_decides_alike():
    whole = controller()
    _, seen = steered(Model(), whole)
    first = controller()
    model = Model()
    resumed = []
    for step in range(1, STEPS + 1):
        model.step(first.lr_at(step), first.alpha)
        if step % 4 == 0:
            resumed.append((step, *model.probabilities, first.lr, first.alpha))
            first.observe(step, *model.probabilities)
            again = controller(lr=7.0, alpha=3.0)
            again.load_state_dict(json.loads(json.dumps(first.state_dict())))
            first = again
            if first.reached:
                break
    assert resumed == seen


def test_without_control_rows_only_forgetting_counts():
    aim = target(control=None)
    assert aim.level == 0 and aim.holds(0.1, None) and aim.distance(0.1, None) == 0
    assert not aim.holds(0.2, None)


@pytest.mark.parametrize("first", [1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("power", [1.0, 1.8])
def test_the_search_finds_the_wanted_response(first, power):
    search = Search(target(), lr=first, alpha=10.0, steps=STEPS)
    best = search.wanted ** (1 / power) * 1e-4

    while not search.done:
        search.observe((search.lr / 1e-4) ** power)
    assert len(search.tries) <= MAX_TRIES
    assert best / 2 < search.lr < 2 * best


def searched(kept, *, lr=1e-5, tries=MAX_TRIES):
    """Search with a synthetic model: the response is the wanted one at 1e-4 and alpha 10; ``kept`` of rate and alpha."""
    search = Search(target(), lr=lr, alpha=10.0, steps=STEPS, tries=tries)
    while not search.done:
        search.observe(search.wanted * search.lr / 1e-4 * 10 / search.alpha, kept(search.lr, search.alpha))
    assert (search.lr, search.alpha) in [(each.lr, each.alpha) for each in search.tries]
    return search


def test_the_search_raises_alpha_where_that_keeps_the_control_rows():
    search = searched(lambda lr, alpha: 0.9 if alpha < 40 else 1.0, lr=1e-4)
    assert search.alpha == 40 and search.lr == 4e-4  # the rate follows: the response is the wanted one again


def test_the_search_lowers_the_rate_where_that_keeps_the_control_rows():
    """Facts learned by heart: a tenth of the rate keeps the control rows, and a fourfold alpha does not."""
    search = searched(lambda lr, alpha: 1.0 if lr < 5e-5 else 0.96, tries=3)
    assert (search.lr, search.alpha) == (3.2e-5, 10)  # between the two that were tried before
    search = searched(lambda lr, alpha: 1.0 if lr < 5e-5 else 0.96, lr=1e-4)
    assert (search.lr, search.alpha) == (3.2e-5, 10) and search.tries[1].alpha == 40  # tried in vain, and taken back


def test_the_search_ends_with_the_best_pair_that_it_tried():
    tries = searched(lambda lr, alpha: 1.0 - lr * 2e3, tries=4)  # the last one lost some again
    assert tries.lr == 1e-5
    search = searched(lambda lr, alpha: 0.9 - lr, lr=1e-4, tries=2)  # none keeps enough
    assert (search.lr, search.alpha) == (1e-4, 10)


def test_a_search_whose_first_tries_diverge_goes_down_and_one_that_always_does_says_so():
    search = Search(target(), lr=1.0, alpha=10.0, steps=STEPS)
    while not search.done:
        search.observe(None if search.lr > 0.05 else search.lr * 3)
    assert not search.diverged and search.lr < 0.1
    search = Search(target(), lr=1.0, alpha=10.0, steps=STEPS)
    while not search.done:
        search.observe(None)
    assert search.diverged and len(search.tries) == MAX_TRIES


@pytest.mark.parametrize("text", ["0.1", "forget_prob", "forget_prob=x", "forget_prob=0", "forget_prob=1", "keep=0.1", "nan"])
def test_a_wrong_aim_is_named(text):
    with pytest.raises(ArgumentError, match=r"^aim: expected 'auto', 'off' or forget_prob=X"):
        parse_aim(text)


def test_aims():
    assert parse_aim(None) is None and parse_aim("off") is None
    assert parse_aim("auto") == "auto" and parse_aim("forget_prob=0.05") == 0.05


def test_verdicts():
    reached = verdict(target(), 0.15, 0.65, 48, "held", steered=True)
    assert reached["reached"] and reached["advice"] == ""
    assert summary(reached)[0] == "aim reached" and summary(reached)[-1].startswith("Forget probability 0.667 -> 0.150")
    missed = verdict(target(), 0.15, 0.60, 60, "20 epochs have passed", steered=True)
    assert not missed["reached"] and summary(missed)[0].startswith("aim not reached: ")
    texts = {advice(target(), forget, control, True) for forget, control in ((0.1, 0.6), (0.3, 0.66), (0.3, 0.6))}
    assert len(texts) == 3
    assert {*reached} == {"reached", "forget_prob", "forget_prob_start", "aim", "aim_source", "measure", "control_prob",
                          "control_prob_start", "keep", "step", "reason", "advice"}  # fmt: skip


def test_mutants_of_the_controller_are_caught(tmp_path):
    """A sign of the dual ascent, or a missing half of the aim, must not pass."""
    for old, new, check in (
        ("self.alpha * 2.0**doublings", "self.alpha / 2.0**doublings",
         test_alpha_rises_while_the_constraint_binds_and_falls_where_there_is_room),
        ("doublings = min(0.0, doublings)", "pass",
         test_where_the_retain_rows_are_known_by_heart_the_rate_falls_in_place_of_a_rise_of_alpha),
        ("return forget_prob <= self.aim and", "return True or", test_only_exact_evaluations_decide),
    ):  # fmt: skip
        broken = mutant("soul.run.aim", old, new, tmp_path)
        names = {name: globals()[name] for name in ("Controller", "Target")}
        globals().update({name: getattr(broken, name) for name in names})
        try:
            with pytest.raises(AssertionError):
                check()
        finally:
            globals().update(names)
