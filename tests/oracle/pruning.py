"""Golden values of magnitude, Wanda and SparseGPT pruning: float64 NumPy, written from the papers.

    python tests/oracle/pruning.py

Wanda: Sun et al., arXiv 2306.11695, section 3. SparseGPT: Frantar and Alistarh, arXiv 2301.00774, Algorithm 1,
one column at a time, with the Cholesky factor of an explicit inverse; it differs from the paper where RULES
say so. Inputs are integers times a power of two. A weight matrix is drawn again as a whole while any choice
between two weights is closer than MARGIN, so that float32 arithmetic must choose the same ones.
"""

import numpy as np

from methods import Grid, Result, draw_activations, draw_weight, groups_of, hessian_of, inverse_factor, relative_error
from record import GOLDEN, provenance, write

COMMAND = "python tests/oracle/pruning.py"
# Relative distance of the largest score that goes from the smallest that stays.
MARGIN = 1e-4
MASK_COLUMNS = 128
RULES = {
    "count": "share: round(share * n), of the columns up to the end of a block less what went before; N:M: N of every M "
    "columns of a row, floor(N * n / M) of a last run of n < M",
    "magnitude": "the smallest |w|: of a share, over the whole matrix",
    "wanda": "the smallest |w| * sqrt(mean x^2): of a share, over each row",
    "sparsegpt": "the smallest w^2 / U[c, c]^2 of corrected weights, U' U = inverse of the damped hessian: of a share, over all "
    "rows of each block of 128 columns, chosen at its first column; N:M chosen at the first column of each run",
    "hessian": "mean over tokens of 2 x x', plus damp_fraction * mean(diagonal of live columns) on the diagonal of live "
    "columns; dead columns (diagonal 0) have diagonal 1, score 0, and keep their weights where they stay",
    "joint": "GPTQ (rules in the other files) in the order of the file with the zeros of sparsegpt: the codes of those are the "
    "zero point, and groups are fitted to the others",
}


class Choice:
    """Chooses zeros and remembers how close the closest choice was."""

    def __init__(self):
        self.margin = np.inf

    def smallest(self, scores, count):
        """Mask of the `count` smallest of a flat array."""
        order = np.argsort(scores, kind="stable")
        mask = np.zeros(len(scores), dtype=bool)
        mask[order[:count]] = True
        if 0 < count < len(scores):
            gone, kept = scores[order[count - 1]], scores[order[count]]
            # Equal zeros are dead columns, which go in order.
            if kept > 0:
                self.margin = min(self.margin, (kept - gone) / kept)
        return mask


def run_count(zeros, of, length):
    return zeros * length // of


def runs(cols, of):
    return [range(start, min(start + of, cols)) for start in range(0, cols, of)]


def by_runs(choice, scores, zeros, of):
    mask = np.zeros(scores.shape, dtype=bool)
    for row in range(len(scores)):
        for run in runs(scores.shape[1], of):
            mask[row, run] = choice.smallest(scores[row, run], run_count(zeros, of, len(run)))
    return mask


def magnitude(choice, weight, sparsity):
    scores = np.abs(weight)
    if "share" in sparsity:
        count = int(np.rint(sparsity["share"] * weight.size))
        return choice.smallest(scores.ravel(), count).reshape(weight.shape)
    return by_runs(choice, scores, sparsity["zeros"], sparsity["of"])


def wanda(choice, weight, hessian, sparsity):
    scores = np.abs(weight) * np.sqrt(np.diag(hessian) / 2)
    if "share" in sparsity:
        count = int(np.rint(sparsity["share"] * weight.shape[1]))
        return np.array([choice.smallest(row, count) for row in scores])
    return by_runs(choice, scores, sparsity["zeros"], sparsity["of"])


def damped_factor(hessian, damp_fraction):
    """`U` and the dead columns."""
    diagonal = np.diag(hessian)
    dead = diagonal == 0
    damped = hessian + np.diag(np.where(dead, 1.0, damp_fraction * diagonal[~dead].mean()))
    return inverse_factor(damped, list(range(len(damped))), 0.0), dead


def sparsegpt(choice, weight, hessian, sparsity, damp_fraction):
    """The pruned weights and the mask."""
    rows, cols = weight.shape
    factor, dead = damped_factor(hessian, damp_fraction)
    root = np.where(dead, 0.0, 1.0 / np.diag(factor))
    current = weight.copy()
    mask = np.zeros(weight.shape, dtype=bool)
    for col in range(cols):
        if "share" in sparsity and col % MASK_COLUMNS == 0:
            block = slice(col, min(col + MASK_COLUMNS, cols))
            count = int(np.rint(sparsity["share"] * rows * block.stop)) - mask[:, :col].sum()
            scores = (current[:, block] * root[block]) ** 2
            mask[:, block] = choice.smallest(scores.ravel(), count).reshape(scores.shape)
        elif "of" in sparsity and col % sparsity["of"] == 0:
            run = slice(col, min(col + sparsity["of"], cols))
            scores = (current[:, run] * root[run]) ** 2
            count = run_count(sparsity["zeros"], sparsity["of"], scores.shape[1])
            mask[:, run] = [choice.smallest(row, count) for row in scores]
        kept = np.where(mask[:, col], 0.0, current[:, col])
        error = (current[:, col] - kept) / factor[col, col]
        current[:, col:] -= np.outer(error, factor[col, col:])
        current[:, col] = kept
    return current, mask


