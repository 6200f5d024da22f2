//! Where the time of a walk goes.
//!
//! Times are for the eye of whoever runs a job: no result may depend on them, and no artifact holds them.

use serde::Serialize;
use std::time::Instant;

/// A part of the work of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Calibration tokens through the blocks.
    Forward,
    /// Statistics of the linears' inputs.
    Statistics,
    /// Passes change weights; the three that follow are parts of it.
    Rewrite,
    /// Hessians are factored.
    Factor,
    /// Columns are rounded one after the other.
    Sweep,
    /// Codes and scales are refined.
    Refine,
    /// New tensors are packed and written.
    Write,
}

/// Seconds of wall time, stage by stage.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Times {
    /// [`Stage::Forward`].
    pub forward: f64,
    /// [`Stage::Statistics`].
    pub statistics: f64,
    /// [`Stage::Rewrite`].
    pub rewrite: f64,
    /// [`Stage::Factor`].
    pub factor: f64,
    /// [`Stage::Sweep`].
    pub sweep: f64,
    /// [`Stage::Refine`].
    pub refine: f64,
    /// [`Stage::Write`].
    pub write: f64,
}

impl Times {
    /// Does some work, and counts its time as that of `stage`.
    pub fn of<T>(&mut self, stage: Stage, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        *self.stage(stage) += start.elapsed().as_secs_f64();
        result
    }

    /// Adds the times of another part of the job.
    pub fn add(&mut self, mut other: Self) {
        for stage in Stage::ALL {
            *self.stage(stage) += *other.stage(stage);
        }
    }

    fn stage(&mut self, stage: Stage) -> &mut f64 {
        match stage {
            Stage::Forward => &mut self.forward,
            Stage::Statistics => &mut self.statistics,
            Stage::Rewrite => &mut self.rewrite,
            Stage::Factor => &mut self.factor,
            Stage::Sweep => &mut self.sweep,
            Stage::Refine => &mut self.refine,
            Stage::Write => &mut self.write,
        }
    }
}

impl Stage {
    const ALL: [Self; 7] = [
        Self::Forward,
        Self::Statistics,
        Self::Rewrite,
        Self::Factor,
        Self::Sweep,
        Self::Refine,
        Self::Write,
    ];
}
