"""Statistics of scores: values, intervals clustered by image, paired differences, power, spread between seeds.

Questions about one image are not independent, so an image is the unit that is drawn: a cluster. A metric is a function
of sums over rows, so that it is also known without any one cluster; these changes give its variance. The variance has
the correction CR2 and the degrees of freedom of Bell and McCaffrey (2002), the smaller of those for independent and
for equal rows of a cluster. A share, or a growing function of one, has Wilson's interval for the number of independent
rows with the same variance, and a paired difference of shares that of Bonett and Price (2012). Any other metric has
Student's t with Hall's correction for skewness (1992), which is none for symmetric data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

LEVEL = 0.95  # of all intervals
POWER = 0.8  # of the number of rows that `rows_to_see` returns
DRAWS = 2000  # of the bootstrap
# Chance can make few clusters look more even than independent rows. Their rows count at most once, those of a paired
# difference at most so many times: by simulation each covers 94 to 97 %, from 15 clusters on.
EVEN = 1.5
SKEWED = 0.75  # the most skewness over the root of the clusters: beyond it Hall's correction stretches without bound
FLAT = 1e-9  # a variance or skewness below it counts as none

Array = np.ndarray[Any, Any]


def ratio(sums: Array) -> Array:
    """The first column over the last: [..., k] → [...]; not a number where the last is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., -1])


@dataclass(frozen=True)
class Metric:
    """A function of sums over rows. The last sum is that of the rows' weights.

    `is_share`: a ratio of which no row has a numerator below 0 or above its weight. `link` is a growing function of
    numbers and arrays that turns the value, and both ends of its interval, into what is reported (the exponential: a
    loss into a perplexity).
    """

    name: str
    value: Callable[[Array], Array] = ratio  # sums [..., k] → values [...]
    is_share: bool = True
    bounds: tuple[float, float] = (-np.inf, np.inf)  # that no value can leave; those of a share are 0 and 1
    link: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Estimate:
    """A value with its interval. `p` tests that a difference is 0.

    One cluster has neither; equal ones have both where the metric is a share, else neither.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int  # rows with a weight
    clusters: int  # that have such rows
    p: float | None = None
    error: float | None = None  # standard error, between clusters
    degrees: float | None = None  # of freedom

    def report(self, difference: bool = False) -> dict[str, Any]:
        """The estimate as `mmv eval` and `mmv compare` print it; None for what is no number."""
        value = {"difference" if difference else "value": self.value if np.isfinite(self.value) else None}
        interval = {"ci_low": self.low, "ci_high": self.high, **({"p": self.p} if difference else {})}
        return {"name": self.name, **value, **interval, "n": self.n, "clusters": self.clusters}


@dataclass(frozen=True)
class Influences:
    """How a metric depends on each cluster, [G] each: on average over them `changes` is 0."""

    value: float
    changes: Array  # the value, less the value without the cluster, times 1 - share: the residual of a mean
    shares: Array  # of all weight
    n: int
    is_binary: bool = True  # whether each row has all of its weight or nothing

    @property
    def is_independent(self) -> bool:
        """Whether the rows are right or wrong and alone in their clusters: then nothing but the share is unknown."""
        return self.is_binary and self.n == int((self.shares > 0).sum())

    @property
    def corrected(self) -> Array:
        """The changes, corrected by CR2 for the pull of each cluster on the value."""
        return np.asarray(self.changes / np.sqrt(1 - self.shares))

    @property
    def variance(self) -> float:
        return float((self.corrected**2).sum())

    @property
    def skewness(self) -> float:
        """That of the clusters, with the correction for their number."""
        count, second = len(self.changes), (self.changes**2).mean()
        if count < 3 or second <= 0:
            return 0.0
        return float((self.changes**3).mean() / second**1.5 * np.sqrt(count * (count - 1)) / (count - 2))

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the variance: the fewer of those for independent and for equal rows of a cluster."""
        shares, inverse = self.shares, 1 / (1 - self.shares)
        apart = shares**2 * inverse
        independent = 1 / ((shares**2).sum() + apart.sum() ** 2 - (apart**2).sum())
        squares = (shares**2).sum()
        # P[g, h] = sqrt(inverse[g] inverse[h]) shares[g] shares[h] (squares - shares[g] - shares[h] + 1 where g = h)
        weights = shares**2 * inverse
        diagonal = weights * (squares - 2 * shares + 1)
        first, second = weights.sum(), (weights * (squares - shares)).sum()
        cross = squares - shares
        # The sum over all g, h of weights[g] weights[h] (cross[g] - shares[h])², without the diagonal's own form.
        whole = first * (weights * (cross**2 + shares**2)).sum() - 2 * second * (weights * shares).sum()
        off_diagonal = whole - (weights**2 * (squares - 2 * shares) ** 2).sum()
        equal = diagonal.sum() ** 2 / (off_diagonal + (diagonal**2).sum())
        return float(max(1.0, min(independent, equal)))


