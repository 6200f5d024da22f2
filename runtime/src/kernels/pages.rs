//! Memory in large pages.

/// Bytes of a large page; where a system has another size, its advice is about whole pages of that all the same.
const LARGE: usize = 2 << 20;

/// Zeros, in large pages where the system gives them: for matrices of many megabytes, which are five hundred times fewer
/// pages then. A small page costs about a microsecond when it is first touched, as long as it takes to fill it.
pub fn zeros<T: Copy + Default>(len: usize) -> Vec<T> {
    let mut values = vec![T::default(); len];
    advise(&mut values);
    values
}

/// Asks for large pages, as far as `values` fills them and has not been touched.
fn advise<T>(values: &mut [T]) {
    let start = values.as_mut_ptr();
    let skipped = start.align_offset(LARGE).saturating_mul(size_of::<T>());
    let whole = size_of_val(values).saturating_sub(skipped) / LARGE * LARGE;
    if whole == 0 {
        return;
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::mm::{Advice, madvise};
        // SAFETY: the range lies inside `values`, and this advice changes nothing of what memory holds.
        let advised = unsafe {
            let start = start.cast::<u8>().add(skipped);
            madvise(start.cast(), whole, Advice::LinuxHugepage)
        };
        // Advice only: small pages hold the same.
        advised.ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_of_every_size_can_be_written() {
        let page = LARGE / size_of::<f64>();
        for len in [0, 1, page - 1, page, 2 * page + 3, 3 * page + 1] {
            let mut values = zeros::<f64>(len);
            assert_eq!(values, vec![0.0; len]);
            values.fill(1.5);
            assert_eq!(values, vec![1.5; len]);
        }
    }
}
