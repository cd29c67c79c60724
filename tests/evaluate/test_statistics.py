"""Intervals hold what they promise: by simulation, by other formulas, and on data that vary in nothing."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
from scipy import stats as reference

from minimind_v.core.evaluate.ask import Reply
from minimind_v.core.evaluate.questions import Question
from minimind_v.core.evaluate.statistics import (
    Influences,
    Metric,
    bootstrap,
    difference,
    estimate,
    influences,
    rows_to_see,
    seeds_difference,
)
from minimind_v.core.evaluate.tasks.task import statistics_of
from minimind_v.core.evaluate.tasks.yesno import YesNo

SHARE, MEAN = Metric("accuracy"), Metric("loss", is_share=False)


def rows_of(values, weights=None):
    """Rows [n, 2] with these numerators."""
    return np.stack([values, np.ones(len(values)) if weights is None else weights], axis=1).astype(float)


def names(sizes):
    """The cluster of each row, of clusters of these sizes."""
    return _names(tuple(sizes))


@lru_cache(maxsize=9)
def _names(sizes):
    return [str(number) for number, size in enumerate(sizes) for _ in range(size)]


def coverage(metric, draw, truth, times):
    """How often the interval holds the truth, in percent."""
    held = 0
    for _ in range(times):
        values, clusters = draw()
        result = estimate(metric, rows_of(values), clusters)
        held += result.low <= truth <= result.high
    return 100 * held / times


def beta_draws(rng, clusters, size, share, alike):
    """Answers right or wrong; those of a cluster are alike to this degree."""

    def draw():
        sizes = np.full(clusters, size) if size > 0 else rng.geometric(-1 / size, clusters)
        strength = (1 - alike) / alike
        chances = rng.beta(share * strength, (1 - share) * strength, clusters)
        return (rng.random(sizes.sum()) < np.repeat(chances, sizes)).astype(float), names(sizes)

    return draw


@pytest.mark.long
@pytest.mark.parametrize(
    ("clusters", "size", "share"), [(20, 5, 0.1), (20, 5, 0.5), (50, 5, 0.1), (50, -5, 0.3), (100, 4, 0.95)]
)
def test_the_interval_of_a_clustered_share_holds_it_in_95_of_100(clusters, size, share):
    rng = np.random.default_rng(7)
    assert 93 <= coverage(SHARE, beta_draws(rng, clusters, size, share, 0.3), share, 1500) <= 97


@pytest.mark.long
@pytest.mark.parametrize(("rows", "share"), [(20, 0.05), (12, 0.95), (30, 0.02)])
def test_the_interval_of_a_tiny_share_holds_it_over_many_shares(rows, share):
    """A single share of few rows swings around 95 %, since the count is whole; the mean over near shares does not."""
    rng = np.random.default_rng(8)
    held = []
    for near in np.linspace(0.6, 1.4, 25) * min(share, 1 - share):
        truth = near if share < 0.5 else 1 - near
        held.append(coverage(SHARE, lambda truth=truth: (rng.random(rows) < truth, names([1] * rows)), truth, 100))
    assert 93 <= np.mean(held) <= 98


@dataclass(frozen=True)
class Model:
    """A model that answers yes to so many of the questions whose answer is yes, which are `true`, and of the others."""

    true: float
    hits: float
    false_alarms: float

    def near(self, rng):
        """One with nearly the same shares: a count of few rows is whole, and coverage swings with a single share."""
        return Model(*np.clip(np.array([self.true, self.hits, self.false_alarms]) + rng.uniform(-0.03, 0.03, 3), 0, 1))

    def answers(self, rng, is_yes):
        return rng.random(len(is_yes)) < np.where(is_yes, self.hits, self.false_alarms)

    def figures(self):
        both, yes = self.true * self.hits, self.true * self.hits + (1 - self.true) * self.false_alarms
        return {
            "accuracy": both + (1 - self.true) * (1 - self.false_alarms),
            "precision": both / yes,
            "recall": self.hits,
            "f1": 2 * both / (yes + self.true),
            "yes_share": yes,
        }


MODELS = Model(0.5, 0.8, 0.3), Model(0.2, 0.7, 0.1), Model(0.5, 0.9, 0.05), Model(0.3, 0.3, 0.3), Model(0.1, 0.5, 0.1)


def yes_no_rows(says_yes, is_yes):
    """The statistics of these answers by metric, as the task `yesno` gives them."""
    task, verdicts = YesNo("yesno", {}), []
    for says, truth in itertools.product((False, True), repeat=2):
        question = Question("q", 0, "", (("user", "?"),), (), ("yes" if truth else "no",))
        verdicts.append(task.judge(question, [Reply("yes" if says else "no")]).statistics)
    which = 2 * says_yes.astype(int) + is_yes
    return {metric: statistics_of(metric, verdicts)[which] for metric in YesNo.metrics}


@pytest.mark.long
@pytest.mark.parametrize(("n", "times"), [(20, 300), (50, 300), (200, 300), (2000, 120)])
def test_the_intervals_of_all_figures_of_yes_and_no_hold_them(n, times):
    """Of five models together; of few rows with a yes each by itself swings."""
    rng, held = np.random.default_rng(15), defaultdict(list)
    for model in MODELS:
        for _ in range(times):
            drawn = model.near(rng)
            is_yes = rng.random(n) < drawn.true
            for metric, rows in yes_no_rows(drawn.answers(rng, is_yes), is_yes).items():
                result = estimate(metric, rows, names([1] * n))
                if result.low is not None:
                    held[metric.name].append(result.low <= drawn.figures()[metric.name] <= result.high)
    assert {name: 93 <= 100 * np.mean(own) <= 97 for name, own in held.items()} == dict.fromkeys(held, True), {
        name: round(100 * np.mean(own), 1) for name, own in held.items()
    }
    assert len(held) == 5


@pytest.mark.long
@pytest.mark.parametrize("n", [20, 50, 200])
@pytest.mark.parametrize("model", MODELS, ids=map(str, range(5)))
def test_p_of_equal_models_is_below_5_in_100_in_at_most_6(n, model):
    rng, small, times = np.random.default_rng(16), defaultdict(list), 300
    for _ in range(times):
        is_yes = rng.random(n) < model.true
        first, second = (yes_no_rows(model.answers(rng, is_yes), is_yes) for _ in range(2))
        for metric in YesNo.metrics:
            result = difference(metric, first[metric], second[metric], names([1] * n))
            small[metric.name].append(result.p is not None and result.p < 0.05)
    most = reference.binom.ppf(0.999, times, 0.06)  # of as many as 6 in 100, by chance
    assert {name: sum(own) for name, own in small.items() if sum(own) > most} == {}


@pytest.mark.long
@pytest.mark.parametrize("clusters", [8, 15, 40])
def test_the_interval_of_a_skewed_mean_holds_it(clusters):
    rng = np.random.default_rng(9)
    held = coverage(MEAN, lambda: (rng.exponential(size=clusters), names([1] * clusters)), 1.0, 2500)
    assert 93 <= held <= 97
    plain = 0
    for _ in range(2500):
        values = rng.exponential(size=clusters)
        half = reference.t.ppf(0.975, clusters - 1) * reference.sem(values)
        plain += abs(values.mean() - 1) <= half
    assert held > 100 * plain / 2500, "better than Student's t alone"


@pytest.mark.long
@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
def test_the_interval_of_unequal_clusters_holds_the_mean(alike):
    rng = np.random.default_rng(10)

    def draw():
        sizes = rng.geometric(0.2, 20)
        own = np.repeat(rng.normal(size=20), sizes) * math.sqrt(alike)
        return own + rng.normal(size=sizes.sum()) * math.sqrt(1 - alike), names(sizes)

    assert 93 <= coverage(MEAN, draw, 0.0, 2000) <= 98


@pytest.mark.long
def test_the_interval_of_a_paired_difference_holds_it():
    """Two models that are right with 60 % and 65 % chance about questions that are alike in a cluster."""
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(1500):
        ease = np.repeat(rng.normal(size=30) * 0.15, 4)
        first, second = (rng.random(120) < np.clip(share + ease, 0, 1) for share in (0.45, 0.5))
        result = difference(SHARE, rows_of(first), rows_of(second), names([4] * 30))
        held += result.low <= 0.05 <= result.high
    assert 93 <= 100 * held / 1500 <= 97


@pytest.mark.long
def test_p_is_below_5_in_100_as_often_as_it_must_be_where_nothing_differs():
    rng = np.random.default_rng(12)
    small = 0
    for _ in range(1500):
        first, second = rng.exponential(size=(2, 60))
        small += difference(MEAN, rows_of(first), rows_of(second), names([3] * 20)).p < 0.05
    assert 3 <= 100 * small / 1500 <= 7


# --- other formulas ---------------------------------------------------------------------------------------------------


def test_rows_of_their_own_have_the_interval_of_students_t():
    """The textbook's: mean ± t · s / √n, where the values are symmetric."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    result = estimate(MEAN, rows_of(values), names([1] * 7))
    assert result.value == 4
    expected = reference.t.interval(0.95, 6, 4, reference.sem(values))
    assert (result.low, result.high) == pytest.approx(expected)
    assert result.degrees == pytest.approx(6)


