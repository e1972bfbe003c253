"""Draw the figures of docs/schedules.md from a schedule file.

python benchmarks/schedule_figures.py benchmarks/results/fisher-minilm-l6/schedule.json docs/figures
"""

import sys
from pathlib import Path

from guided_dropout.plots.figures import figure_of, plot_schedule, plot_shapes, save_figure
from guided_dropout.schedule import DropoutSchedule


def main() -> None:
    """Schedule in, two SVGs out."""
    file, folder = map(Path, sys.argv[1:])
    schedule = DropoutSchedule.load(file)
    scores = {path: score for path, score in schedule.scores.items() if score is not None}
    save_figure(figure_of(plot_shapes(scores)), folder / "shapes.svg")
    save_figure(figure_of(plot_schedule(schedule)), folder / "schedule.svg")


if __name__ == "__main__":
    main()
