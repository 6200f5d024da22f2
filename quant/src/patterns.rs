//! Glob patterns over the names of a model's linears.

use globset::{Glob, GlobMatcher};

use crate::QuantError;

/// Compiled patterns, each of which matches at least one linear of the model.
pub struct Patterns(Vec<GlobMatcher>);

impl Patterns {
    /// Compiles `patterns` for a model whose linears have these names.
    ///
    /// # Errors
    /// [`QuantError::Pattern`] for what is no glob, and [`QuantError::PatternMatchesNothing`]: a pattern with a typing
    /// error would otherwise do nothing, silently.
    pub fn new<'a>(
        patterns: impl IntoIterator<Item = &'a String>,
        names: &[String],
    ) -> Result<Self, QuantError> {
        let compile = |pattern: &String| {
            let glob = Glob::new(pattern).map_err(|source| QuantError::Pattern {
                pattern: pattern.clone(),
                source,
            })?;
            let matcher = glob.compile_matcher();
            match names.iter().any(|name| matcher.is_match(name)) {
                true => Ok(matcher),
                false => Err(QuantError::PatternMatchesNothing {
                    pattern: pattern.clone(),
                }),
            }
        };
        patterns
            .into_iter()
            .map(compile)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The last pattern that matches a name.
    pub fn last_match(&self, name: &str) -> Option<usize> {
        self.0.iter().rposition(|pattern| pattern.is_match(name))
    }
}
