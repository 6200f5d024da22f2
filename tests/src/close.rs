//! Comparators of float slices. They check lengths first and fail on NaN and on infinities.

/// Asserts `|actual − expected| ≤ tol` for every element; `tol` is absolute, `what` names the values.
///
/// # Panics
/// If the lengths differ, an element of either side is not finite, or one is too far off.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f32], tol: f64, what: &str) {
    if let Err(text) = check(actual, expected, tol, what) {
        panic!("{text}");
    }
}

/// Asserts `|actual − expected| ≤ rel_of_max · max|expected|` for every element.
///
/// # Panics
/// If the lengths differ, an element of either side is not finite, or one is too far off.
#[track_caller]
pub fn assert_max_rel(actual: &[f32], expected: &[f32], rel_of_max: f64, what: &str) {
    if let Err(text) = check_max_rel(actual, expected, rel_of_max, what) {
        panic!("{text}");
    }
}

fn check_max_rel(
    actual: &[f32],
    expected: &[f32],
    rel_of_max: f64,
    what: &str,
) -> Result<(), String> {
    let max = expected
        .iter()
        .fold(0.0_f64, |max, &e| max.max(f64::from(e).abs()));
    check(actual, expected, rel_of_max * max, what)
}

/// The first reason why `actual` is not within `tol` of `expected`.
fn check(actual: &[f32], expected: &[f32], tol: f64, what: &str) -> Result<(), String> {
    if actual.len() != expected.len() {
        return Err(format!(
            "{what}: expected {} values, got {}",
            expected.len(),
            actual.len()
        ));
    }
    let mut worst = (0.0, 0);
    for (at, (&a, &e)) in actual.iter().zip(expected).enumerate() {
        // An infinity would make every difference acceptable once it enters a tolerance.
        if !(a.is_finite() && e.is_finite()) {
            return Err(format!("{what}: expected {e} at {at}, got {a}"));
        }
        let difference = (f64::from(a) - f64::from(e)).abs();
        if difference > worst.0 {
            worst = (difference, at);
        }
    }
    let (difference, at) = worst;
    if difference <= tol {
        return Ok(());
    }
    Err(format!(
        "{what}: off by {difference:e} at {at}, more than {tol:e}: expected {}, got {}",
        expected[at], actual[at]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both comparators on the same slices, with a tolerance of 0.1 (the largest expected value is 1).
    fn both(actual: &[f32], expected: &[f32]) -> [bool; 2] {
        [
            check(actual, expected, 0.1, "x").is_ok(),
            check_max_rel(actual, expected, 0.1, "x").is_ok(),
        ]
    }

    #[test]
    fn accepts_within_the_tolerance_and_refuses_beyond() {
        assert_eq!(both(&[1.0, -0.5], &[1.0, -0.5]), [true; 2]);
        assert_eq!(both(&[1.09, -0.41], &[1.0, -0.5]), [true; 2]);
        assert_eq!(both(&[1.0, -0.39], &[1.0, -0.5]), [false; 2]);
        assert_eq!(both(&[0.89, -0.5], &[1.0, -0.5]), [false; 2]);
        assert_eq!(both(&[], &[]), [true; 2]);
    }

    #[test]
    fn the_relative_tolerance_follows_the_largest_magnitude() {
        assert!(check_max_rel(&[0.5, -100.0], &[0.0, -100.0], 0.01, "x").is_ok());
        assert!(check_max_rel(&[0.5, -10.0], &[0.0, -10.0], 0.01, "x").is_err());
        assert!(check_max_rel(&[1e-30], &[0.0], 0.01, "x").is_err());
    }

    #[test]
    fn refuses_nan_and_infinity_on_either_side() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(
                both(&[bad, 1.0], &[0.0, 1.0]),
                [false; 2],
                "{bad} in actual"
            );
            assert_eq!(
                both(&[0.0, 1.0], &[bad, 1.0]),
                [false; 2],
                "{bad} in expected"
            );
            assert_eq!(both(&[bad, 1.0], &[bad, 1.0]), [false; 2], "{bad} in both");
        }
    }

    #[test]
    fn refuses_a_tolerance_that_is_no_number() {
        assert!(check(&[1.0], &[1.0], f64::NAN, "x").is_err());
        assert!(check_max_rel(&[1.0], &[1.0], f64::NAN, "x").is_err());
    }

    #[test]
    fn refuses_other_lengths() {
        assert_eq!(both(&[1.0], &[1.0, 1.0]), [false; 2]);
        assert_eq!(both(&[1.0, 1.0], &[1.0]), [false; 2]);
        assert_eq!(both(&[], &[1.0]), [false; 2]);
    }

    #[test]
    fn says_where_and_how_far() {
        let text = check(&[1.0, 2.0, 3.5], &[1.0, 2.0, 3.0], 0.25, "logits").unwrap_err();
        assert_eq!(
            text,
            "logits: off by 5e-1 at 2, more than 2.5e-1: expected 3, got 3.5"
        );
    }
}
