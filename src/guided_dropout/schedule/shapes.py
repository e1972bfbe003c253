r"""Scores → rates: the less a site knows, the more of it is dropped.

With the sites in ascending order of their score, a shape says how far each one's rate has fallen, :math:`f_k` from 0 to
1, and

.. math:: p_k = p_{upper} - f_k\,(p_{upper} - p_{lower}), \qquad k = 0 \dots L-1.

Eqs. 9-10 of Sharma et al. (2024) are the shape ``linear``; the others are the "non-linear schedules" they leave to the
user.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from guided_dropout.errors import ScheduleError, describe, unknown

Scores = npt.NDArray[np.float64]
Shape = Callable[[Scores], npt.ArrayLike]
"""Scores in ascending order, float64 [L] → how far each site's rate has fallen, [L], from 0 (upper) to 1 (lower)."""


def linear(scores: Scores) -> Scores:
    r"""The paper's (eqs. 9-10): :math:`f_k = k / (L - 1)`. Reaches both ends."""
    return np.arange(len(scores)) / max(len(scores) - 1, 1)


def cosine(scores: Scores) -> Scores:
    r"""Half a cosine, flat at both ends: :math:`f_k = (1 - \cos(\pi k / (L - 1))) / 2`. Reaches both ends."""
    return (1 - np.cos(np.pi * linear(scores))) / 2


def exponential(scores: Scores, decay: float = 3.0) -> Scores:
    r"""Falls fast, then levels off: :math:`f_k = (1 - e^{-a k / (L - 1)}) / (1 - e^{-a})`. Reaches both ends.

    Args:
        scores: ascending.
        decay: a > 0; towards 0 it becomes `linear`.
    """
    if not (math.isfinite(decay) and decay > 0):
        raise ScheduleError(f"decay {decay:g} of shape exponential; expected a number above 0, as in exponential:3")
    return np.expm1(-decay * linear(scores)) / np.expm1(-decay)


def step(scores: Scores, groups: float = 4) -> Scores:
    r"""In n groups of sites, as equal in number as can be: :math:`f_k = \lfloor (k + 1/2)\,n / L \rfloor / (n - 1)`.

    Reaches both ends. With fewer sites than groups each site is a group, which is `linear`.

    Args:
        scores: ascending.
        groups: n, 2 or more.
    """
    if not float(groups).is_integer() or groups < 2:
        raise ScheduleError(f"{groups:g} groups of shape step; expected a whole number from 2, as in step:4")
    n = min(int(groups), len(scores))
    return (2 * np.arange(len(scores)) + 1) * n // (2 * len(scores)) / max(n - 1, 1)


def proportional(scores: Scores) -> Scores:
    r"""Proportional to the logarithm of the score.

    :math:`f_k = (\log s_k - \log s_{min}) / (\log s_{max} - \log s_{min})`. Reaches
    both ends. The minimum is over the scores above 0; a score of exactly 0, which has no logarithm, falls by 0 like the
    minimum, and alone does so where all others are equal. Scores that are all equal fall by 1/2.
    """
    if len(scores) and scores[0] < 0:
        raise ScheduleError(f"score {scores[0]:g} has no logarithm; expected 0 or more: use a shape of the ranks")
    logs = np.maximum.accumulate(np.log(scores[scores > 0]))
    zeros = np.zeros(len(scores) - len(logs))
    if len(logs) and logs[-1] > logs[0]:
        return np.concatenate([zeros, (logs - logs[0]) / (logs[-1] - logs[0])])
    if len(logs) and len(zeros):
        return np.concatenate([zeros, np.ones(len(logs))])
    return np.full(len(scores), 0.5 if len(scores) > 1 else 0.0)


SHAPES: dict[str, Callable[..., npt.ArrayLike] | None] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "step": step,
    "proportional": proportional,
    "paper_code": None,
}
"""Name → shape. A number after a colon sets the second argument: ``"step:3"``, ``"exponential:5"``.

``"paper_code"`` is no function of the bounds but a list of rates, see `paper_code_rates`.
"""


