//! Fetching ahead what is read next.

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Rows of a part of a matrix that are fetched before they are written.
pub(super) const AHEAD: usize = 4;

/// Starts to bring `values` into the second cache; a hint only.
#[inline(always)]
pub(super) fn fetch<T>(values: &[T]) {
    for line in values.chunks((LINE / size_of::<T>()).max(1)) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: a prefetch changes nothing, whatever its address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

/// Starts to bring a line to be written, with `value` on it, into the first cache; a hint only.
#[inline(always)]
pub(super) fn fetch_near<T>(value: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch changes nothing, whatever its address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(value.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}
