//! Looking through large slices.

use rayon::prelude::*;

/// Values looked through by one task.
const CHUNK: usize = 1 << 16;

/// The first place where `found` holds.
pub(crate) fn position(values: &[f32], found: impl Fn(f32) -> bool + Sync) -> Option<usize> {
    // Without an early exit inside a chunk, so that it runs on vectors.
    let any = |chunk: &[f32]| chunk.iter().fold(false, |any, &v| any | found(v));
    let start = CHUNK * values.par_chunks(CHUNK).position_first(any)?;
    values[start..]
        .iter()
        .position(|&v| found(v))
        .map(|at| start + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_several_is_found() {
        let mut values = vec![1f32; 3 * CHUNK + 5];
        assert_eq!(position(&values, f32::is_nan), None);
        for at in [values.len() - 1, 2 * CHUNK, CHUNK + 7, CHUNK - 1, 0] {
            values[at] = f32::NAN;
            assert_eq!(position(&values, f32::is_nan), Some(at));
        }
        assert_eq!(position(&[], f32::is_nan), None);
    }
}