def gptq_with_zeros(weight, hessian, mask, case):
    """GPTQ in the order of the file with `mask` held at zero."""
    grid = Grid(case["bits"], case["symmetric"])
    factor, _ = damped_factor(hessian, case["damp_fraction"])
    current = weight.copy()
    result = Result(*weight.shape, case["group_size"])
    starts = {group[0]: group for group in groups_of(weight.shape[1], case["group_size"])}
    for col in range(weight.shape[1]):
        if col in starts:
            group = starts[col]
            result.fit(grid, np.where(mask[:, group], 0.0, current[:, group]), col)
        current_col, near = current[:, col].copy(), result.bad.copy()
        current_col[mask[:, col]] = 0.0
        rounded = result.round(grid, current_col, col)
        # Zero is a level: no decision.
        result.bad[mask[:, col]] = near[mask[:, col]]
        error = (current[:, col] - rounded) / factor[col, col]
        current[:, col:] -= np.outer(error, factor[col, col:])
    return result


def cases_of(weight, hessian, cases):
    """Results of all cases, and the smallest margin of any choice."""
    choice, results = Choice(), []
    for case in cases:
        extra = {}
        if case["method"] == "magnitude":
            mask = magnitude(choice, weight, case)
            pruned = np.where(mask, 0.0, weight)
        elif case["method"] == "wanda":
            mask = wanda(choice, weight, hessian, case)
            pruned = np.where(mask, 0.0, weight)
        else:
            pruned, mask = sparsegpt(choice, weight, hessian, case, case["damp_fraction"])
        if case["method"] == "joint":
            result = gptq_with_zeros(weight, hessian, mask, case)
            if result.bad.any():
                choice.margin = 0.0
            pruned = result.weights()
            extra = {
                "codes": result.codes.astype(int),
                "scales": result.scales.astype(np.float32),
                "zero_points": [] if case["symmetric"] else result.zeros.astype(int),
            }
        elif case["method"] == "sparsegpt":
            extra = {"weight": pruned.astype(np.float32)}
        extra["relative_error"] = relative_error(weight, pruned, hessian)
        results.append(case | {"mask": mask.astype(int)} | extra)
    return results, choice.margin


def pruning_file(name, rows, cols, tokens, seed, cases, dead=()):
    """Writes `NAME.json`; `dead` lists columns that no token excites."""
    rng = np.random.default_rng(seed)
    activations = draw_activations(rng, tokens, cols, list(dead))
    hessian = hessian_of(activations * 2.0**-3)
    margin = 0.0
    while margin < MARGIN:
        weight = draw_weight(rng, rows, cols)
        # Distinct magnitudes, so that magnitude pruning has no ties.
        magnitudes = rng.choice(np.arange(1, 4 * weight.size), size=weight.size, replace=False)
        signs = np.where(weight < 0, -1, 1)
        ranks = np.argsort(np.argsort(np.abs(weight).ravel(), kind="stable"))
        weight = np.sort(magnitudes)[ranks].reshape(weight.shape) * signs
        results, margin = cases_of(weight * 2.0**-14, hessian, cases)
    write(
        GOLDEN / "methods" / f"{name}.json",
        provenance(COMMAND, ["numpy"])
        | {"method": "pruning", "seed": seed, "rules": RULES, "margin": MARGIN}
        | {"rows": rows, "cols": cols, "tokens": tokens, "dead_columns": list(dead)}
        | {"weight_unit": 2.0**-14, "weight": weight.astype(int)}
        | {"activation_unit": 2.0**-3, "activations": activations.astype(int)}
        | {"cases": results},
    )


def share(method, share, **extra):
    return {"method": method, "share": share} | extra


def pattern(method, zeros, of, **extra):
    return {"method": method, "zeros": zeros, "of": of} | extra


def main():
    damp = {"damp_fraction": 0.01}
    grid = damp | {"bits": 4, "symmetric": False, "group_size": 32}
    plain = [share(method, 0.5) for method in ("magnitude", "wanda")]
    plain += [pattern(method, 2, 4) for method in ("magnitude", "wanda")]
    sparsegpts = [share("sparsegpt", 0.5, **damp), share("sparsegpt", 0.3, **damp)]
    sparsegpts += [pattern("sparsegpt", zeros, of, **damp) for zeros, of in ((2, 4), (4, 8), (3, 7))]
    joints = [share("joint", 0.5, **grid), pattern("joint", 2, 4, **grid), share("joint", 0.5, **grid | {"symmetric": True})]
    pruning_file("pruning-12x160", 12, 160, 320, 11, plain + sparsegpts)
    pruning_file("pruning-6x160-joint", 6, 160, 320, 12, joints)
    dead = [share("wanda", 0.5), share("sparsegpt", 0.5, **damp), pattern("sparsegpt", 2, 4, **damp)]
    pruning_file("pruning-8x48-dead", 8, 48, 96, 13, dead, dead=(0, 1, 2, 21, 47))


if __name__ == "__main__":
    main()
