//! Tests of the crate through its public face.

mod artifact;
mod bad_artifact;
mod bad_safetensors;
mod checkpoint;
mod common;
mod document;
mod output;
mod packing;
mod sparse;