def test_equal_clusters_have_the_interval_of_their_means():
    values = np.array([1, 3, 2, 4, 5, 5, 4, 6, 8, 6.0])  # the means 2, 3, 5, 5, 7
    result = estimate(MEAN, rows_of(values), names([2] * 5))
    means = values.reshape(5, 2).mean(axis=1)
    assert result.error == pytest.approx(reference.sem(means))
    assert result.degrees == pytest.approx(4)
    assert (result.n, result.clusters) == (10, 5)


def test_the_variance_is_that_of_a_regression_on_a_constant_with_cr2():
    """The matrix formula of Bell and McCaffrey: each cluster's residuals times (I - H)^(-1/2), and their freedom."""
    rng = np.random.default_rng(1)
    sizes = [1, 2, 3, 7, 4]
    values, clusters = rng.normal(size=17), names(sizes)
    labels = np.array(clusters)
    hat = np.full((17, 17), 1 / 17)
    residuals = values - values.mean()
    columns, total = [], 0.0
    for name in sorted(set(clusters)):
        own = labels == name
        eigenvalues, vectors = np.linalg.eigh(np.eye(own.sum()) - hat[np.ix_(own, own)])
        adjust = vectors @ np.diag(eigenvalues**-0.5) @ vectors.T
        total += float(np.ones(own.sum()) @ adjust @ residuals[own]) ** 2
        columns.append((np.eye(17) - hat)[:, own] @ adjust @ np.ones(own.sum()) / 17)
    result = estimate(MEAN, rows_of(values), clusters)
    assert result.error == pytest.approx(math.sqrt(total) / 17)
    freedom = []
    for covariance in (np.eye(17), (labels[:, None] == labels).astype(float)):
        eigenvalues = np.linalg.eigvals(np.array(columns) @ covariance @ np.array(columns).T).real
        freedom.append(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
    assert result.degrees == pytest.approx(min(freedom))


def test_a_ratio_of_sums_weighs_rows_by_their_denominator():
    result = estimate(Metric("loss", is_share=False), np.array([[2.0, 1], [8, 4], [9, 3], [1, 2]]), list("abcd"))
    assert result.value == 2.0


def test_the_bootstrap_agrees_with_the_formula_on_many_clusters():
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 6, 200)
    values = np.repeat(rng.normal(size=200), sizes) + rng.normal(size=sizes.sum())
    result, drawn = (tool(MEAN, rows_of(values), names(sizes)) for tool in (estimate, bootstrap))
    width = result.high - result.low
    assert drawn == pytest.approx((result.low, result.high), abs=0.08 * width)
    assert bootstrap(MEAN, rows_of(values), names(sizes)) == drawn, "the same draws each time"


