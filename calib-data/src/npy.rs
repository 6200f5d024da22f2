//! Token ids in NumPy's `.npy` format, `[rows, tokens]`, used as they are.
//!
//! The reader is our own: the format is a line of text before plain integers, and no number of it is
//! used before it is checked against the file.
//!
//! # Source
//! NumPy Enhancement Proposal 1, `numpy.lib.format`, versions 1.0, 2.0 and 3.0.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::path::{display, file_name, origin, read_error};
use crate::window::{WindowSpec, Windows, hex};

/// The first `spec.windows` rows of the files together.
pub(crate) fn load(paths: &[PathBuf], spec: &WindowSpec) -> Result<Windows> {
    let (mut ids, mut files) = (Vec::new(), Vec::new());
    for path in paths {
        let bytes = std::fs::read(path).map_err(|error| read_error(path, error))?;
        let array = Array::parse(&bytes)
            .and_then(|array| array.check_size().map(|()| array))
            .map_err(|fault| Error::Npy {
                file: display(path),
                fault,
            })?;
        if array.tokens != spec.tokens {
            return Err(Error::NpyTokens {
                file: display(path),
                expected: spec.tokens,
                got: array.tokens,
            });
        }
        let missing = spec.windows - ids.len() / spec.tokens;
        read_rows(&array, array.rows.min(missing), path, &mut ids)?;
        files.push((file_name(path), hex(Sha256::new_with_prefix(&bytes))));
    }
    let available = ids.len() / spec.tokens;
    if available < spec.windows {
        return Err(Error::TooShort {
            origin: origin(paths),
            wanted: spec.windows,
            tokens: spec.tokens,
            available,
            found: ids.len(),
        });
    }
    let mut windows =
        Windows::from_ids(ids, spec.tokens, format!("token ids of {}", origin(paths)));
    windows.files = files;
    Ok(windows)
}

fn read_rows(array: &Array<'_>, rows: usize, path: &Path, ids: &mut Vec<u32>) -> Result<()> {
    for (at, item) in array.data.chunks_exact(array.dtype.bytes()).enumerate() {
        if at == rows * array.tokens {
            break;
        }
        let value = array.dtype.value(item);
        let id = u32::try_from(value).map_err(|_| Error::Npy {
            file: display(path),
            fault: format!("{value} in row {} is no token id", at / array.tokens),
        })?;
        ids.push(id);
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dtype {
    I32,
    I64,
    U32,
}

impl Dtype {
    fn bytes(self) -> usize {
        match self {
            Self::I32 | Self::U32 => 4,
            Self::I64 => 8,
        }
    }

    /// One little-endian item.
    fn value(self, item: &[u8]) -> i64 {
        let low = u32::from_le_bytes([item[0], item[1], item[2], item[3]]);
        match self {
            Self::I32 => i64::from(low as i32),
            Self::U32 => i64::from(low),
            Self::I64 => {
                let high = u32::from_le_bytes([item[4], item[5], item[6], item[7]]);
                i64::from(low) | i64::from(high as i32) << 32
            }
        }
    }
}

/// A parsed file: its header and what follows it.
#[derive(Debug)]
struct Array<'a> {
    dtype: Dtype,
    rows: usize,
    tokens: usize,
    data: &'a [u8],
}

impl<'a> Array<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        let (header, data) = split(bytes)?;
        let dtype = match string(value_of(header, "descr")?) {
            Some("<i4") => Dtype::I32,
            Some("<i8") => Dtype::I64,
            Some("<u4") => Dtype::U32,
            other => {
                let got = other.unwrap_or("no plain type");
                return Err(format!(
                    "the type is `{got}`, expected `<i4`, `<i8` or `<u4`"
                ));
            }
        };
        if !value_of(header, "fortran_order")?.starts_with("False") {
            return Err("the array is in Fortran order, expected C order".to_owned());
        }
        let shape = value_of(header, "shape")?;
        let [rows, tokens] = dimensions(shape)
            .ok_or_else(|| format!("the shape is `{shape}`, expected `(windows, tokens)`"))?;
        Ok(Self {
            dtype,
            rows,
            tokens,
            data,
        })
    }

    /// The header's shape against the bytes that are really there.
    fn check_size(&self) -> Result<(), String> {
        let &Self {
            rows,
            tokens,
            dtype,
            data,
        } = self;
        let items = rows
            .checked_mul(tokens)
            .and_then(|items| items.checked_mul(dtype.bytes()));
        if items == Some(data.len()) {
            return Ok(());
        }
        Err(format!(
            "{} bytes after the header, expected {rows} × {tokens} × {} bytes",
            data.len(),
            dtype.bytes()
        ))
    }
}

