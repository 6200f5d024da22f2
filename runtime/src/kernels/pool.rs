//! The threads of a forward pass: a persistent pool whose regions cost about as much as a cache miss.
//!
//! A region is a number of chunks and a closure. The caller publishes it, works on it like every worker, and returns
//! when every chunk is done. Chunks are claimed one by one, so that a slow or late thread takes fewer; a worker that
//! sleeps through a region holds nothing up. Between regions workers spin for [`SPIN`], then sleep.
//!
//! What a chunk computes must not depend on who computes it; then no result depends on the number of threads.

use super::columns::Columns;
use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread without work waits before it sleeps: longer than the serial pieces between the regions of a
/// forward pass, much shorter than anything a person or a scheduler would notice.
const SPIN: Duration = Duration::from_micros(40);

/// Threads that share the chunks of one region after another.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    /// Held during a region; whoever finds it taken, a chunk of that region included, works alone.
    region: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

/// The closure of a region and how many chunks it has.
struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    chunks: usize,
}

#[derive(Debug)]
struct Shared {
    /// Number of the region in the upper half, chunks nobody has claimed in the lower.
    unclaimed: AtomicU64,
    /// The region's [`Job`], on its caller's stack; valid while a chunk of it is not done.
    job: AtomicPtr<Job<'static>>,
    /// Chunks that are not done.
    pending: AtomicUsize,
    /// Threads that wait on `wake` or `finished`, so that nobody locks where nobody sleeps.
    sleeping: AtomicUsize,
    caller_sleeps: AtomicUsize,
    state: Mutex<State>,
    wake: Condvar,
    finished: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closing: bool,
    panic: Option<Box<dyn Any + Send>>,
}