def paper_code_rates(number: int, *, upper: float = 0.1, lower: float = 0.0) -> list[float]:
    r"""The rates that the authors' published script pastes on BERT-base: :math:`p_k = 0.00275\,(36 - k)`.

    Known of the script: 37 sites, a top rate of 0.099 where the paper says 0.1, a mean of 0.0495. Inferred: that the
    rates are evenly spaced, as in the paper, down to 0. The three figures agree with that, and then the step,
    0.099 / 36 = 0.00275, has no freedom left; the script's other rates one by one are not known here.

    Args:
        number: of sites; 37.
        upper: the paper's 0.1; the script has no other.
        lower: the paper's 0.

    Returns:
        Rates in ascending order of the score, each the double nearest to its decimal.

    Raises:
        ScheduleError: another number of sites, or other bounds.
    """
    if number != 37:
        raise ScheduleError(
            f"shape paper_code for {number} sites; expected 37, those of BERT-base: use shape linear with upper 0.099"
        )
    if (upper, lower) != (0.1, 0):
        raise ScheduleError(
            f"shape paper_code with upper {upper:g} and lower {lower:g}; expected the paper's 0.1 and 0, as its rates "
            "are a fixed list: leave them out, or use shape linear"
        )
    return [(36 - k) * 275 / 100_000 for k in range(37)]


def shape_name(shape: str | Shape) -> str:
    """How `shape` is written in a schedule: its name with its number, or ``"custom:"`` and the callable's name.

    Raises:
        ScheduleError: an unknown shape, or a number that the shape does not take.
    """
    if callable(shape):
        return f"custom:{getattr(shape, '__name__', type(shape).__name__)}"
    name, function, arguments = _parsed(shape)
    if function and function.__defaults__:
        return f"{name}:{(arguments or function.__defaults__)[0]:g}"
    return name


def rates_from_scores(
    scores: Mapping[str, float],
    *,
    upper: float = 0.1,
    lower: float = 0.0,
    shape: str | Shape = "linear",
    mean_rate: float | None = None,
) -> dict[str, float]:
    """Rates that fall from `upper` to `lower` as the score rises.

    Sites with equal scores get equal rates: each the mean of the rates that would stand at their places. So the mean
    over all sites does not depend on ties, and scores that are all equal give uniform dropout. `upper` is reached,
    exactly, where one site alone has the lowest score and the shape reaches it; `lower` likewise. A single site is the
    least informative one and gets `upper`.

    Args:
        scores: path → score.
        upper: rate at the lowest score.
        lower: rate at the highest score.
        shape: a key of `SHAPES`, with or without a number, or a function like `linear`.
        mean_rate: multiply all rates by one number such that this is their mean; see `with_mean`.

    Returns:
        Path → rate, in the order of `scores`.

    Raises:
        ScheduleError: rates outside [0, 1) or in the wrong order, an unknown shape, a shape whose falls are not L
            numbers from 0 to 1 that never decrease, a score that is not finite, or a mean that cannot be had.
    """
    check_rate("upper", upper)
    check_rate("lower", lower)
    if lower > upper:
        raise ScheduleError(f"lower rate {lower:g} is above upper rate {upper:g}; expected lower <= upper: swap them")
    shape_name(shape)
    for path, score in scores.items():
        if not math.isfinite(score):
            raise ScheduleError(f"score of {path} is {score}; expected a finite number: estimate the profile again")
    if shape == "paper_code":
        rates = place_rates(scores, paper_code_rates(len(scores), upper=upper, lower=lower))
    else:
        falls = _falls(shape, np.array(sorted(scores.values()), dtype=np.float64)) if scores else []
        rates = place_rates(scores, [_rate(fall, upper, lower) for fall in falls])
    return rates if mean_rate is None else with_mean(rates, mean_rate)