def test_wilsons_interval_of_independent_rows_is_that_of_scipy_but_for_students_t():
    values = np.array([1.0] * 90 + [0.0] * 310)
    result = estimate(SHARE, rows_of(values), names([1] * 400))
    expected = reference.binomtest(90, 400).proportion_ci(0.95, "wilson")
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=5e-4)


def test_the_interval_of_f1_is_wilsons_of_the_share_that_f1_grows_with():
    """12 true yeses of which 9 are found, and 4 false ones: F1 is 18/25, and 9 of 16 rows with a yes are right."""
    is_yes = np.array([True] * 12 + [False] * 28)
    says_yes = np.array([True] * 9 + [False] * 3 + [True] * 4 + [False] * 24)
    rows = {metric.name: (metric, own) for metric, own in yes_no_rows(says_yes, is_yes).items()}
    result = estimate(*rows["f1"], names([1] * 40))
    ends = reference.binomtest(9, 16).proportion_ci(0.95, "wilson")
    assert result.value == pytest.approx(18 / 25)
    assert (result.low, result.high) == pytest.approx([2 * end / (1 + end) for end in ends])
    assert result.n == 16


def test_three_mistakes_of_one_side_do_not_prove_a_difference_of_precision():
    is_yes = np.array([True] * 22 + [False] * 28)
    says_yes = is_yes.copy()
    says_yes[22:25] = True
    for first, second in zip(yes_no_sums(is_yes, is_yes), yes_no_sums(says_yes, is_yes), strict=True):
        result = difference(SHARE, first, second, names([1] * 50))
        assert result.p > 0.05
        assert result.low < 0 < result.high


