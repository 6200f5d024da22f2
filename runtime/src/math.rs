//! Elementary functions and reductions, written so that they run on vectors.

/// 1.5 · 2²³: adding and subtracting it rounds a number below 2²² to an integer.
const TO_INTEGER: f32 = 12_582_912.0;

/// `e^x` with a relative error of at most 2⁻²² for x from −87.33 to 88.37, and the value at the nearer end
/// beyond that: the smallest normal number below, almost the largest finite one above. NaN stays NaN.
///
/// Cody and Waite's reduction `x = n·ln 2 + r` and a polynomial of degree 6 in `r`; the library's function is a call
/// for each element.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.33, 88.37);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, TO_INTEGER);
    let n = shifted - TO_INTEGER;
    // ln 2 in two parts, the first with so few bits that its product with n is exact.
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let fraction = p.mul_add(r * r, r) + 1.0;
    // The low bits of `shifted` hold n in two's complement.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    fraction * power
}

/// Accumulators of a reduction; fixed, because the order of additions is part of the result.
const LANES: usize = 16;

/// The largest of `values`; −∞ if there are none. NaNs are passed over.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let (chunks, tail) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    // By halves: a chain of sixteen comparisons is long beside a short row.
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            let other = lanes[lane + half];
            lanes[lane] = if other > lanes[lane] {
                other
            } else {
                lanes[lane]
            };
        }
        half /= 2;
    }
    let rest = tail.iter();
    rest.fold(lanes[0], |m, &v| if v > m { v } else { m })
}

/// The sum of `term(x)` over `values`.
#[inline(always)]
pub(crate) fn sum(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let (chunks, tail) = values.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += term(value);
        }
    }
    lanes.iter().sum::<f32>() + tail.iter().map(|&value| term(value)).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_exact_function() {
        for step in -87_000..88_000 {
            let x = step as f32 * 1e-3 + 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs();
            assert!(
                error <= exact * 2f64.powi(-22),
                "{x}: {error:e} of {exact:e}"
            );
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1.3e-38 && exp(-1000.0) < 1.3e-38);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_see_every_element() {
        for len in [0, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..len).map(|i| ((i * 7) % 31) as f32 - 40.0).collect();
            assert_eq!(
                sum(&values, |x| 2.0 * x),
                2.0 * values.iter().sum::<f32>(),
                "{len}"
            );
            let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&values), largest, "{len}");
            for at in 0..len {
                let mut values = values.clone();
                values[at] = 1.0;
                assert_eq!(max(&values), 1.0, "{at} of {len}");
            }
        }
    }
}
