r"""Several measurements of one model as one profile, :math:`F = \sum_k N_k F^{(k)} / \sum_k N_k`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.prefixes import common_start
from guided_dropout.fisher.profile import FisherProfile, check_profile
from guided_dropout.provenance import provenance

_WEIGHTS = ("digest", "backbone")  # of the model's facts; earlier profiles lack them
_PLACE = ("name_or_path", "revision")  # likewise: where it came from
_TAKEN = ("taken", "max_characters")  # all samples or some, of how much of a text
_SAME = 1e-4  # a batch size moves a mean by 1e-6 of it, other samples by far more


def merge(*profiles: FisherProfile) -> FisherProfile:
    """The profile over the samples of all `profiles`, each weighted by its number of samples.

    The samples must not overlap: one that stands in two of them counts twice. Profiles whose samples begin alike are
    refused; so are two of a text of one name, drawn by one seed, where they hold no digests of their samples. The
    tensor means are those of one measurement over all samples, to rounding in float64; the values per parameter to that
    of their dtype.

    Args:
        profiles: two or more, of the same model, objective, reduction and labels. The same model has the same weights,
            wherever it was loaded from; profiles that do not hold a digest of them must name the same place.

    Returns:
        A profile with values per parameter if each has them, otherwise with tensor means only. Noise is what is noise
        in each, untouched what is untouched in each. ``provenance["merged"]`` lists where each part came from, with its
        samples that were left out; what all of them share stands above it.

    Raises:
        ArtefactError: fewer than two, something that is no profile, or two that do not belong together or were measured
            on the same samples.
    """
    for given in profiles:
        check_profile(given, "merge")
    if len(profiles) < 2:
        raise ArtefactError(f"{len(profiles)} profile to merge; expected two or more: name another")
    first = profiles[0]
    for k, other in enumerate(profiles[1:], 2):
        _check_same_measurement(first, other, k)
    _check_same_weights(profiles)
    for k, other in enumerate(profiles):
        for j, earlier in enumerate(profiles[:k]):
            _check_other_samples(earlier, other, j + 1, k + 1)
    total = sum(p.num_samples for p in profiles)
    whole = all(p.diagonal for p in profiles)
    return FisherProfile(
        diagonal={name: _weighted(profiles, name, total) for name in first.diagonal} if whole else {},
        tensor_means={
            name: math.fsum(p.num_samples * p.tensor_means[name] for p in profiles) / total
            for name in first.tensor_means
        },
        num_samples=total,
        num_skipped=sum(p.num_skipped for p in profiles),
        objective=first.objective,
        reduction=first.reduction,
        model=_model(profiles),
        coverage=_coverage(profiles),
        provenance=_provenance(profiles),
        labels=first.labels,
        shapes=first.shapes,
        noise=[name for name in first.noise if all(name in p.noise for p in profiles)],
    )


def _model(profiles: Sequence[FisherProfile]) -> dict[str, Any]:
    """What the first says of the model, without what another lacks or, of the commit, has otherwise."""
    first, *others = (p.model for p in profiles)
    left_out = {k for k in _WEIGHTS if any(k not in o for o in others)}
    left_out |= {"revision"} if any(o.get("revision") != first.get("revision") for o in others) else set()
    return {k: v for k, v in first.items() if k not in left_out}


def _coverage(profiles: Sequence[FisherProfile]) -> dict[str, Any]:
    """How each parameter was found; the numbers of samples that were left out are each part's own."""
    parts = [p.coverage for p in profiles]
    fallback = sorted({name for part in parts for name in part.get("fallback", [])})
    sizes = {name: math.prod(shape) for name, shape in profiles[0].shapes.items()}
    found: dict[str, Any] = {
        "fallback": fallback,
        "parameters_by_rule": 1 - sum(sizes[name] for name in fallback) / sum(sizes.values()),
    }
    if any("reasons" in part for part in parts):
        reasons = {name: why for part in reversed(parts) for name, why in part.get("reasons", {}).items()}
        found["reasons"] = dict(sorted(reasons.items()))
    if all("untouched" in part for part in parts):
        listed = [part["untouched"] for part in parts]
        found["untouched"] = [
            name
            for name in dict.fromkeys(itertools.chain(*listed))
            if all(name in names or name.partition("[")[0] in names for names in listed)  # a slice, or the whole of it
        ]
    return found


def _weighted(profiles: Sequence[FisherProfile], name: str, total: int) -> torch.Tensor:
    tensors = [p.diagonal[name] for p in profiles]
    result = torch.zeros_like(tensors[0], dtype=torch.float64)
    for p, t in zip(profiles, tensors, strict=True):
        result.add_(t.to(result), alpha=p.num_samples / total)
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return result.to(dtype)


