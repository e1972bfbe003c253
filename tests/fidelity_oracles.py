"""The metrics of `fidelity.metrics` by their definitions: everything sorted, in float64, by other people's code."""

import math

import numpy as np
from scipy.spatial.distance import cosine
from scipy.stats import entropy, pearsonr, spearmanr
from sklearn.metrics import jaccard_score


def oracle(full, sub, top, exclude=()):
    """By the definitions in the module's docstring."""
    f = np.concatenate([t.double().flatten().numpy() for n, t in full.items() if n not in exclude])
    g = np.concatenate([t.double().flatten().numpy() for n, t in sub.items() if n not in exclude])
    m = max(1, math.floor(top * len(f) + 0.5))
    masks = []
    for x in (f, g):
        mask = np.zeros(len(x), dtype=bool)
        mask[sorted(range(len(x)), key=lambda i: (-x[i], i))[:m]] = True
        masks.append(mask)
    p, q = f[masks[0]], g[masks[0]]
    constant = len(set(p)) < 2 or len(set(q)) < 2
    errors = [(b - a) / a for a, b in zip(p, q, strict=True) if a > 0]
    defined = p.sum() > 0 and q.sum() > 0
    middle = p / p.sum() + q / q.sum() if defined else None
    return {
        "overlap": jaccard_score(*masks),
        "spearman": None if constant else spearmanr(p, q).statistic,
        "pearson": None if constant else pearsonr(p, q).statistic,
        "cosine": 1 - cosine(p, q) if defined else None,
        # SciPy's jensenshannon is the root of this, and NaN where rounding makes it negative.
        "js": (entropy(p, middle) + entropy(q, middle)) / 2 if defined else None,
        "kl": (entropy(p, q) if (q[p > 0] > 0).all() else None) if defined else None,
        "kl_reverse": (entropy(q, p) if (p[q > 0] > 0).all() else None) if defined else None,
        "mean_error": math.fsum(abs(e) for e in errors) / len(errors) if errors else None,
        "rms_error": math.sqrt(math.fsum(e * e for e in errors) / len(errors)) if errors else None,
        "zeros": sum(b == 0 for b in q) / len(q),
    }