def test_clusters_of_copies_count_once():
    """Ten copies of each row say no more than one."""
    once = estimate(SHARE, rows_of([1, 0, 1, 1, 0, 1.0]), list("abcdef"))
    copies = estimate(SHARE, rows_of(np.repeat([1, 0, 1, 1, 0, 1.0], 10)), names([10] * 6))
    assert copies.low <= once.low < once.high <= copies.high
    assert copies.n == 60


# --- what the data do not allow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_answers_do_not_prove_a_share_of_0_or_1(value):
    result = estimate(SHARE, rows_of([value] * 30), names([3] * 10))
    assert result.high - result.low > 0.2
    assert 0 <= result.low <= value <= result.high <= 1


def test_equal_answers_do_not_prove_equal_models():
    rows = rows_of([1, 0, 1, 0, 1.0])
    result = difference(SHARE, rows, rows, list("abcde"))
    assert result.value == 0
    assert result.p == pytest.approx(1)
    assert result.low < -0.3
    assert result.high > 0.3


def test_a_single_cluster_has_a_value_and_no_interval():
    result = estimate(SHARE, rows_of([1, 0, 1.0]), ["a"] * 3)
    assert result.value == pytest.approx(2 / 3)
    assert (result.low, result.high, result.clusters) == (None, None, 1)
    assert bootstrap(SHARE, rows_of([1, 0.0]), ["a", "a"]) is None


def test_nothing_to_divide_by_is_no_number_and_no_interval():
    result = estimate(Metric("precision"), np.zeros((4, 2)), list("abcd"))
    assert math.isnan(result.value)
    assert result.low is None


def test_the_order_of_rows_changes_no_digit():
    rng = np.random.default_rng(4)
    values, clusters = rng.integers(0, 2, 40).astype(float), names([4] * 10)
    order = rng.permutation(40)
    again = estimate(SHARE, rows_of(values[order]), [clusters[n] for n in order])
    assert again == estimate(SHARE, rows_of(values), clusters)


# --- differences, power, seeds ----------------------------------------------------------------------------------------


def test_a_paired_difference_is_the_t_test_of_the_differences():
    first, second = np.array([1.0, 2, 3, 4, 5, 6]), np.array([1.5, 2.1, 3.8, 4.4, 5.2, 6.7])
    result = difference(MEAN, rows_of(first), rows_of(second), list("abcdef"))
    expected = reference.ttest_rel(second, first)
    assert result.value == pytest.approx((second - first).mean())
    assert result.error == pytest.approx(result.value / expected.statistic)
    assert result.p == pytest.approx(expected.pvalue, abs=0.03)
    assert (result.p < 0.05) == (result.low > 0)


def test_p_is_below_5_in_100_exactly_where_the_interval_leaves_out_0():
    rng = np.random.default_rng(5)
    sides = set()
    for _ in range(200):
        first, second = rng.integers(0, 2, (2, 24)).astype(float)
        for metric in (SHARE, MEAN):
            result = difference(metric, rows_of(first), rows_of(second), names([2] * 12))
            if abs(result.p - 0.05) > 1e-9:
                assert (result.p < 0.05) == (not result.low <= 0 <= result.high)
                sides.add(result.p < 0.05)
    assert sides == {True, False}


@pytest.mark.long
def test_so_many_rows_show_half_the_difference_in_80_of_100():
    rng = np.random.default_rng(6)
    first, second = rng.normal(size=400), rng.normal(size=400) + 0.4
    rows = rows_to_see(difference(MEAN, rows_of(first), rows_of(second), names([2] * 200)))
    shown = 0
    for _ in range(400):
        first, second = rng.normal(size=(2, rows))
        shown += difference(MEAN, rows_of(first), rows_of(second + 0.2), names([1] * rows)).p < 0.05
    assert 0.7 <= shown / 400 <= 0.9