def _check_same_measurement(a: FisherProfile, b: FisherProfile, number: int) -> None:
    facts: list[tuple[str, Any, Any]] = [
        (what, getattr(a, what), getattr(b, what)) for what in ("objective", "reduction", "labels")
    ]
    apart = {*_WEIGHTS} | ({*_PLACE} if "digest" in a.model and "digest" in b.model else set())
    if "revision" not in a.model or "revision" not in b.model:
        apart.add("revision")
    facts += [
        (f"the model's {key}", a.model.get(key), b.model.get(key)) for key in {**a.model, **b.model} if key not in apart
    ]
    facts += [
        (f"the shape of {name}", a.shapes.get(name, "missing"), b.shapes.get(name, "missing"))
        for name in {**a.shapes, **b.shapes}
    ]
    for what, left, right in facts:
        if left != right:
            raise ArtefactError(
                f"profiles that do not belong together: {what} is {left!r} in profile 1, {right!r} in profile "
                f"{number}; expected the same in each: merge profiles of one model, measured in one way"
            )


def _check_same_weights(profiles: Sequence[FisherProfile]) -> None:
    known = [(k, p.model["digest"], p.title) for k, p in enumerate(profiles, 1) if "digest" in p.model]
    for k, digest, title in known[1:]:
        if digest != known[0][1]:
            raise ArtefactError(
                f"profiles that do not belong together: profile {known[0][0]} was measured on {known[0][2]} with "
                f"weights {known[0][1]}, profile {k} on {title} with weights {digest}; expected the same weights in "
                "each: measure one checkpoint, in one precision"
            )


def _check_other_samples(a: FisherProfile, b: FisherProfile, first: int, second: int) -> None:
    means = [(mean, b.tensor_means[name]) for name, mean in a.tensor_means.items() if name not in a.noise]
    agree = bool(means) and all(math.isclose(*pair, rel_tol=_SAME) for pair in means)  # of noise alone nothing is known
    if agree and a.num_samples == b.num_samples:
        raise ArtefactError(
            f"profiles {first} and {second} were measured on the same {a.num_samples:,} samples: their tensor means "
            "agree; expected samples that do not overlap: measure on other text or with another --seed"
        )
    for x, y in itertools.product(_parts(a), _parts(b)):
        start, drawn = _common_start(x, y), _drawn_from(x)
        if start != 0 and drawn is not None and drawn == _drawn_from(y):
            text, seed, length = drawn
            raise ArtefactError(
                f"profiles {first} and {second} were both measured on samples of {length} tokens of {text} with seed "
                f"{seed}: the fewer are among the more, and would count twice; expected samples that do not "
                "overlap: measure on other text"
            )
        if start:
            raise ArtefactError(
                f"profiles {first} and {second} were both measured on samples of which the first {start:,} are the "
                "same, and would count twice; expected samples that do not overlap: measure on other text"
            )


def _parts(profile: FisherProfile) -> Sequence[Mapping[str, Any]]:
    """The provenance of each measurement in it."""
    return profile.provenance.get("merged", [profile.provenance])


def _common_start(x: Mapping[str, Any], y: Mapping[str, Any]) -> int | None:
    """How many samples two measurements begin with alike; None where their samples do not tell.

    Samples taken in another way, as all of a text beside some that are drawn from it, begin otherwise and overlap.
    """
    if not ("sample_digests" in x and "sample_digests" in y):
        return None
    start = common_start(x["sample_digests"], y["sample_digests"])
    return start if start or all(x.get(how) == y.get(how) for how in _TAKEN) else None


def _drawn_from(part: Mapping[str, Any]) -> tuple[Any, Any, Any] | None:
    """(text or task, seed, tokens) of a measurement that says so: from the same, fewer samples begin more."""
    found = (part.get("text") or part.get("data"), part.get("seed"), part.get("max_length"))
    return None if None in found else found


def _provenance(profiles: Sequence[FisherProfile]) -> dict[str, Any]:
    first, *others = (p.provenance for p in profiles)
    own = ("merged", "samples")  # how many were asked for adds up to what none was
    shared = {key: v for key, v in first.items() if all(key in o and o[key] == v for o in others) and key not in own}
    parts = [part for p in profiles for part in p.provenance.get("merged", [_part(p)])]
    return {**shared, **provenance(), "merged": parts}


def _part(profile: FisherProfile) -> dict[str, Any]:
    counted = {"num_samples": profile.num_samples, "num_skipped": profile.num_skipped}
    return {**counted, "coverage": dict(profile.coverage), **profile.provenance}
