//! JSON objects in which a key may stand only once.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// Reads a JSON object and refuses a repeated key, of which serde would silently keep the last.
///
/// An error inside a value is prefixed by its key, so that it says which tensor it is about.
pub(crate) fn unique_map<'de, D, V>(deserializer: D) -> Result<BTreeMap<String, V>, D::Error>
where
    D: Deserializer<'de>,
    V: Deserialize<'de>,
{
    deserializer.deserialize_map(UniqueMap(PhantomData))
}

struct UniqueMap<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueMap<V> {
    type Value = BTreeMap<String, V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut map = BTreeMap::new();
        while let Some(key) = access.next_key::<String>()? {
            let value = access
                .next_value()
                .map_err(|error| A::Error::custom(format_args!("`{key}`: {error}")))?;
            if map.contains_key(&key) {
                return Err(A::Error::custom(format_args!(
                    "`{key}` stands there twice, every name may be used once"
                )));
            }
            map.insert(key, value);
        }
        Ok(map)
    }
}
