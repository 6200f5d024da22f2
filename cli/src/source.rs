//! A checkpoint read through once, before anything is done to it.

use crate::commands::Show;
use crate::error::CliError;
use crate::progress::Progress;
use qbin_format::{Checkpoint, SourceHasher, SourceInfo, TensorView};
use qbin_runtime::RuntimeError;

/// Weights checked at once.
const CHECK_WEIGHTS: usize = 1 << 18;

/// Reads every tensor once: all weights must be finite, and their digest names the source. Pages are
/// given back as it goes.
pub(crate) fn read_source(checkpoint: &Checkpoint, show: Show) -> Result<SourceInfo, CliError> {
    let mut progress = Progress::new("reading", show.quiet);
    let mut hasher = SourceHasher::new();
    let mut done = 0;
    for name in checkpoint.names() {
        let view = checkpoint.tensor(name).expect("one of its own names");
        if view.dtype.is_float_weight() {
            check_finite(&view)?;
        }
        hasher.add(&view);
        checkpoint.release(name);
        done += view.bytes.len() as u64;
        progress.set(done, checkpoint.total_bytes(), name);
    }
    progress.finish();
    Ok(hasher.finish())
}

/// # Errors
/// The first weight that is NaN or infinite.
fn check_finite(view: &TensorView<'_>) -> Result<(), CliError> {
    let mut chunk = vec![0f32; view.len().min(CHECK_WEIGHTS)];
    for start in (0..view.len()).step_by(CHECK_WEIGHTS) {
        let chunk = &mut chunk[..CHECK_WEIGHTS.min(view.len() - start)];
        view.read_f32(start, chunk);
        if let Some(at) = chunk.iter().position(|value| !value.is_finite()) {
            let (tensor, index, value) = (view.name.to_string(), start + at, chunk[at]);
            return Err(RuntimeError::NonFinite {
                tensor,
                index,
                value,
            }
            .into());
        }
    }
    Ok(())
}