def cluster_sums(rows: Array, clusters: Sequence[str]) -> Array:
    """The sums of the rows' statistics by cluster, [n, k] → [G, k]; clusters without weight are left out."""
    names = {name: number for number, name in enumerate(sorted(set(clusters)))}
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, [names[name] for name in clusters], rows)
    return sums


def influences(metric: Metric, rows: Array, clusters: Sequence[str] | None) -> Influences:
    """The value of a metric and its dependence on each cluster; rows [n, k] are the statistics of each row.

    None: each row is a cluster.
    """
    is_binary = bool(((rows[:, 0] == 0) | (rows[:, 0] == rows[:, -1])).all())
    sums = rows if clusters is None else cluster_sums(rows, clusters)
    return _influences(metric, sums, int((rows[:, -1] > 0).sum()), is_binary)


def _influences(metric: Metric, sums: Array, n: int, is_binary: bool) -> Influences:
    total = sums.sum(axis=0)
    value = float(metric.value(total))
    shares = sums[:, -1] / total[-1] if total[-1] else np.zeros(len(sums))
    kept = (shares > 0) & (shares < 1)
    if kept.sum() < 2:
        return Influences(value, np.zeros(len(sums)), shares, n, is_binary)
    changes = np.zeros(len(sums))
    changes[kept] = (value - metric.value(total - sums[kept])) * (1 - shares[kept])
    return Influences(value, np.nan_to_num(changes), shares, n, is_binary)


def estimate(metric: Metric, rows: Array, clusters: Sequence[str]) -> Estimate:
    """The value of a metric and its interval; rows [n, k], of each its statistics, weight last."""
    rows = np.asarray(rows, float)
    state = influences(metric, rows, clusters)
    plain = _with_interval(metric.name, state)
    plain = replace(plain, value=float(np.clip(plain.value, *metric.bounds)))
    if metric.is_share and plain.low is not None:
        independent = _independent_rows(state)
        degrees = np.inf if state.is_independent else state.degrees
        low, high = _wilson(state.value, independent, degrees)
        plain = replace(plain, low=low, high=high)
    else:
        plain = _within(plain, *metric.bounds)
    return _linked(metric, plain)


