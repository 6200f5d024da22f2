"""Golden values of round-to-nearest and GPTQ: float64 NumPy, written from the papers.

    python tests/oracle/methods.py

RTN: the grid of GPTQ's paper with the scale rounded to float16 first. GPTQ: Frantar et al., arXiv
2210.17323, Algorithm 1, one column at a time, with the Cholesky factor of an explicit inverse. It differs
from the paper where RULES say so. It is slow and plain on purpose: it shares no trick with the code it
checks.

Inputs are integers times a power of two, so both sides start from the same numbers. Rows in which any
rounding decision comes near a tie are drawn again, so that float32 arithmetic must reach the same codes.
"""

import numpy as np

from record import GOLDEN, provenance, write

COMMAND = "python tests/oracle/methods.py"
RULES = {
    "dequantize": "w = scale * (code - zero_point)",
    "rounding": "to the nearest, ties to even; no decision is within `margins` of a tie",
    "asymmetric": "range contains 0; scale = f16((hi - lo) / (2^bits - 1)); zero_point = clamp(round(-lo / scale)); "
    "code = clamp(round(w / scale) + zero_point, 0, 2^bits - 1)",
    "symmetric": "scale = f16(2 * max|w| / (2^bits - 1)); zero_point = 2^(bits - 1)",
    "group_size": "null is one group a row; the last group may be short",
}
GPTQ_RULES = {
    "hessian": "mean over tokens of 2 x x'; where a column's diagonal is 0 (dead) it is set to 1 first; "
    "then damp_fraction * mean(diagonal), dead columns counted, is added to the diagonal",
    "group_parameters": "from the current, error-compensated weights when the sweep reaches the group's first column; "
    "group_size null: from the original weights",
    "act_order": "none: columns from left to right; group: columns by falling diagonal inside each group, groups by "
    "falling largest diagonal (group_size null: all columns by falling diagonal). `order` lists columns as visited",
    "relative_error": "tr((W-Q) H (W-Q)') / tr(W H W'), undamped H",
}
# Distance to a tie, in steps of what is rounded, that every decision keeps: codes and zero points in codes,
# scales in units in the last place of float16. A float32 implementation errs by less.
MARGINS = {"code": 1e-4, "zero_point": 1e-3, "scale": 5e-3}


def near_f16_tie(value):
    """Where `value` is almost halfway between two neighbouring float16 numbers."""
    _, exponent = np.frexp(value)
    ulp = np.ldexp(1.0, np.maximum(exponent - 11, -24))
    steps = value / ulp
    return np.abs(steps - np.floor(steps) - 0.5) < MARGINS["scale"]


def round_clamped(value, offset, top, margin):
    """`clamp(round(value) + offset, 0, top)`, and where a change by `margin` would alter it."""
    low, mid, high = (np.clip(np.rint(value + d) + offset, 0, top) for d in (-margin, 0.0, margin))
    return mid, low != high


class Grid:
    """Values a weight may take: `bits` wide, symmetric or not."""

    def __init__(self, bits, symmetric):
        self.symmetric = symmetric
        self.top = 2**bits - 1
        self.mid = 2 ** (bits - 1)

    def fit(self, weight):
        """Scale and zero point of each row of `weight`, and the rows with a decision near a tie."""
        low = np.minimum(weight.min(axis=1), 0.0)
        high = np.maximum(weight.max(axis=1), 0.0)
        assert (high > low).all(), "an all-zero group is not part of the golden values"
        exact = (2 * np.maximum(-low, high) if self.symmetric else high - low) / self.top
        scale = exact.astype(np.float16).astype(np.float64)
        if self.symmetric:
            return scale, np.full(len(weight), float(self.mid)), near_f16_tie(exact)
        zero, bad = round_clamped(-low / scale, 0, self.top, MARGINS["zero_point"])
        return scale, zero, bad | near_f16_tie(exact)

    def encode(self, column, scale, zero):
        """Codes of one column, and the rows near a tie."""
        return round_clamped(column / scale, zero, self.top, MARGINS["code"])


def groups_of(cols, group_size):
    """The columns of each group."""
    size = group_size or cols
    return [list(range(start, min(start + size, cols))) for start in range(0, cols, size)]


def sweep_groups(diagonal, group_size, act_order):
    """Groups in the order of the sweep, each with its columns in the order of the sweep."""
    groups = groups_of(len(diagonal), group_size)
    if act_order == "none":
        return groups
    groups = [sorted(group, key=lambda c: -diagonal[c]) for group in groups]
    return sorted(groups, key=lambda group: -max(diagonal[c] for c in group))