const CUT: &str = "the file ends within its header";

/// Header text and data.
fn split(bytes: &[u8]) -> Result<(&str, &[u8]), String> {
    let rest = bytes
        .strip_prefix(b"\x93NUMPY")
        .ok_or("the magic `\\x93NUMPY` is missing")?;
    let (version, rest) = rest.split_at_checked(2).ok_or(CUT)?;
    let length_bytes = match version {
        [1, 0] => 2,
        [2 | 3, 0] => 4,
        _ => {
            let (major, minor) = (version[0], version[1]);
            return Err(format!(
                "format version {major}.{minor}, expected 1.0, 2.0 or 3.0"
            ));
        }
    };
    let (length, rest) = rest.split_at_checked(length_bytes).ok_or(CUT)?;
    let length = length
        .iter()
        .rev()
        .fold(0, |length, &byte| length << 8 | usize::from(byte));
    let (header, data) = rest.split_at_checked(length).ok_or_else(|| {
        format!(
            "the header is {length} bytes long, but only {} bytes follow",
            rest.len()
        )
    })?;
    Ok((
        str::from_utf8(header).map_err(|_| "the header is not text")?,
        data,
    ))
}

/// What follows `'key':` in the header, up to the end of that value.
fn value_of<'a>(header: &'a str, key: &str) -> Result<&'a str, String> {
    let missing = || format!("the header has no `{key}`");
    let after = header
        .split_once(&format!("'{key}'"))
        .ok_or_else(missing)?
        .1
        .trim_start();
    let value = after.strip_prefix(':').ok_or_else(missing)?.trim_start();
    let end = if value.starts_with('(') {
        value.find(')').map(|at| at + 1)
    } else {
        value.find([',', '}'])
    };
    Ok(value[..end.ok_or_else(missing)?].trim_end())
}

fn string(value: &str) -> Option<&str> {
    value.strip_prefix('\'')?.strip_suffix('\'')
}

/// Two positive dimensions.
fn dimensions(shape: &str) -> Option<[usize; 2]> {
    let (rows, tokens) = shape
        .strip_prefix('(')?
        .strip_suffix(')')?
        .split_once(',')?;
    let dimension = |text: &str| text.trim().parse().ok().filter(|&n: &usize| n > 0);
    Some([dimension(rows)?, dimension(tokens)?])
}

#[cfg(test)]
mod tests {
    use super::load;
    use crate::testing::{file, says};
    use crate::window::{WindowSpec, Windows};
    use proptest::prelude::*;

    fn npy(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY".to_vec();
        bytes.extend([version, 0]);
        let length = header.len() as u32;
        bytes.extend(&length.to_le_bytes()[..if version == 1 { 2 } else { 4 }]);
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn header(descr: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}   \n")
    }

    fn data(ids: std::ops::Range<i32>) -> Vec<u8> {
        ids.flat_map(i32::to_le_bytes).collect()
    }

    fn read(bytes: &[u8], windows: usize, tokens: usize) -> crate::Result<Windows> {
        let (_folder, path) = file("ids.npy", bytes);
        load(
            &[path],
            &WindowSpec {
                windows,
                tokens,
                seed: 0,
            },
        )
    }

    #[test]
    fn the_first_rows_as_they_are() {
        let bytes = npy(1, &header("<i4", "(3, 4)"), &data(0..12));
        let windows = read(&bytes, 2, 4).unwrap();
        assert_eq!(windows.ids(), (0..8).collect::<Vec<_>>());
        assert_eq!(windows.source, "token ids of `ids.npy`");
        assert_eq!(windows.files[0].0, "ids.npy");
        assert_eq!(windows.files[0].1.len(), 64);
    }