impl Pool {
    /// A pool in which `threads` threads work, the caller of [`Pool::run`] being one of them.
    ///
    /// # Panics
    /// If `threads` is 0, or the system does not give the threads.
    pub fn new(threads: usize) -> Self {
        assert!(threads > 0, "a pool has at least its caller");
        let shared = Arc::new(Shared {
            unclaimed: AtomicU64::new(0),
            job: AtomicPtr::new(null_mut()),
            pending: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
            caller_sleeps: AtomicUsize::new(0),
            state: Mutex::default(),
            wake: Condvar::new(),
            finished: Condvar::new(),
        });
        let workers = (1..threads)
            .map(|number| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("qbin-{number}"))
                    .spawn(move || shared.work_until_closed())
                    .expect("the system gives another thread")
            })
            .collect();
        Self {
            shared,
            region: Mutex::new(()),
            workers,
        }
    }

    /// Threads that work, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work(chunk)` once for every chunk below `chunks`, on all threads, and returns when all are done.
    /// Called from inside a chunk, or while another thread's region runs, it works alone.
    ///
    /// # Panics
    /// With the panic of a chunk, if one panicked; the other chunks are done nevertheless.
    pub fn run(&self, chunks: usize, work: impl Fn(usize) + Sync) {
        let alone = self.workers.is_empty() || chunks <= 1;
        let region = if alone {
            None
        } else {
            self.region.try_lock().ok()
        };
        let Some(region) = region else {
            return (0..chunks).for_each(work);
        };
        let job = Job {
            work: &work,
            chunks,
        };
        self.shared.publish(&job);
        while self.shared.claim_and_run() {}
        self.shared.wait_until_done();
        let panic = self.shared.lock().panic.take();
        if let Some(panic) = panic {
            drop(region);
            resume_unwind(panic);
        }
    }

    /// Cuts `data` into parts of `len` elements, the last one possibly shorter, and calls `work(number, part)` for
    /// each, on all threads.
    ///
    /// # Panics
    /// If `len` is 0, or with the panic of a part.
    pub fn parts<T: Send>(
        &self,
        data: &mut [T],
        len: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(len > 0, "parts have at least one element");
        let total = data.len();
        let base = Base::of(data);
        self.run(total.div_ceil(len), |part| {
            let start = part * len;
            let len = len.min(total - start);
            // SAFETY: `start + len <= total`, so the part lies inside `data`, which is borrowed mutably until `run`
            // returns; parts of different numbers do not overlap, and `run` gives each number to one call only.
            let part_of_data = unsafe { std::slice::from_raw_parts_mut(base.at(start), len) };
            work(part, part_of_data);
        });
    }

    /// The results of `work(number)` for every number below `count`, in order, computed on all threads.
    ///
    /// # Panics
    /// With the panic of a call.
    pub fn map<T: Send>(&self, count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let mut results: Vec<Option<T>> = (0..count).map(|_| None).collect();
        self.parts(&mut results, 1, |number, result| {
            result[0] = Some(work(number));
        });
        let results = results.into_iter();
        results
            .map(|result| result.expect("every part was filled"))
            .collect()
    }

    /// Cuts the columns of `data[rows, stride]` into `ranges` and calls `work(number, columns)` for each, on all
    /// threads.
    ///
    /// # Panics
    /// As [`Pool::grid`].
    pub fn columns(
        &self,
        data: &mut [f32],
        stride: usize,
        ranges: &[Range<usize>],
        work: impl Fn(usize, Columns<'_>) + Sync,
    ) {
        let rows = data.len() / stride.max(1);
        let whole = 0..rows;
        self.grid(data, stride, &[whole], ranges, |_, number, columns| {
            work(number, columns);
        });
    }

    /// Cuts `data[rows, stride]` into the cells of a grid and calls `work(row number, column number, cell)` for each, on
    /// all threads.
    ///
    /// # Panics
    /// If ranges overlap, do not rise, or leave the matrix, if `data` is not whole rows, or with the panic of a cell.
    pub fn grid(
        &self,
        data: &mut [f32],
        stride: usize,
        rows: &[Range<usize>],
        columns: &[Range<usize>],
        work: impl Fn(usize, usize, Columns<'_>) + Sync,
    ) {
        assert!(
            stride > 0 && data.len().is_multiple_of(stride),
            "{} values in rows of {stride}",
            data.len()
        );
        check_apart(rows, data.len() / stride);
        check_apart(columns, stride);
        let base = Base::of(data);
        self.run(rows.len() * columns.len(), |cell| {
            let (row, column) = (cell / columns.len(), cell % columns.len());
            let first = base.at(rows[row].start * stride + columns[column].start);
            // SAFETY: `data` is borrowed until `run` returns and the cell lies inside. Ranges lie apart, so cells do not
            // overlap, and `run` gives each number to one call only.
            let cell =
                unsafe { Columns::cell(first, rows[row].len(), columns[column].len(), stride) };
            work(row, column, cell);
        });
    }
}

/// Ranges that follow each other without overlap, up to `end`.
#[track_caller]
pub(super) fn check_apart(ranges: &[Range<usize>], end: usize) {
    let apart = ranges.windows(2).all(|pair| pair[0].end <= pair[1].start);
    let inside = ranges
        .iter()
        .all(|range| range.start <= range.end && range.end <= end);
    assert!(apart && inside, "ranges {ranges:?} of {end}");
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A chunk's panic was caught and went to its caller; a worker has no other.
            worker.join().ok();
        }
    }
}

/// The start of a slice whose parts go to different threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Base<T>(*mut T);

// SAFETY: a `Base` only hands out addresses; who writes where is argued at each use, and `T: Send` holds there.
unsafe impl<T: Send> Send for Base<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Base<T> {}

impl<T> Base<T> {
    pub(super) fn of(data: &mut [T]) -> Self {
        Self(data.as_mut_ptr())
    }