class Result:
    """Codes, scales and zero points of a matrix as they fill up."""

    def __init__(self, rows, cols, group_size):
        count = len(groups_of(cols, group_size))
        self.group_size = group_size or cols
        self.codes = np.zeros((rows, cols))
        self.scales = np.zeros((rows, count))
        self.zeros = np.zeros((rows, count))
        self.bad = np.zeros(rows, dtype=bool)

    def fit(self, grid, weight, col):
        """Sets the parameters of `col`'s group from `weight`, the group's weights."""
        group = col // self.group_size
        self.scales[:, group], self.zeros[:, group], bad = grid.fit(weight)
        self.bad |= bad

    def round(self, grid, weight, col):
        """Rounds the column `col`, whose weights are `weight`, and returns the rounded weights."""
        group = col // self.group_size
        scale, zero = self.scales[:, group], self.zeros[:, group]
        self.codes[:, col], bad = grid.encode(weight, scale, zero)
        self.bad |= bad
        return scale * (self.codes[:, col] - zero)

    def weights(self):
        group = np.arange(self.codes.shape[1]) // self.group_size
        return self.scales[:, group] * (self.codes - self.zeros[:, group])


def rtn(weight, grid, group_size):
    """Every weight to the nearest value of its group's grid."""
    result = Result(*weight.shape, group_size)
    for group in groups_of(weight.shape[1], group_size):
        result.fit(grid, weight[:, group], group[0])
        for col in group:
            result.round(grid, weight[:, col], col)
    return result


def hessian_of(activations):
    """The mean over tokens of `2 x x'`, `[cols, cols]`."""
    return 2.0 * activations.T @ activations / len(activations)


def inverse_factor(hessian, order, damp_fraction):
    """Upper `U` with `(H + damping)^-1 = U' U`, columns taken in `order`."""
    damped = hessian[np.ix_(order, order)] + damp_fraction * np.mean(np.diag(hessian)) * np.eye(len(order))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def gptq(weight, hessian, grid, group_size, act_order, damp_fraction):
    """GPTQ, one column at a time; returns the result and the order of the columns."""
    hessian = hessian.copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1.0
    groups = sweep_groups(np.diag(hessian), group_size, act_order)
    order = [col for group in groups for col in group]
    factor = inverse_factor(hessian, order, damp_fraction)
    current = weight.copy()
    result = Result(*weight.shape, group_size)
    starts = {group[0]: group for group in groups}
    for step, col in enumerate(order):
        if col in starts:
            result.fit(grid, current[:, starts[col]], col)
        rounded = result.round(grid, current[:, col], col)
        error = (current[:, col] - rounded) / factor[step, step]
        current[:, order[step:]] -= np.outer(error, factor[step, step:])
    return result, order


def draw_weight(rng, rows, cols):
    """Integer weights whose rows differ in spread and centre; unit 2^-10."""
    spread = rng.uniform(20, 90, size=(rows, 1))
    return np.rint(rng.standard_t(5, size=(rows, cols)) * spread + rng.normal(0, 6, size=(rows, 1)))


