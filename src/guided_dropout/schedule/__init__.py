"""Dropout schedules: Fisher scores → a rate for each site."""

from guided_dropout.schedule.schedule import DropoutSchedule
from guided_dropout.schedule.scores import AGGREGATES, site_scores
from guided_dropout.schedule.shapes import SHAPES, check_rate, rates_from_scores

__all__ = ["AGGREGATES", "SHAPES", "DropoutSchedule", "check_rate", "rates_from_scores", "site_scores"]