def difference(metric: Metric, first: Array, second: Array, clusters: Sequence[str]) -> Estimate:
    """The metric of `second` less that of `first`, paired: rows [n, k] of the same questions."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    state = _paired(metric, [first], [second], clusters)
    plain = _with_interval(metric.name, state, tests=True)
    if not metric.is_share or plain.low is None:
        return _difference_within(metric, plain, state)
    if (first[:, -1] == second[:, -1]).all():
        squares = ((second[:, 0] - first[:, 0]) ** 2).sum() / max(second[:, -1].sum(), 1.0)
    else:  # of rows that would give this variance were they independent
        alone = state if len(state.shares) == len(first) else _paired(metric, [first], [second], None)
        squares = alone.variance / (alone.shares**2).sum() + state.value**2
    return _share_difference(plain, state, float(squares))


def _within(plain: Estimate, lowest: float, highest: float) -> Estimate:
    """The interval inside these bounds; without a variance none, and no p: equal clusters do not say how others are."""
    if plain.low is None or plain.high is None or plain.error is None or _is_flat(plain.error, plain.value):
        return replace(plain, low=None, high=None, p=None)
    return replace(plain, low=max(plain.low, lowest), high=min(plain.high, highest))


def _difference_within(metric: Metric, plain: Estimate, state: Influences) -> Estimate:
    if metric.is_share and plain.error is not None and _is_flat(plain.error, plain.value):
        return _share_difference(plain, state, 0.0)
    span = 1.0 if metric.is_share else metric.bounds[1] - metric.bounds[0]
    return _within(plain, -span, span)


def _is_flat(error: float, value: float) -> bool:
    return error < FLAT * max(1.0, abs(value))


def _paired(
    metric: Metric, first: Sequence[Array], second: Sequence[Array], clusters: Sequence[str] | None
) -> Influences:
    """The influences on the difference of two metrics' means over runs."""
    linked = metric
    if (link := metric.link) is not None:
        linked = replace(metric, value=lambda sums: link(metric.value(sums)))
    states = [[influences(linked, rows, clusters) for rows in runs] for runs in (first, second)]
    means = [np.mean([state.value for state in side]) for side in states]
    changes = [np.mean([state.changes for state in side], axis=0) for side in states]
    shares = np.mean([state.shares for side in states for state in side], axis=0)
    return Influences(float(means[1] - means[0]), changes[1] - changes[0], shares, min(s[0].n for s in states))


def _with_interval(name: str, state: Influences, tests: bool = False) -> Estimate:
    """Student's t with Hall's correction for skewness; no interval from a single cluster."""
    weighty = int((state.shares > 0).sum())
    if weighty < 2 or not np.isfinite(state.value):
        return Estimate(name, state.value, None, None, state.n, weighty)
    error, degrees = float(np.sqrt(state.variance)), state.degrees
    point = float(stdtrit(degrees, (1 + LEVEL) / 2))
    skew = float(np.clip(state.skewness / np.sqrt(weighty), -SKEWED, SKEWED))
    low = state.value - error * _hall_inverse(point, skew)
    high = state.value - error * _hall_inverse(-point, skew)
    p = _two_sided(_hall(state.value / error, skew), degrees) if tests and error >= FLAT else None
    return Estimate(name, state.value, low, high, state.n, weighty, p, error, degrees)


def _hall(t: float, skew: float) -> float:
    """Hall's cubic transformation, monotone: skewed data's t becomes nearly symmetric; `skew` is over sqrt(G)."""
    a = skew / 3
    return t + a * t**2 + a**2 * t**3 / 3 + skew / 6


def _hall_inverse(x: float, skew: float) -> float:
    a = skew / 3
    return x - skew / 6 if abs(a) < FLAT else float((np.cbrt(1 + 3 * a * (x - skew / 6)) - 1) / a)


def _two_sided(t: float, degrees: float) -> float:
    return float(min(1.0, 2 * stdtr(degrees, -abs(t))))


def _independent_rows(state: Influences) -> float:
    """How many independent rows would have the variance of these clustered ones, as a share."""
    if state.is_independent:
        return float(state.n)
    if state.variance < FLAT**2 or not 0 < state.value < 1:
        return float(1 / (state.shares**2).sum())  # nothing varies: as many as there are clusters, of equal size
    count = state.value * (1 - state.value) / state.variance
    return min(count, float(state.n)) if state.is_binary else count


def _wilson(value: float, count: float, degrees: float) -> tuple[float, float]:
    """Wilson's interval of a share of `count` rows, with Student's t."""
    square = float(stdtrit(degrees, (1 + LEVEL) / 2)) ** 2 / count
    centre = (value + square / 2) / (1 + square)
    half = np.sqrt(square * value * (1 - value) + square**2 / 4) / (1 + square)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def _share_difference(plain: Estimate, state: Influences, squares: float) -> Estimate:
    """Bonett and Price (2012): two more rows, one for each side, so that equal answers do not prove equal models.

    `squares` is the mean square of the rows' differences; for answers right or wrong, the share that turned. It is at
    least the square of their mean.
    """
    squares = max(squares, state.value**2)
    spread = squares - state.value**2
    flat = state.variance < FLAT**2 or spread <= 0
    count = float(1 / (state.shares**2).sum()) if flat else min(spread / state.variance, EVEN * state.n)
    centre = count * state.value / (count + 2)
    error = float(np.sqrt(((count * squares + 2) / (count + 2) - centre**2) / (count + 2)))
    half = float(stdtrit(state.degrees, (1 + LEVEL) / 2)) * error
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return replace(plain, low=low, high=high, p=_two_sided(centre / error, state.degrees))