def draw_activations(rng, tokens, cols, dead):
    """Integer activations, correlated, channels of very different size; unit 2^-3."""
    mix = rng.normal(size=(cols // 2, cols)) / np.sqrt(cols // 2)
    base = rng.normal(size=(tokens, cols // 2)) @ mix + 0.6 * rng.normal(size=(tokens, cols))
    values = np.rint(base * np.exp(rng.normal(0, 0.7, size=cols)) * 6)
    values[:, dead] = 0
    return part_equal_diagonals(rng, values)


def part_equal_diagonals(rng, values):
    """Changes single activations until no two live columns have the same sum of squares: the order is then unique."""
    while True:
        squares = (values**2).sum(axis=0)
        _, first = np.unique(squares, return_index=True)
        again = [col for col in range(len(squares)) if col not in first and squares[col] > 0]
        if not again:
            return values
        values[rng.integers(len(values)), again] += 1


def record_case(case, result, extra):
    """One configuration with its outputs, ready for JSON."""
    zeros = [] if case["symmetric"] else result.zeros.astype(int)
    return case | extra | {
        "codes": result.codes.astype(int),
        "scales": result.scales.astype(np.float32),
        "zero_points": zeros,
    }


def redraw_until_clear(rng, weight, run):
    """Draws rows again until no case of `run(weight)` has a decision near a tie in any row."""
    while True:
        results = run(weight)
        bad = np.logical_or.reduce([result.bad for result, _ in results])
        if not bad.any():
            return weight, results
        weight[bad] = draw_weight(rng, int(bad.sum()), weight.shape[1])


def one_signed(weight):
    """Makes row 0 all positive and row 1 all negative, in place."""
    weight[0] = np.abs(weight[0]) + 3
    weight[1] = -np.abs(weight[1]) - 3
    return weight


def rtn_file(rows, cols, seed, cases):
    """Writes `rtn-ROWSxCOLS.json`."""
    rng = np.random.default_rng(seed)

    def run(weight):
        one_signed(weight)
        return [
            (rtn(weight * 2.0**-10, Grid(case["bits"], case["symmetric"]), case["group_size"]), {}) for case in cases
        ]

    weight, results = redraw_until_clear(rng, draw_weight(rng, rows, cols), run)
    write(
        GOLDEN / "methods" / f"rtn-{rows}x{cols}.json",
        provenance(COMMAND, ["numpy"])
        | {"method": "rtn", "seed": seed, "rules": RULES, "margins": MARGINS, "rows": rows, "cols": cols}
        | {"weight_unit": 2.0**-10, "weight": weight.astype(int)}
        | {"cases": [record_case(case, *result) for case, result in zip(cases, results)]},
    )


def relative_error(weight, rounded, hessian):
    delta = weight - rounded
    return np.sum((delta @ hessian) * delta) / np.sum((weight @ hessian) * weight)


def gptq_file(name, rows, cols, tokens, seed, cases, dead=()):
    """Writes `NAME.json`; `dead` lists columns that no token excites."""
    rng = np.random.default_rng(seed)
    activations = draw_activations(rng, tokens, cols, list(dead))
    hessian = hessian_of(activations * 2.0**-3)
    assert list(np.flatnonzero(np.diag(hessian) == 0)) == list(dead)

    def run(weight):
        results = []
        for case in cases:
            grid = Grid(case["bits"], case["symmetric"])
            exact = weight * 2.0**-10
            result, order = gptq(
                exact, hessian, grid, case["group_size"], case["act_order"], case["damp_fraction"]
            )
            plain = rtn(exact, grid, case["group_size"])
            extra = {
                "order": order,
                "relative_error": relative_error(exact, result.weights(), hessian),
                "relative_error_of_rtn": relative_error(exact, plain.weights(), hessian),
            }
            results.append((result, extra))
        return results

    weight, results = redraw_until_clear(rng, draw_weight(rng, rows, cols), run)
    write(
        GOLDEN / "methods" / f"{name}.json",
        provenance(COMMAND, ["numpy"])
        | {"method": "gptq", "seed": seed, "rules": RULES | GPTQ_RULES, "margins": MARGINS}
        | {"rows": rows, "cols": cols, "tokens": tokens, "dead_columns": list(dead)}
        | {"weight_unit": 2.0**-10, "weight": weight.astype(int)}
        | {"activation_unit": 2.0**-3, "activations": activations.astype(int)}
        | {"cases": [record_case(case, *result) for case, result in zip(cases, results)]},
    )


def grid_case(bits, symmetric, group_size):
    return {"bits": bits, "symmetric": symmetric, "group_size": group_size}


def gptq_case(bits, symmetric, group_size, act_order):
    return grid_case(bits, symmetric, group_size) | {"act_order": act_order, "damp_fraction": 0.01}


def main():
    four = [grid_case(4, symmetric, size) for symmetric in (False, True) for size in (32, 128, None)]
    more = [grid_case(3, False, 32), grid_case(8, True, None), grid_case(8, False, 32)]
    rtn_file(8, 16, 1, [grid_case(4, False, None), grid_case(4, True, None), grid_case(8, True, None)])
    rtn_file(16, 96, 2, [grid_case(4, False, 64), grid_case(4, True, 64)] + more)
    rtn_file(64, 256, 3, four)

    both = ("group", "none")
    gptq_file("gptq-8x16", 8, 16, 48, 4, [gptq_case(4, s, None, o) for s in (False, True) for o in both])
    short_group = [gptq_case(4, symmetric, size, order) for symmetric in (False, True) for size in (64, 32) for order in both]
    wide = [gptq_case(3, False, 64, "group"), gptq_case(8, True, None, "group")]
    gptq_file("gptq-16x96", 16, 96, 192, 5, short_group + wide)
    gptq_file("gptq-16x96-dead", 16, 96, 192, 6, [gptq_case(4, False, 32, o) for o in both], dead=(0, 37, 95))
    large = [gptq_case(4, False, 128, "group"), gptq_case(4, True, 32, "none")]
    gptq_file("gptq-64x256", 64, 256, 288, 7, large)


if __name__ == "__main__":
    main()
