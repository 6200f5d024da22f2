//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use crate::FormatError;
use crate::unique_map::unique_map;

#[derive(serde::Deserialize)]
struct Index {
    #[serde(deserialize_with = "unique_map")]
    weight_map: BTreeMap<String, String>,
}

/// Reads the map from tensor to shard file name out of the index's text.
///
/// # Errors
/// If the text is no index, or a shard is anything but the name of a file beside the index: an index
/// from a stranger must not make us read other folders.
pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<BTreeMap<String, String>, FormatError> {
    let Index { weight_map } =
        serde_json::from_slice(text).map_err(|source| FormatError::IndexJson {
            path: path.to_owned(),
            source,
        })?;
    for (tensor, shard) in &weight_map {
        if !is_plain_file_name(shard) {
            return Err(FormatError::ShardOutsideFolder {
                path: path.to_owned(),
                tensor: tensor.clone(),
                shard: shard.clone(),
            });
        }
    }
    Ok(weight_map)
}

fn is_plain_file_name(name: &str) -> bool {
    let first = Path::new(name).components().next();
    matches!(first, Some(Component::Normal(_))) && !name.contains(['/', '\\', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_file_names_are_shards() {
        for name in ["model-00001-of-00002.safetensors", "..a", "a..b"] {
            assert!(is_plain_file_name(name), "{name}");
        }
        for name in [
            "", ".", "..", "../a", "/a", "a/b", "a/", "a\\b", "./a", "a\0",
        ] {
            assert!(!is_plain_file_name(name), "{name}");
        }
    }
}