    pub(super) fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

impl Shared {
    /// Nothing that runs under this lock can leave the state half changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a region. Every chunk of the one before is done, so nobody reads `job` now.
    fn publish(&self, job: &Job<'_>) {
        let chunks = u32::try_from(job.chunks).expect("fewer than 2^32 chunks");
        self.pending.store(job.chunks, SeqCst);
        self.job
            .store(std::ptr::from_ref(job).cast_mut().cast(), SeqCst);
        let region = (self.unclaimed.load(SeqCst) >> 32).wrapping_add(1);
        self.unclaimed
            .store(region << 32 | u64::from(chunks), SeqCst);
        // A worker that is about to sleep has counted itself before it looked at `unclaimed` for the last time.
        let helpers = self.sleeping.load(SeqCst).min(job.chunks - 1);
        if helpers > 0 {
            let _state = self.lock();
            (0..helpers).for_each(|_| self.wake.notify_one());
        }
    }

    /// Claims one chunk and runs it; false if there is none.
    fn claim_and_run(&self) -> bool {
        let claim = |unclaimed: u64| (unclaimed as u32 > 0).then(|| unclaimed - 1);
        let Ok(before) = self.unclaimed.fetch_update(SeqCst, SeqCst, claim) else {
            return false;
        };
        // SAFETY: a chunk was claimed just now, so the region's caller is still in `run`, at least until `pending` is
        // counted down below, and the job lives on its stack.
        let job = unsafe { &*self.job.load(SeqCst) };
        let chunk = job.chunks - before as u32 as usize;
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.work)(chunk))) {
            self.lock().panic.get_or_insert(panic);
        }
        if self.pending.fetch_sub(1, SeqCst) == 1 && self.caller_sleeps.load(SeqCst) > 0 {
            let _state = self.lock();
            self.finished.notify_one();
        }
        true
    }

    /// Waits for the chunks that other threads have claimed.
    fn wait_until_done(&self) {
        let done = || self.pending.load(SeqCst) == 0;
        if spin_until(done) {
            return;
        }
        self.caller_sleeps.store(1, SeqCst);
        let mut state = self.lock();
        while !done() {
            state = self
                .finished
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.caller_sleeps.store(0, SeqCst);
    }

    /// What a worker does all its life.
    fn work_until_closed(&self) {
        let work_there = || self.unclaimed.load(SeqCst) as u32 > 0;
        loop {
            while self.claim_and_run() {}
            if spin_until(work_there) {
                continue;
            }
            let mut state = self.lock();
            self.sleeping.fetch_add(1, SeqCst);
            while !work_there() && !state.closing {
                state = self
                    .wake
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            self.sleeping.fetch_sub(1, SeqCst);
            if state.closing {
                return;
            }
        }
    }
}

/// Whether `condition` came true within [`SPIN`].
fn spin_until(condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if condition() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return false;
        }
    }
}

/// Threads worth having: what this process may use (affinity and control group), but no more than there are cores,
/// because two threads of one core share its arithmetic and its path to memory.
pub fn default_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    physical_cores().map_or(allowed, |cores| allowed.min(cores))
}

