//! Which linear gets how many zeros, when only their total is given.
//!
//! Each linear tells what zeros in it alone change about the stream behind its sublayer, at a few sparsities, on the
//! model as it is. Zeros then go, step by step, to the linear where the next ones add least to the sum of these errors
//! for each zero, until the total is reached. The curves are made convex first, so that no step hides a cheaper
//! one behind it. The error of the linear's own output would not do: it says nothing about what becomes of that output.

/// What zeros cost in one linear.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Its weights.
    pub weights: usize,
    /// Share of zeros and error there, by rising share.
    pub points: Vec<(f64, f64)>,
}

/// The share of zeros of each linear, so that all together have `share` of their weights at zero.
///
/// # Panics
/// If a curve has no point, or `share` is not between what the first and the last points add up to.
pub fn allocate(curves: &[Curve], share: f64) -> Vec<f64> {
    let hulls: Vec<Vec<(f64, f64)>> = curves.iter().map(|curve| hull(&curve.points)).collect();
    let total: f64 = curves.iter().map(|curve| curve.weights as f64).sum();
    let mut shares: Vec<f64> = hulls.iter().map(|hull| hull[0].0).collect();
    let mut left = share * total;
    for (curve, share) in curves.iter().zip(&shares) {
        left -= curve.weights as f64 * share;
    }
    assert!(left >= -1e-9 * total, "less than the fewest zeros");
    // Every step of every hull, cheapest zeros first; within a hull steps get dearer, so they stay in order.
    let mut steps: Vec<(f64, usize, f64, f64)> = Vec::new();
    for (at, hull) in hulls.iter().enumerate() {
        for pair in hull.windows(2) {
            let zeros = (pair[1].0 - pair[0].0) * curves[at].weights as f64;
            steps.push(((pair[1].1 - pair[0].1) / zeros, at, pair[0].0, pair[1].0));
        }
    }
    steps.sort_by(|a, b| {
        a.0.total_cmp(&b.0)
            .then(a.1.cmp(&b.1))
            .then(a.2.total_cmp(&b.2))
    });
    for (_, at, from, to) in steps {
        let zeros = (to - from) * curves[at].weights as f64;
        // The last step is taken in part.
        let taken = zeros.min(left.max(0.0));
        shares[at] += taken / curves[at].weights as f64;
        left -= taken;
    }
    assert!(left <= 1e-9 * total, "more than the most zeros");
    shares
}

/// The lower convex hull of points by rising share.
fn hull(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut hull: Vec<(f64, f64)> = Vec::new();
    for &point in points {
        while let [.., a, b] = hull[..] {
            let slope = |p: (f64, f64), q: (f64, f64)| (q.1 - p.1) / (q.0 - p.0);
            if slope(a, b) < slope(b, point) {
                break;
            }
            hull.pop();
        }
        hull.push(point);
    }
    assert!(!hull.is_empty(), "a curve has points");
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(weights: usize, errors: [f64; 3]) -> Curve {
        let points = [0.25, 0.5, 0.75].into_iter().zip(errors).collect();
        Curve { weights, points }
    }

    #[test]
    fn zeros_go_where_they_are_cheap_and_add_up() {
        let curves = [
            curve(100, [0.0, 0.1, 0.9]),
            curve(300, [0.0, 0.32, 0.4]),
            curve(100, [0.0, 0.4, 1.0]),
        ];
        let shares = allocate(&curves, 0.5);
        // 250 zeros are asked, 125 are there from the start. The second's next 75 cost more for each than the first's
        // next 25, but its next 150 cost less: its middle point is not on the hull, and it gets all 125.
        assert!(
            (shares[0] - 0.25).abs() < 1e-12 && (shares[2] - 0.25).abs() < 1e-12,
            "{shares:?}"
        );
        assert!(
            (shares[1] - (0.25 + 125.0 / 300.0)).abs() < 1e-12,
            "{shares:?}"
        );
        let zeros: f64 = shares
            .iter()
            .zip(&curves)
            .map(|(s, c)| s * c.weights as f64)
            .sum();
        assert!((zeros - 250.0).abs() < 1e-9, "{zeros}");
        assert_eq!(allocate(&curves, 0.75), [0.75; 3]);
        assert_eq!(allocate(&curves, 0.25), [0.25; 3]);
    }

    #[test]
    fn equal_linears_share_alike() {
        let curves = [curve(64, [0.1, 0.2, 0.4]), curve(64, [0.1, 0.2, 0.4])];
        assert_eq!(allocate(&curves, 0.5), [0.5, 0.5]);
    }
}
