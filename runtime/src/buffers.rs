//! Memory for values that are overwritten as a whole each time: taken from the system and zeroed once, then kept.
//!
//! A fresh vector of some MiB costs a page fault for every 4 KiB of it, and zeros that nobody reads. And it begins
//! anywhere: a buffer's values begin with a cache line, so that a vector of 16 values is written to one line and not to
//! parts of two.

use crate::kernels::pages;
use std::cell::Cell;

/// Bytes of a cache line.
const LINE: usize = 64;
/// Values on it.
const VALUES: usize = LINE / size_of::<f32>();

/// A buffer that grows as needed.
#[derive(Debug, Default)]
pub(crate) struct Buffer(Vec<f32>);

impl Buffer {
    /// `len` values, whatever they were before, from the beginning of a cache line on.
    pub(crate) fn get(&mut self, len: usize) -> &mut [f32] {
        if self.0.len() < len + VALUES {
            self.0 = pages::zeros(len + VALUES);
        }
        let start = self.start();
        &mut self.0[start..start + len]
    }

    /// The first `len` values.
    pub(crate) fn into_vec(mut self, len: usize) -> Vec<f32> {
        self.0.drain(..self.start());
        self.0.truncate(len);
        self.0
    }

    /// Values before the first line.
    fn start(&self) -> usize {
        match self.0.as_ptr().align_offset(LINE) {
            start @ ..VALUES if !self.0.is_empty() => start,
            // Where it cannot be told, only speed is lost.
            _ => 0,
        }
    }
}

thread_local! {
    static OWN: Cell<Buffer> = Cell::default();
}

/// Calls `work` with `len` values of this thread's own buffer, whatever they were before.
pub(crate) fn with_own<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    OWN.with(|own| {
        // Taken out meanwhile, so that `work` may ask for another one.
        let mut buffer = own.take();
        let result = work(buffer.get(len));
        own.set(buffer);
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_keeps_its_memory_and_grows() {
        let mut buffer = Buffer::default();
        buffer.get(6).fill(1.0);
        let before = buffer.get(4).as_ptr();
        assert_eq!(buffer.get(6), [1.0; 6]);
        assert_eq!(buffer.get(6).as_ptr(), before);
        assert_eq!(buffer.get(9).len(), 9);
        buffer
            .get(9)
            .iter_mut()
            .zip(1_u8..)
            .for_each(|(value, i)| *value = i.into());
        assert_eq!(buffer.into_vec(3), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn values_begin_with_a_cache_line() {
        // One after the other, so that at most one is there by chance.
        let mut buffers = [(); 5].map(|()| Buffer::default());
        for (len, buffer) in (1..).zip(&mut buffers) {
            assert!(buffer.get(len).as_ptr().addr().is_multiple_of(LINE));
        }
        assert!(Buffer::default().into_vec(0).is_empty());
    }

    #[test]
    fn a_threads_buffer_is_kept_and_never_given_out_twice() {
        with_own(3, |outer| {
            outer.fill(1.0);
            with_own(3, |inner| inner.fill(2.0));
            assert_eq!(outer, [1.0; 3]);
        });
        with_own(2, |again| assert_eq!(again, [1.0; 2]));
    }
}
