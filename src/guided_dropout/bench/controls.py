"""What an arm guided by Fisher information is compared with, and what each comparison can show.

Only a control of the same mean strength says something about *guidance*: against anything else, the amount of
regularisation differs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guided_dropout.arms import ARMS

STANDARD, CONTROL, NONE, OTHER = "standard dropout", "control at the same mean", "no dropout", "another regularizer"


@dataclass(frozen=True)
class Controls:
    """The controls of one guided arm.

    Attributes:
        even: those with the same strength everywhere.
        uneven: those with the same strengths, or others of the same mean, spread without Fisher information.
        partly: those that go by part of it.
        others: further arms that it is compared with; None for all.
    """

    even: tuple[str, ...]
    uneven: tuple[str, ...] = ()
    partly: tuple[str, ...] = ()
    others: tuple[str, ...] | None = ()


GUIDED = {
    "guided": Controls(
        ("uniform",), ("shuffled", "reversed", "depth-linear", "magnitude"), ("top-only", "role-mean"), None
    ),
    "guided-gaussian": Controls((), others=("gaussian", "guided")),
    "guided-decay": Controls(("dropout",)),  # weight decay is the same in both, spread evenly there
    "guided-l2-sp": Controls(("l2-sp",)),
}
"""By name of the guided arm."""


def name_of(label: str) -> str:
    """The arm's name in its label: ``"mixout"`` of ``"mixout:p=0.9"``."""
    return label.partition(":")[0]


def role(guided: str, control: str) -> str:
    """What a comparison with `control` is about.

    Args:
        guided: label of a guided arm; of any other, nothing is known.
        control: label of the arm that it is compared with.

    Returns:
        `STANDARD`, `CONTROL`, `NONE` or `OTHER`.
    """
    if name_of(guided) not in GUIDED:
        return OTHER
    controls, name = GUIDED[name_of(guided)], name_of(control)
    if name in (*controls.even, *controls.partly, *controls.uneven):
        return CONTROL
    return {"dropout": STANDARD, "none": NONE}.get(name, OTHER)


def may_be_fair(guided: str, control: str) -> bool:
    """Whether the two arms differ in guidance alone, if they regularise as much on average."""
    plain = (name_of(guided), name_of(control)) == ("guided", "dropout")  # a schedule can have the standard mean
    return plain or role(guided, control) == CONTROL


def pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """All (guided arm, control) to compare among `arms`, the controls in the order of what they are for.

    An arm with parameters of its own (``guided-l2-sp:alpha=0.1``) is compared with the controls that have the same,
    where there are some.
    """
    found = []
    for guided in (a for a in arms if name_of(a) in GUIDED):
        controls = GUIDED[name_of(guided)]
        wanted = ("dropout", *controls.even, *controls.partly, *controls.uneven, "none", *(controls.others or ()))
        candidates = [a for a in arms if a != guided and (controls.others is None or name_of(a) in wanted)]
        parameters = guided.partition(":")[2]
        for name in dict.fromkeys([*wanted, *map(name_of, candidates)]):
            named = [a for a in candidates if name_of(a) == name]
            alike = [a for a in named if parameters and a.partition(":")[2] == parameters]
            found += [(guided, a) for a in alike or named]
    return found


def in_order(arms: Sequence[str]) -> list[str]:
    """Labels in the order of `arms.ARMS`, those with parameters after their plain form."""
    known = list(ARMS)
    places = {a: known.index(name_of(a)) if name_of(a) in known else len(known) for a in arms}
    return sorted(dict.fromkeys(arms), key=lambda a: (places[a], a))
