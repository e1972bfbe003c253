"""What an experiment is made with: models, what is known about them, how they are trained; checked before any run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from guided_dropout.arms import choose_arm
from guided_dropout.bench import controls
from guided_dropout.bench.grid import Grid, RunKey
from guided_dropout.data.task_data import GLUE, DataSource, parse_split
from guided_dropout.data.tasks import subset
from guided_dropout.errors import GuidedDropoutError
from guided_dropout.finetune import cut_note, finetune, fitting_length, recipe_facts
from guided_dropout.fisher import FisherProfile
from guided_dropout.fisher.processes import check_alone
from guided_dropout.models import drawn_parameters, load_classifier, load_tokenizer
from guided_dropout.recipe import Recipe
from guided_dropout.regularizers import Context, apply_dropout
from guided_dropout.regularizers.residual import added_sites
from guided_dropout.results import RunResult, Seeds
from guided_dropout.schedule import DropoutSchedule
from guided_dropout.schedule.schedule import profile_facts
from guided_dropout.workbench import Workbench

# Of a recipe, what may differ between the cells of an experiment; what a cell's runs share is compared run by run.
_NOT_SHARED = ("train_fraction", "device", "residual_sites")


@dataclass(frozen=True)
class BenchModel:
    """A pretrained model of an experiment.

    Attributes:
        source: ``"demo"``, a folder or a hub name.
        profile: folder of its Fisher profile; None where no arm needs one.
        schedule: file of its schedule; None for the paper's linear one, made from the profile.
        residual_sites: see `finetune`.
    """

    source: str
    profile: str | None = None
    schedule: str | None = None
    residual_sites: bool = False

    @property
    def label(self) -> str:
        """What it is called in results: the last part of `source`, without dots in front, which hide a file."""
        path = Path(self.source)
        if path.name in ("", ".."):
            path = path.resolve()
        return path.name.lstrip(".") or self.source

    def known(self) -> tuple[FisherProfile | None, DropoutSchedule | None]:
        """The profile and the schedule, read from disk; a missing schedule is made from the profile."""
        profile = None if self.profile is None else FisherProfile.from_pretrained(self.profile)
        if self.schedule is not None:
            return profile, DropoutSchedule.load(self.schedule)
        if profile is None:
            return None, None
        classifier = load_classifier(self.source, 2, head_seed=0)
        with added_sites(classifier, self.residual_sites):
            return profile, DropoutSchedule.from_profile(profile, classifier)

    def has_weights_of(self, profile: FisherProfile) -> bool | None:
        """Whether the model has the weights that `profile` was measured on; None where that cannot be told."""
        return profile.has_weights_of(load_classifier(self.source, 2, head_seed=0))


@dataclass(frozen=True)
class Plan:
    """An experiment, as plain data that a process can be sent.

    Attributes:
        grid: which runs.
        models: by label.
        source: the labelled data of all tasks.
        recipe: how all runs are trained; the grid says on how much, and `models` with which sites.

    Raises:
        GuidedDropoutError: two models of the same label.
    """

    grid: Grid
    models: Mapping[str, BenchModel]
    source: DataSource = field(default_factory=DataSource)
    recipe: Recipe = field(default_factory=lambda: Recipe(evaluate="end"))

    @classmethod
    def of(
        cls,
        models: Sequence[BenchModel],
        tasks: Sequence[str],
        arms: Sequence[str],
        fractions: Sequence[float],
        seeds: Sequence[int],
        source: DataSource | None = None,
        **options: Any,
    ) -> Plan:
        """A plan of all combinations; names are checked, arms get their labels.

        Raises:
            GuidedDropoutError: an unknown task or arm, an empty axis, two models of the same label, or several tasks
                with the files of one.
        """
        source = source or DataSource()
        if source.is_one_task and len(tasks) > 1:
            raise GuidedDropoutError(
                f"found {len(tasks)} tasks ({', '.join(tasks)}) with the files --data {source.data}; expected one name "
                "for them: give each its own --out"
            )
        by_label: dict[str, BenchModel] = {}
        for model in models:
            if model.label in by_label:
                raise GuidedDropoutError(
                    f"two models called {model.label!r} ({by_label[model.label].source} and {model.source}); expected "
                    "names by which results can be told apart: rename a folder"
                )
            by_label[model.label] = model
        names = [source.task_name(task) for task in tasks]
        labels = [choose_arm(arm).label for arm in arms]
        return cls(Grid(list(by_label), names, labels, list(fractions), list(seeds)), by_label, source, **options)

    def check(self) -> dict[str, Any]:
        """Make sure that each arm has what it needs, and say what all runs share.

        Returns:
            Plain data for `folder.Experiment.start`.

        Raises:
            GuidedDropoutError: a number of the recipe that is out of range, or a split that there is not.
            ScheduleError: an arm needs a profile or schedule that a model does not have.
            ArtefactError: one that cannot be read.
            ProcessError: a launcher started several processes.
        """
        check_alone()
        parse_split(self.source.split)
        models = {}
        for label, model in self.models.items():
            profile, schedule = model.known()
            context = Context(rate=self.recipe.rate, schedule=schedule, profile=profile)
            for arm in self.grid.arms:
                choose_arm(arm).check(context)
            models[label] = {
                "source": label,
                "residual_sites": model.residual_sites,
                "profile": None if schedule is None else dict(schedule.profile),
                "profile_digest": None if profile is None else profile_facts(profile)["digest"],
                "profile_of_these_weights": None if profile is None else model.has_weights_of(profile),
                "schedule": None
                if schedule is None
                else {
                    "shape": schedule.shape,
                    "grouping": schedule.grouping,
                    "aggregate": schedule.aggregate,
                    "mean_rate": schedule.mean_rate,
                    "rates": dict(schedule.rates),
                },
            }
        shared = {name: value for name, value in asdict(self.recipe).items() if name not in _NOT_SHARED}
        return {"recipe": {**shared, **_facts(self.source)}, "models": models}

    def recipe_of(self, key: RunKey) -> Recipe:
        """How a run is trained."""
        sites = self.models[key.model].residual_sites
        return replace(self.recipe, train_fraction=key.fraction, residual_sites=sites)

    def rehearse(self, told: Callable[[str], Any] = lambda note: None) -> None:
        """Put each arm on each model, and take it off again: what cannot be put on would fail in every run.

        Args:
            told: called with each sentence that a person should know of a model's profile and schedule, and of a
                length that was asked for.

        Raises:
            GuidedDropoutError: a schedule or profile of another model, something that an arm lacks, or a control that
                is the guided arm itself on one of the models, or its schedule.
        """
        for model in self.models.values():
            profile, schedule = model.known()
            classifier = load_classifier(model.source, 2, head_seed=0)
            for known in (profile, schedule if model.schedule is not None else None):
                if known is not None and (note := known.weights_note(classifier)):
                    told(note)
            length = self.recipe.max_length
            if length != Recipe.max_length and (note := cut_note(length, load_tokenizer(model.source), classifier)):
                told(note)
            new = drawn_parameters(classifier)
            context = Context(rate=self.recipe.rate, schedule=schedule, profile=profile, new=new)
            group = {"params": [*classifier.parameters()], "lr": 0.0, "weight_decay": self.recipe.weight_decay}
            made, apart = {}, []
            with added_sites(classifier, model.residual_sites):
                for arm in map(choose_arm, self.grid.arms):
                    rates = arm.rates(classifier, context)
                    made[arm.label] = arm.regularizer, dict(rates.rates)
                    apart.append((arm, rates))
                    with apply_dropout(classifier, rates), arm.apply(classifier, context) as handle:
                        handle.parameter_groups([dict(group)])
            for guided, control in controls.pairs(self.grid.arms):
                if made[guided] == made[control]:
                    raise GuidedDropoutError(
                        f"on {model.label} the arm {control} is {guided} itself: the same rate at each of "
                        f"{len(made[guided][1])} sites, so that a comparison would say nothing; expected another "
                        f"control: leave it out, --arms {','.join(a for a in self.grid.arms if a != control)}"
                    )
            for arm, rates in apart:
                arm.check_apart(rates, context)


def _facts(source: DataSource) -> dict[str, Any]:
    """What runs must have in common of their data; files and folders by name, wherever they lie."""
    places = {name: getattr(source, name) for name in ("data", "eval_data")}
    names = {name: None if at is None else Path(os.path.abspath(at)).name for name, at in places.items()}
    return {"data": None, "split": source.split} | {n: v for n, v in (asdict(source) | names).items() if v}


class Runner:
    """Makes the runs of a plan, one after the other, keeping what they share.

    Args:
        plan: which.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self._benches: dict[str, Workbench] = {}
        self._known: dict[str, tuple[FisherProfile | None, DropoutSchedule | None]] = {}

    def _bench(self, label: str) -> Workbench:
        if label not in self._benches:
            self._benches[label] = Workbench(self.plan.models[label].source)
        return self._benches[label]

    def foretell(self, key: RunKey) -> dict[str, Any]:
        """What can be known of a run's `folder.shared_facts` before it is made.

        Raises:
            GuidedDropoutError: the model or the data cannot be loaded.
        """
        plan, bench, seed = self.plan, self._bench(key.model), Seeds.derive(key.seed).subset
        given = bench.data(key.task, seed=seed, **asdict(plan.source))
        classifier = bench.classifier(given.task.num_labels, head_seed=0)
        length = fitting_length(plan.recipe.max_length, bench.tokenizer, classifier)
        recipe = replace(plan.recipe_of(key), max_length=length)
        facts = recipe_facts(recipe, given, len(subset(given.train, key.fraction, seed)))
        return {**facts, "evaluation": given.validation.digest() if given.split == GLUE else None}

    def run(self, key: RunKey) -> RunResult:
        """One run.

        Raises:
            GuidedDropoutError: whatever `finetune` raises.
        """
        model, bench = self.plan.models[key.model], self._bench(key.model)
        if key.model not in self._known:
            self._known[key.model] = model.known()
        profile, schedule = self._known[key.model]
        return finetune(
            bench,
            key.task,
            arm=key.arm,
            profile=profile,
            schedule=schedule,
            seed=key.seed,
            **asdict(self.plan.source),
            **asdict(self.plan.recipe_of(key)),
        )
