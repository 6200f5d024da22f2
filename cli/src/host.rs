//! What Linux says of this machine and of this process. Elsewhere, and where it says nothing, things are unknown.

use serde::Serialize;
use std::fs::read_to_string;

/// The machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Host {
    /// The CPU's own name.
    pub(crate) cpu: Option<String>,
    /// CPUs that this process may use.
    pub(crate) cpus: usize,
    /// The first CPU's caches, nearest first, without those for instructions only.
    pub(crate) caches: Vec<Cache>,
    /// Memory of the machine.
    pub(crate) memory_bytes: Option<u64>,
}

/// A cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Cache {
    pub(crate) level: u8,
    pub(crate) bytes: usize,
}

impl Host {
    /// This machine.
    pub(crate) fn read() -> Self {
        let file = |name: &str| read_to_string(name).ok();
        let mut caches: Vec<Cache> = (0..8)
            .filter_map(|index| {
                let folder = format!("/sys/devices/system/cpu/cpu0/cache/index{index}");
                let field = |name: &str| file(&format!("{folder}/{name}"));
                cache(&field("level")?, &field("type")?, &field("size")?)
            })
            .collect();
        caches.sort_by_key(|cache| cache.level);
        Self {
            cpu: file("/proc/cpuinfo")
                .and_then(|text| field(&text, "model name").map(str::to_owned)),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            caches,
            memory_bytes: file("/proc/meminfo").and_then(|text| kib_field(&text, "MemTotal")),
        }
    }

    /// Size of the last cache, 0 where it is not known.
    pub(crate) fn last_cache_bytes(&self) -> usize {
        self.caches.last().map_or(0, |cache| cache.bytes)
    }
}

/// Memory that could be taken without swapping.
pub(crate) fn available_bytes() -> Option<u64> {
    kib_field(&read_to_string("/proc/meminfo").ok()?, "MemAvailable")
}

/// Memory of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Resident {
    /// Largest resident set so far.
    pub(crate) peak_bytes: Option<u64>,
    /// Resident now: memory of its own.
    pub(crate) anonymous_bytes: Option<u64>,
    /// Resident now: pages of mapped files.
    pub(crate) file_bytes: Option<u64>,
}

impl Resident {
    /// As it is now.
    pub(crate) fn read() -> Self {
        read_to_string("/proc/self/status")
            .map_or_else(|_| Self::default(), |text| Self::parse(&text))
    }

    fn parse(status: &str) -> Self {
        Self {
            peak_bytes: kib_field(status, "VmHWM"),
            anonymous_bytes: kib_field(status, "RssAnon"),
            file_bytes: kib_field(status, "RssFile"),
        }
    }
}

/// The value of the first line `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    let mut values = pairs.filter(|(key, _)| key.trim() == name);
    Some(values.next()?.1.trim())
}

/// The bytes of a line `name: value kB`.
fn kib_field(text: &str, name: &str) -> Option<u64> {
    kib(field(text, name)?.strip_suffix("kB")?)
}

fn kib(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A cache from its three files; none for instructions, or where a file says something else.
fn cache(level: &str, kind: &str, size: &str) -> Option<Cache> {
    if kind.trim() == "Instruction" {
        return None;
    }
    Some(Cache {
        level: level.trim().parse().ok()?,
        bytes: usize::try_from(kib(size.trim().strip_suffix('K')?)?).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "model\t\t: 17\nmodel name\t: AMD EPYC\nmodel name\t: other\nVmHWM:\t   12 kB\nRssFile: x kB\n";
        assert_eq!(field(text, "model name"), Some("AMD EPYC"));
        assert_eq!(field(text, "name"), None);
        let resident = Resident::parse(text);
        assert_eq!(resident.peak_bytes, Some(12 * 1024));
        assert_eq!(
            (resident.file_bytes, resident.anonymous_bytes),
            (None, None)
        );
    }

    #[test]
    fn caches_for_instructions_do_not_count() {
        let expected = Cache {
            level: 2,
            bytes: 1 << 20,
        };
        assert_eq!(cache("2\n", "Unified\n", "1024K\n"), Some(expected));
        assert_eq!(cache("1\n", "Instruction\n", "32K\n"), None);
        assert_eq!(cache("1\n", "Data\n", "32\n"), None);
    }
}