def place_rates(scores: Mapping[str, float], rates: Sequence[float]) -> dict[str, float]:
    """Give the rates, in the order in which they come, to the sites in ascending order of score.

    Args:
        scores: path → score.
        rates: one for each site. Sites with equal scores share the mean of theirs.

    Returns:
        Path → rate, in the order of `scores`.
    """
    ranked = sorted(scores, key=lambda path: (scores[path], path))
    placed: dict[str, float] = {}
    for _, tied in itertools.groupby(ranked, key=scores.__getitem__):
        paths = list(tied)
        theirs = rates[len(placed) : len(placed) + len(paths)]
        placed |= dict.fromkeys(paths, mean_of(theirs))
    return {path: placed[path] for path in scores}


def mean_of(rates: Collection[float]) -> float:
    """Their mean, never beyond the lowest or the highest by rounding: of rates that are all the same, that rate."""
    return min(max(math.fsum(rates) / len(rates), min(rates)), max(rates))


def with_mean(rates: Mapping[str, float], mean: float) -> dict[str, float]:
    r"""The same rates times one number, so that their mean is `mean`: :math:`p_k \cdot mean / \bar p`.

    Rates are never clipped: that would change the shape.

    Raises:
        ScheduleError: a mean outside [0, 1), one that would take a rate to 1 or above, or rates that are all 0.
    """
    check_rate("mean_rate", mean)
    if not rates:
        return {}
    present = mean_of(rates.values())
    if present == 0:
        if mean == 0:
            return dict(rates)
        raise ScheduleError(f"rates that are all 0 have no multiple of mean {mean:g}; expected an upper rate above 0")
    scaled = {path: rate * (mean / present) for path, rate in rates.items()}
    top = max(scaled, key=scaled.__getitem__)
    if scaled[top] >= 1:
        raise ScheduleError(
            f"mean rate {mean:g} would need a rate of {scaled[top]:.4g} at {top}; expected rates below 1: choose a "
            f"mean rate below {present / rates[top]:.4g}, or raise the lower rate to make the schedule flatter"
        )
    return scaled


def check_rate(name: str, rate: Any) -> None:
    """Refuse a rate that is not a number in [0, 1).

    Raises:
        ScheduleError: it is not.
    """
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not (number and 0 <= rate < 1):
        found = repr(rate) if rate is None or isinstance(rate, int | float | str) else describe(rate)
        raise ScheduleError(f"dropout rate of {name} is {found}; expected a number in [0, 1)")


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a name that is not among the choices.

    Raises:
        ScheduleError: it is not; the message names the nearest.
    """
    if value not in choices:
        raise ScheduleError(unknown(what, value, choices))


def _parsed(spec: str) -> tuple[str, Any, tuple[float, ...]]:
    """``"step:3"`` → ("step", step, (3.0,))."""
    name, colon, number = spec.partition(":")
    check_choice("shape", name, SHAPES)
    function = SHAPES[name]
    if not colon:
        return name, function, ()
    if not (function and function.__defaults__):
        raise ScheduleError(f"shape {spec!r} has a number, which {name} does not take; expected {name!r}")
    try:
        return name, function, (float(number),)
    except ValueError:
        raise ScheduleError(f"shape {spec!r}; expected a number after the colon, as in '{name}:3'") from None


def _falls(shape: str | Shape, ascending: Scores) -> Scores:
    name, function, arguments = (shape_name(shape), shape, ()) if callable(shape) else _parsed(shape)
    falls = np.asarray(function(ascending, *arguments), dtype=np.float64)
    if falls.shape != ascending.shape:
        raise ScheduleError(
            f"shape {name} gives falls of shape {list(falls.shape)} for {len(ascending)} scores; expected one a score"
        )
    if not (np.isfinite(falls).all() and (falls >= 0).all() and (falls <= 1).all() and (np.diff(falls) >= 0).all()):
        shown = np.array2string(falls, precision=3, threshold=6)
        raise ScheduleError(
            f"shape {name} gives {shown}; expected falls from 0 (upper rate) "
            "to 1 (lower rate) that never decrease: other rates can be given as a table"
        )
    return falls


def _rate(fallen: float, upper: float, lower: float) -> float:
    """From `upper` (fallen 0) to `lower` (fallen 1), both exact in spite of rounding."""
    return lower if fallen == 1 else max(lower, upper - float(fallen) * (upper - lower))
