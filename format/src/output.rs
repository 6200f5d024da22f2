//! A file under construction: reserved, written in any order, and named only when it is whole.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};
use rustix::io::Errno;

use crate::FormatError;

/// Bytes moved at a time when data is shifted.
const CHUNK: u64 = 1 << 20;

/// A temporary file `<target>.partial`, removed again unless it is committed.
#[derive(Debug)]
pub(crate) struct Output {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl Output {
    /// Creates the temporary file of `bytes` zeros, with the space for them reserved.
    pub(crate) fn create(target: &Path, bytes: u64) -> Result<Self, FormatError> {
        if target.is_dir() || target.file_name().is_none() {
            return Err(FormatError::OutputIsFolder {
                path: target.to_owned(),
            });
        }
        let temporary = partial_path(target);
        let file = create_locked(target, &temporary)?;
        let output = Self {
            file,
            temporary,
            target: target.to_owned(),
            committed: false,
        };
        output.set_len(0)?;
        output.reserve(bytes)?;
        Ok(output)
    }

    /// Makes the file at least `bytes` long and reserves the space, so that it cannot run out later.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<(), FormatError> {
        // First a look at what is free: some file systems would fill the whole disk before they find
        // that it is not enough, and so make other programs fail meanwhile.
        let free = self.free_bytes()?;
        if free < bytes {
            return Err(self.no_space(bytes, free));
        }
        match fallocate(&self.file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => Ok(()),
            Err(Errno::NOSPC | Errno::DQUOT) => Err(self.no_space(bytes, self.free_bytes()?)),
            // Some file systems cannot reserve.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.set_len(bytes),
            Err(error) => Err(self.failed("reserve space for")(error.into())),
        }
    }

    fn no_space(&self, needed: u64, free: u64) -> FormatError {
        FormatError::NoSpace {
            path: self.target.clone(),
            needed,
            free,
        }
    }

    /// Bytes this file can have: the free ones, and those it has already.
    fn free_bytes(&self) -> Result<u64, FormatError> {
        let stat = fstatvfs(&self.file)
            .map_err(|error| self.failed("ask the free space of")(error.into()))?;
        // Zero blocks in all is how a file system says that it does not count them.
        if stat.f_blocks == 0 {
            return Ok(u64::MAX);
        }
        let ours = self.file.metadata().map_err(self.failed("open"))?.blocks();
        Ok((stat.f_bavail.saturating_mul(stat.f_frsize)).saturating_add(512 * ours))
    }

    /// Cuts the file, or makes it longer.
    pub(crate) fn set_len(&self, bytes: u64) -> Result<(), FormatError> {
        self.file.set_len(bytes).map_err(self.failed("resize"))
    }

    /// Writes `bytes` from byte `at` of the file.
    pub(crate) fn write_at(&self, at: u64, bytes: &[u8]) -> Result<(), FormatError> {
        self.file
            .write_all_at(bytes, at)
            .map_err(self.failed("write"))
    }

    /// Moves everything from byte `from` on by `by` bytes towards the end, making the file longer.
    pub(crate) fn shift(&self, from: u64, len: u64, by: u64) -> Result<(), FormatError> {
        self.reserve(from + len + by)?;
        let mut buffer = vec![0; CHUNK.min(len) as usize];
        let mut end = from + len;
        while end > from {
            let chunk = CHUNK.min(end - from);
            end -= chunk;
            let buffer = &mut buffer[..chunk as usize];
            self.read_at(end, buffer)?;
            self.write_at(end + by, buffer)?;
        }
        Ok(())
    }

    /// Moves `len` bytes from byte `from` to byte `to`, nearer to the start.
    pub(crate) fn move_down(&self, from: u64, to: u64, len: u64) -> Result<(), FormatError> {
        let mut buffer = vec![0; CHUNK.min(len) as usize];
        let mut done = 0;
        while done < len {
            let buffer = &mut buffer[..CHUNK.min(len - done) as usize];
            self.read_at(from + done, buffer)?;
            self.write_at(to + done, buffer)?;
            done += buffer.len() as u64;
        }
        Ok(())
    }

    /// Reads bytes written before.
    pub(crate) fn read_at(&self, at: u64, buffer: &mut [u8]) -> Result<(), FormatError> {
        self.file
            .read_exact_at(buffer, at)
            .map_err(self.failed("read"))
    }

    /// Brings everything to the disk, and lets the page cache forget it, so that what is read back
    /// afterwards comes from the disk.
    pub(crate) fn sync(&self) -> Result<(), FormatError> {
        self.file.sync_all().map_err(self.failed("sync"))?;
        // Advice only: where it is not taken, the check reads from memory.
        #[cfg(not(target_vendor = "apple"))]
        rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed).ok();
        Ok(())
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Where the file is until it is committed.
    pub(crate) fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Gives the file its final name, on the disk too. What had this name before is replaced.
    pub(crate) fn commit(mut self) -> Result<(), FormatError> {
        fs::rename(&self.temporary, &self.target)
            .map_err(FormatError::io("write", &self.target))?;
        self.committed = true;
        let folder = folder_of(&self.target);
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(FormatError::io("sync", folder))
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> FormatError {
        FormatError::io(action, &self.temporary)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing is left to be told about it; a file that stays is overwritten by the next run.
            fs::remove_file(&self.temporary).ok();
        }
    }
}

/// Opens the temporary file so that no other run of ours has it; one left by a crash is taken over.
fn create_locked(target: &Path, temporary: &Path) -> Result<File, FormatError> {
    let failed = FormatError::io;
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(temporary)
            .map_err(failed("create", temporary))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(FormatError::OutputBusy {
                    path: target.to_owned(),
                });
            }
            // A file system without locks: two runs at once are then the user's to avoid.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(failed("lock", temporary)(error)),
        }
        // Between opening and locking, another run may have given this very file its final name.
        let ours = file.metadata().map_err(failed("open", temporary))?;
        if identity(temporary) == Some((ours.dev(), ours.ino())) {
            return Ok(file);
        }
    }
}

fn partial_path(target: &Path) -> PathBuf {
    let mut name = OsString::from(target);
    name.push(".partial");
    name.into()
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Device and inode; `None` if there is no such file.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Checks that writing `out` would not destroy one of the inputs, under whatever name or link.
///
/// # Errors
/// [`FormatError::OutputIsInput`] if `out`, or the temporary file beside it, is one of `inputs`.
pub fn check_output<'a>(
    out: &Path,
    inputs: impl Iterator<Item = &'a Path>,
) -> Result<(), FormatError> {
    let partial = partial_path(out);
    let written = [identity(out), identity(&partial)];
    for input in inputs {
        let same = identity(input).is_some_and(|input| written.contains(&Some(input)));
        if same || input == out || input == partial {
            return Err(FormatError::OutputIsInput {
                out: out.to_owned(),
                input: input.to_owned(),
            });
        }
    }
    Ok(())
}