    #[test]
    fn all_integer_types_and_versions() {
        let wide: Vec<u8> = [5_i64, 70_000]
            .iter()
            .flat_map(|id| id.to_le_bytes())
            .collect();
        let unsigned: Vec<u8> = [5_u32, 3_000_000_000]
            .iter()
            .flat_map(|id| id.to_le_bytes())
            .collect();
        let read = |bytes: &[u8]| read(bytes, 1, 2).unwrap().ids().to_vec();
        assert_eq!(read(&npy(2, &header("<i8", "(1, 2)"), &wide)), [5, 70_000]);
        assert_eq!(
            read(&npy(3, &header("<u4", "(1,2)"), &unsigned)),
            [5, 3_000_000_000]
        );
        // Keys in another order.
        let swapped = "{'shape': (1, 2), 'fortran_order': False, 'descr': '<i4'}";
        assert_eq!(read(&npy(1, swapped, &data(8..10))), [8, 9]);
    }

    #[test]
    fn files_are_taken_one_after_another() {
        let (_a, first) = file("a.npy", npy(1, &header("<i4", "(2, 2)"), &data(0..4)));
        let (_b, second) = file("b.npy", npy(1, &header("<i4", "(2, 2)"), &data(4..8)));
        let paths = [first, second];
        let windows = |windows| {
            load(
                &paths,
                &WindowSpec {
                    windows,
                    tokens: 2,
                    seed: 0,
                },
            )
        };
        assert_eq!(windows(3).unwrap().ids(), [0, 1, 2, 3, 4, 5]);
        says(
            windows(5),
            &[
                "asked for 5 windows of 2 tokens",
                "there are 4",
                "`a.npy` and 1 more",
            ],
        );
    }

    #[test]
    fn bad_files_say_what_is_expected() {
        let check = |bytes: &[u8], words: &[&str]| says(read(bytes, 1, 4), words);
        let plain = header("<i4", "(3, 4)");
        check(b"", &["`", "ids.npy`", "magic"]);
        check(b"\x93NUMPY\x01\x00\x10", &["ends within its header"]);
        check(&npy(4, &plain, &[]), &["version 4.0", "expected 1.0"]);
        check(
            &npy(1, &plain, &data(0..11)),
            &["44 bytes", "3 × 4 × 4 bytes"],
        );
        check(&npy(1, &plain, &data(0..13)), &["52 bytes"]);
        check(
            &npy(1, &header("<f4", "(3, 4)"), &data(0..12)),
            &["`<f4`", "`<i4`", "int32"],
        );
        check(
            &npy(1, &header("<i4", "(12,)"), &data(0..12)),
            &["shape", "`(12,)`"],
        );
        check(
            &npy(1, &header("<i4", "(0, 4)"), &[]),
            &["shape", "`(0, 4)`"],
        );
        let huge = format!("({}, 16)", usize::MAX / 16 + 1);
        check(
            &npy(1, &header("<i4", &huge), &[]),
            &["0 bytes after the header"],
        );
        check(
            &npy(1, &plain.replace("False", "True"), &data(0..12)),
            &["Fortran"],
        );
        check(
            &npy(1, &plain.replace("descr", "d"), &data(0..12)),
            &["no `descr`"],
        );
        check(
            &npy(1, &plain, &data(-1..11)),
            &["-1 in row 0 is no token id"],
        );
        for id in [1_i64 << 32, -1, i64::MIN] {
            let wide = [3, id].map(i64::to_le_bytes).concat();
            let bytes = npy(1, &header("<i8", "(2, 1)"), &wide);
            says(
                read(&bytes, 2, 1),
                &[&format!("{id} in row 1 is no token id")],
            );
        }
        let mut cut = npy(1, &plain, &[]);
        cut.truncate(40);
        check(&cut, &["only 30 bytes follow"]);
        let five = npy(1, &header("<i4", "(3, 5)"), &data(0..15));
        check(
            &five,
            &[
                "windows of 5 tokens",
                "expected 4 tokens",
                "ask for windows of 5",
            ],
        );
    }

    proptest! {
        #![proptest_config(crate::testing::seeded())]

        #[test]
        fn damaged_files_never_panic(at in 0usize..130, byte: u8, cut in 0usize..130) {
            let mut bytes = npy(1, &header("<i4", "(3, 4)"), &data(0..12));
            let at = at % bytes.len();
            bytes[at] = byte;
            let cut = bytes.len() - cut % bytes.len();
            // Damage may hit an id or blanks and leave a good file: then it is read whole.
            if let Ok(windows) = read(&bytes[..cut], 3, 4) {
                prop_assert_eq!((windows.windows(), cut), (3, bytes.len()));
            }
        }
    }
}