def _linked(metric: Metric, plain: Estimate) -> Estimate:
    if (link := metric.link) is None:
        return plain
    low, high = (None if end is None else float(link(end)) for end in (plain.low, plain.high))
    return replace(plain, value=float(link(plain.value)), low=low, high=high, error=None)


def bootstrap(metric: Metric, rows: Array, clusters: Sequence[str], seed: int = 0) -> tuple[float, float] | None:
    """The percentile interval of whole clusters drawn with replacement: a check of `estimate`. None: one cluster."""
    sums = cluster_sums(np.asarray(rows, float), clusters)
    if len(sums) < 2:
        return None
    rng, values = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        drawn = np.bincount(rng.integers(0, len(sums), len(sums)), minlength=len(sums))
        values.append(float(metric.value(drawn @ sums)))
    finite = np.array(values)[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if metric.link is not None:
        low, high = metric.link(low), metric.link(high)
    return float(low), float(high)


def rows_to_see(difference: Estimate, share: float = 0.5) -> int | None:
    """How many rows, in clusters of this size, show a difference `share` as large with a power of 80 %.

    None where the difference is 0 or nothing varies.
    """
    if difference.error is None or difference.error < FLAT or abs(difference.value) < FLAT:
        return None
    z = float(ndtri((1 + LEVEL) / 2) + ndtri(POWER))
    return int(np.ceil(difference.n * (z * difference.error / (share * difference.value)) ** 2))


@dataclass(frozen=True)
class SeedSpread:
    """The values of a metric over the seeds of two settings, and their standard deviations."""

    first: list[float]
    second: list[float]

    @staticmethod
    def _deviation(values: Sequence[float]) -> float | None:
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    @property
    def deviations(self) -> tuple[float | None, float | None]:
        """Standard deviations between the seeds of each side; None for a single seed."""
        return self._deviation(self.first), self._deviation(self.second)


def seeds_difference(
    metric: Metric, first: Sequence[Array], second: Sequence[Array], clusters: Sequence[str]
) -> tuple[Estimate, SeedSpread]:
    """The mean metric of several runs `second`, less that of `first`: its error covers questions and seeds.

    The variance between clusters and that between seeds are added; a side with one seed has the other's deviation.
    """
    first, second = ([np.asarray(rows, float) for rows in side] for side in (first, second))
    state = _paired(metric, first, second, clusters)
    plain = _with_interval(metric.name, state, tests=True)
    sides = [[float(influences(metric, rows, clusters).value) for rows in side] for side in (first, second)]
    if metric.link is not None:
        sides = [[float(metric.link(value)) for value in side] for side in sides]
    spread = SeedSpread(*sides)
    usable = [deviation for deviation in spread.deviations if deviation is not None]
    if not usable or plain.error is None or plain.degrees is None:
        return _difference_within(metric, plain, state), spread
    pooled = float(np.sqrt(np.mean(np.square(usable))))
    terms = [(plain.error**2, plain.degrees)]
    for deviation, values in zip(spread.deviations, sides, strict=True):
        freedom = len(values) - 1 if deviation is not None else sum(map(len, sides)) - 2
        terms.append(((pooled if deviation is None else deviation) ** 2 / len(values), float(max(freedom, 1))))
    variance = sum(term for term, _ in terms)
    if variance < FLAT**2:
        return _difference_within(metric, plain, state), spread
    degrees = float(variance**2 / sum(term**2 / freedom for term, freedom in terms))
    error = float(np.sqrt(variance))
    half = float(stdtrit(degrees, (1 + LEVEL) / 2)) * error
    p = _two_sided(plain.value / error, degrees)
    low, high = plain.value - half, plain.value + half
    plain = replace(plain, low=low, high=high, p=p, error=error, degrees=degrees)
    return _difference_within(metric, plain, state), spread
