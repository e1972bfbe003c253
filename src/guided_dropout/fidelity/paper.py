"""Table 1 of Sharma et al. (2024), for comparison: BERT-base, WikiText-103."""

from __future__ import annotations

FRACTIONS = (0.33, 0.1, 0.05, 0.01, 0.001)
TOPS = (0.05, 0.01, 0.005, 0.0025)

_ROWS = {
    0.05: (
        (0.9864, 0.0409, 0.0055, 0.0304),
        (0.9428, 0.1219, 0.0164, 0.0451),
        (0.9661, 0.0788, 0.0126, 0.0544),
        (0.9233, 0.1338, 0.0261, 0.0923),
        (0.7564, 0.2448, 0.1149, 0.2272),
    ),
    0.01: (
        (0.9767, 0.0825, 0.0044, 0.0243),
        (0.9305, 0.1665, 0.0159, 0.0415),
        (0.9547, 0.1171, 0.0100, 0.0407),
        (0.9111, 0.1732, 0.0212, 0.0665),
        (0.7349, 0.3035, 0.1011, 0.1757),
    ),
    0.005: (
        (0.9643, 0.1427, 0.0040, 0.0208),
        (0.9136, 0.2057, 0.0140, 0.0348),
        (0.9445, 0.1597, 0.0092, 0.0351),
        (0.8916, 0.2504, 0.0196, 0.0574),
        (0.7208, 0.3792, 0.0898, 0.1599),
    ),
    0.0025: (
        (0.9399, 0.3163, 0.0034, 0.0169),
        (0.8784, 0.4215, 0.0112, 0.0274),
        (0.8998, 0.4003, 0.0072, 0.0271),
        (0.8424, 0.4822, 0.0170, 0.0480),
        (0.2908, 0.3956, 0.0612, 0.1451),
    ),
}

TABLE_1 = {
    (fraction, top): figures for top, rows in _ROWS.items() for fraction, figures in zip(FRACTIONS, rows, strict=True)
}
"""(Fraction of the text, share of the parameters) → four figures.

What they are is not known here: the heads of the columns are lost in the copy of the paper that this was taken from.
The first behaves as a similarity, the others as errors. One draw each; no spread is given.
"""
