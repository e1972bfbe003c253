"""A dropout schedule read as how strongly each parameter is regularised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from guided_dropout.errors import ScheduleError
from guided_dropout.regularizers.rates import rates_on
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.sites import find_sites


def relative_strengths(
    model: nn.Module, schedule: DropoutSchedule, inputs: Mapping[str, Any] | None = None
) -> dict[str, float]:
    r"""Name of each parameter → :math:`p_{s(j)}/\bar p`: the rate of the site that it feeds, over the schedule's mean.

    A parameter that feeds several sites has the mean of their rates; one that feeds none (by owner: BERT's intermediate
    layer; a new head) has 1, the mean.

    Args:
        model: the model; it is run once and left as it was.
        schedule: for the same backbone; its grouping says which parameters feed a site.
        inputs: keyword arguments of the model's forward for that run; by default a tiny batch.

    Raises:
        ScheduleError: a schedule for another model, or one that has only zeros.
        SiteError: as for `sites.trace`.
    """
    if schedule.mean_rate == 0:
        raise ScheduleError(
            "the schedule's rates are all 0; expected one above 0 to weigh parameters by: raise its upper rate"
        )
    sites = find_sites(model, inputs, per_call=schedule.per_call)
    rates = rates_on(model, schedule, sites)
    fed: dict[str, list[float]] = {name: [] for name, _ in model.named_parameters()}
    for site in sites:
        if site.path in rates:
            for name in site.parameters_by(schedule.grouping):
                fed[name].append(rates[site.path])
    mean = schedule.mean_rate
    return {name: math.fsum(p) / len(p) / mean if p else 1.0 for name, p in fed.items()}