def test_the_rows_that_show_a_difference_grow_with_the_square():
    first, second = np.zeros(10), np.array([1, 0, 1, 0, 1, 1, 0, 1, 1, 0.0])
    result = difference(MEAN, rows_of(first), rows_of(second), names([1] * 10))
    assert rows_to_see(result, 0.25) == pytest.approx(4 * rows_to_see(result, 0.5), abs=4)
    assert rows_to_see(difference(MEAN, rows_of(first), rows_of(first), names([1] * 10))) is None


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(2)
    questions = rng.normal(size=50)
    runs = [[rows_of(questions + shift) for shift in side] for side in ([0.0, 0.4, -0.4], [0.5, 0.9, 0.1])]
    clusters = names([1] * 50)
    result, spread = seeds_difference(MEAN, *runs, clusters)
    assert result.value == pytest.approx(0.5)
    assert spread.deviations == pytest.approx((0.4, 0.4))
    expected = reference.ttest_ind([0.5, 0.9, 0.1], [0.0, 0.4, -0.4], equal_var=False)
    assert result.p == pytest.approx(expected.pvalue, rel=1e-6), "the questions add nothing: they are paired"
    single, one_seed = seeds_difference(MEAN, runs[0][:1], runs[1][:1], clusters)
    assert one_seed.deviations == (None, None)
    assert (single.low, single.p) == (None, None), "all questions differ by the same"


def test_a_growing_function_is_applied_to_the_value_and_both_ends():
    rows = np.array([[2.0, 1], [8, 4], [9, 3], [1, 2]])
    plain = estimate(Metric("loss", is_share=False), rows, list("abcd"))
    linked = estimate(Metric("perplexity", is_share=False, link=math.exp), rows, list("abcd"))
    expected = tuple(math.exp(value) for value in (plain.value, plain.low, plain.high))
    assert (linked.value, linked.low, linked.high) == pytest.approx(expected)


def test_a_function_that_is_no_ratio_has_the_jackknifes_variance():
    """For the square of a mean, the delta method: 2 · mean · error."""
    rng = np.random.default_rng(13)
    values = rng.normal(3, 1, 300)
    square = Metric("square", value=lambda sums: (sums[..., 0] / sums[..., -1]) ** 2, is_share=False)
    error = math.sqrt(influences(square, rows_of(values), names([1] * 300)).variance)
    assert error == pytest.approx(2 * values.mean() * reference.sem(values), rel=0.02)


def test_influences_of_a_mean_are_its_residuals():
    state = influences(MEAN, rows_of([1.0, 2, 6]), list("abc"))
    assert isinstance(state, Influences)
    assert state.changes == pytest.approx([-2 / 3, -1 / 3, 1])


def yes_no_sums(says_yes, is_yes):
    """The statistics of accuracy and precision of these answers, as the task `yesno` has them."""
    says_yes, is_yes = np.array(says_yes), np.array(is_yes)
    return rows_of(says_yes == is_yes), rows_of(says_yes & is_yes, says_yes)


@pytest.mark.parametrize("mistakes", [0, 1, 3])
def test_all_right_against_all_wrong_is_strong_evidence_inside_the_bounds(mistakes):
    is_yes = np.arange(200) % 2 == 0
    better = is_yes.copy()
    better[:mistakes] = ~better[:mistakes]
    for first, second in zip(yes_no_sums(~is_yes, is_yes), yes_no_sums(better, is_yes), strict=True):
        for result in (
            difference(SHARE, first, second, names([2] * 100)),
            seeds_difference(SHARE, [first] * 2, [second] * 2, names([2] * 100))[0],
        ):
            assert result.p < 1e-6
            assert 0.9 < result.low <= result.value <= 1
            assert result.value - 0.05 < result.high <= 1


@pytest.mark.parametrize("shift", [0.0, 0.3, 95.19, -1e6])
def test_two_equal_differences_that_are_no_shares_prove_nothing(shift):
    first = rows_of([1.25, 1.25])
    second = rows_of([1.25 + shift] * 2)
    for result in (
        difference(MEAN, first, second, list("ab")),
        seeds_difference(MEAN, [first] * 2, [second] * 2, list("ab"))[0],
        estimate(MEAN, second, list("ab")),
    ):
        assert (result.low, result.high, result.p) == (None, None, None)


def test_a_value_that_rounding_lifts_above_its_bound_is_the_bound():
    metric = Metric("bleu", lambda sums: np.full(sums.shape[:-1], 100.00000000000004), False, (0, 100))
    assert estimate(metric, rows_of([1, 2, 3]), list("abc")).value == 100