/// Cores of this machine, where Linux says so.
fn physical_cores() -> Option<usize> {
    let folder = std::fs::read_dir("/sys/devices/system/cpu").ok()?;
    let siblings: std::collections::BTreeSet<String> = folder
        .filter_map(|entry| {
            let list = entry.ok()?.path().join("topology/thread_siblings_list");
            std::fs::read_to_string(list).ok()
        })
        .collect();
    (!siblings.is_empty()).then_some(siblings.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32};

    #[test]
    fn every_chunk_runs_once() {
        for threads in 1..=4 {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for chunks in [0, 1, 2, 3, 7, 100] {
                let counts: Vec<AtomicU32> = (0..chunks).map(|_| AtomicU32::new(0)).collect();
                pool.run(chunks, |chunk| {
                    counts[chunk].fetch_add(1, SeqCst);
                });
                assert!(
                    counts.iter().all(|count| count.load(SeqCst) == 1),
                    "{threads} threads, {chunks} chunks"
                );
            }
        }
    }

    #[test]
    fn many_regions_follow_each_other_with_and_without_sleep() {
        let pool = Pool::new(4);
        let mut expected = 0u64;
        let total = AtomicU64::new(0);
        for region in 0..20_000u64 {
            let chunks = (region % 9) as usize;
            pool.run(chunks, |chunk| {
                total.fetch_add(region ^ chunk as u64, SeqCst);
            });
            expected += (0..chunks as u64).map(|chunk| region ^ chunk).sum::<u64>();
            assert_eq!(total.load(SeqCst), expected, "region {region}");
            if region % 500 == 0 {
                // Long enough for every worker to fall asleep.
                std::thread::sleep(10 * SPIN);
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        let ran = AtomicU32::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, |chunk| {
                ran.fetch_add(1, SeqCst);
                assert!(chunk != 5, "chunk five");
            });
        }));
        let panic = result.expect_err("chunk 5 panics");
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"chunk five"));
        assert_eq!(ran.load(SeqCst), 8);
        pool.run(8, |_| {
            ran.fetch_add(1, SeqCst);
        });
        assert_eq!(ran.load(SeqCst), 16);
    }

    #[test]
    fn a_region_inside_a_chunk_and_one_beside_it_run_alone() {
        let pool = Pool::new(3);
        let count = AtomicU32::new(0);
        pool.run(4, |_| {
            pool.run(5, |_| {
                count.fetch_add(1, SeqCst);
            })
        });
        assert_eq!(count.load(SeqCst), 20);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, |_| {
                            count.fetch_add(1, SeqCst);
                        });
                    }
                });
            }
        });
        assert_eq!(count.load(SeqCst), 20 + 3 * 200 * 5);
    }

    #[test]
    fn other_threads_do_help() {
        let pool = Pool::new(2);
        let other = AtomicBool::new(false);
        // Each of the two chunks waits for the other, so that no single thread can do both.
        let arrived = AtomicU32::new(0);
        let caller = std::thread::current().id();
        pool.run(2, |_| {
            arrived.fetch_add(1, SeqCst);
            while arrived.load(SeqCst) < 2 {
                std::thread::yield_now();
            }
            other.fetch_or(std::thread::current().id() != caller, SeqCst);
        });
        assert!(other.load(SeqCst));
    }

    #[test]
    fn a_dropped_pool_leaves_no_thread() {
        for _ in 0..50 {
            let pool = Pool::new(3);
            pool.run(3, |_| ());
            let shared = Arc::downgrade(&pool.shared);
            drop(pool);
            assert!(shared.upgrade().is_none(), "a worker still holds it");
        }
    }

    #[test]
    fn parts_and_columns_cover_what_they_should() {
        let pool = Pool::new(3);
        let mut data = vec![0u32; 103];
        pool.parts(&mut data, 10, |number, part| {
            part.iter_mut()
                .for_each(|value| *value += number as u32 + 1);
        });
        assert!(
            data.iter()
                .enumerate()
                .all(|(at, &value)| value as usize == at / 10 + 1)
        );

        let mut matrix = vec![0.0f32; 4 * 10];
        pool.columns(
            &mut matrix,
            10,
            &[0..3, 3..3, 5..10],
            |number, mut columns| {
                for row in 0..columns.rows() {
                    columns.row(row).fill((10 * row + number) as f32 + 1.0);
                }
            },
        );
        for (at, &value) in matrix.iter().enumerate() {
            let number = [0, 0, 0, -1, -1, 2, 2, 2, 2, 2][at % 10];
            let expected = if number < 0 {
                0
            } else {
                10 * (at / 10) as i32 + number + 1
            };
            assert_eq!(value, expected as f32, "{at}");
        }
    }

    #[test]
    #[should_panic(expected = "ranges")]
    fn overlapping_columns_are_refused() {
        Pool::new(1).columns(&mut [0.0; 8], 4, &[0..3, 2..4], |_, _| ());
    }

    #[test]
    fn at_least_one_thread_is_worth_having() {
        assert!(
            (1..=std::thread::available_parallelism().map_or(1, usize::from))
                .contains(&default_threads())
        );
    }
}
