//! Read-only file mappings: the only file of this crate with `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;

use memmap2::{Mmap, MmapMut, UncheckedAdvice};

/// Bytes copied at a time; a multiple of every page size.
const PIECE: usize = 64 << 20;

/// A file mapped into memory for reading, or a copy of it.
///
/// The file must not be changed or cut by another process while it is mapped: cutting it ends this
/// process with a bus error, and changing it changes the weights. `qbin` itself never writes into a
/// file that has its final name.
#[derive(Debug)]
pub(crate) struct Mapping {
    bytes: Mmap,
    /// Whether the pages are the file's own, so that the kernel can bring them in again.
    of_file: bool,
}

impl Mapping {
    /// Maps the whole of `file`.
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the mapping is read-only, and its bytes are only read as plain integers, for which
        // every value is valid. That nobody changes the file meanwhile cannot be proved from here;
        // it is the stated condition of this type, as for every reader by memory map.
        let bytes = unsafe { Mmap::map(file) }?;
        // Advice only, for what is not in the page cache yet: large pages of it are translated once where small ones
        // are five hundred times, and one core then reads a tenth faster.
        #[cfg(target_os = "linux")]
        bytes.advise(memmap2::Advice::HugePage).ok();
        Ok(Self {
            bytes,
            of_file: true,
        })
    }

    /// A copy in memory of its own, in huge pages where the system gives them. The mapped pages are let go on the way.
    pub(crate) fn in_huge_pages(&self) -> io::Result<Self> {
        let mut copy = MmapMut::map_anon(self.bytes.len())?;
        #[cfg(target_os = "linux")]
        // Advice only: with small pages the copy is as good as the file.
        copy.advise(memmap2::Advice::HugePage).ok();
        for (n, piece) in self.bytes.chunks(PIECE).enumerate() {
            let range = n * PIECE..n * PIECE + piece.len();
            copy[range.clone()].copy_from_slice(piece);
            self.release(range);
        }
        Ok(Self {
            bytes: copy.make_read_only()?,
            of_file: false,
        })
    }

    /// The file's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Lets the kernel take back the pages of this byte range; the next read brings them in again.
    pub(crate) fn release(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.bytes.len());
        if range.is_empty() || !self.of_file {
            return;
        }
        // SAFETY: `DontNeed` may discard changes of private or anonymous pages; this mapping is a
        // shared one of a file and nobody writes through it, so a later read sees the same bytes.
        // The range lies inside the mapping (asserted above).
        let advised = unsafe {
            self.bytes
                .unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
        };
        // Advice only: where the kernel does not take it, the pages merely stay.
        advised.ok();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn released_pages_keep_their_contents() {
        let mut file = tempfile::tempfile().expect("temp file");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        file.write_all(&bytes).expect("write");
        let mapping = Mapping::new(&file).expect("map");
        assert_eq!(mapping.bytes(), bytes);
        mapping.release(5_000..90_001);
        mapping.release(7..7);
        assert_eq!(mapping.bytes(), bytes);
    }

    #[test]
    fn a_copy_is_the_file_and_is_never_taken_back() {
        let mut file = tempfile::tempfile().expect("temp file");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        file.write_all(&bytes).expect("write");
        let copy = Mapping::new(&file).expect("map").in_huge_pages();
        let copy = copy.expect("memory for a copy");
        copy.release(0..100_000);
        assert_eq!(copy.bytes(), bytes);
    }
}
