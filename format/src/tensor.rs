//! Dense tensors as they lie in a mapped file.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::Dtype;

/// A tensor whose bytes lie in a mapped file: little endian, row major, not necessarily aligned.
///
/// `bytes.len()` is the product of `shape` times the element size; the reader checked it.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: &'a [usize],
    /// The elements.
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Converts the elements `start..start + out.len()`, counted row major, to f32. Exact.
    ///
    /// # Panics
    /// If the type is none of F32, F16, BF16 (see [`Dtype::is_float_weight`]), or the range ends
    /// beyond the tensor.
    #[track_caller]
    pub fn read_f32(&self, start: usize, out: &mut [f32]) {
        assert!(
            start <= self.len() && out.len() <= self.len() - start,
            "tensor `{}`: elements from {start}, {} of them, of {}",
            self.name,
            out.len(),
            self.len()
        );
        let size = self.dtype.size();
        let bytes = &self.bytes[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::F32 => read_f32(bytes, out),
            Dtype::Bf16 => read_bf16(bytes, out),
            Dtype::F16 => read_f16(bytes, out),
            other => panic!("tensor `{}`: {other} cannot be read as f32", self.name),
        }
    }

    /// All elements in f32.
    ///
    /// # Panics
    /// If the type is none of F32, F16, BF16.
    #[track_caller]
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.read_f32(0, &mut out);
        out
    }
}

/// The bytes of a tensor of type `dtype` with these values: little endian, rounded to the nearest, ties to even.
///
/// # Panics
/// If the type is none of F32, F16, BF16.
pub fn float_bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    let bytes = values.iter();
    match dtype {
        Dtype::F32 => bytes.flat_map(|value| value.to_le_bytes()).collect(),
        Dtype::Bf16 => bytes
            .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
            .collect(),
        Dtype::F16 => bytes
            .flat_map(|&value| f16::from_f32(value).to_le_bytes())
            .collect(),
        other => panic!("{other} is no type of weights"),
    }
}

fn read_f32(bytes: &[u8], out: &mut [f32]) {
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *out = f32::from_le_bytes(bytes);
    }
}

fn read_bf16(bytes: &[u8], out: &mut [f32]) {
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
    }
}

fn read_f16(bytes: &[u8], out: &mut [f32]) {
    // Through a small aligned buffer, because the slice conversion has a hardware path and the
    // conversion of single values asks for it again each time.
    let mut buffer = [f16::ZERO; 256];
    for (out, bytes) in out.chunks_mut(256).zip(bytes.chunks(512)) {
        let buffer = &mut buffer[..out.len()];
        for (half, &bytes) in buffer.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *half = f16::from_le_bytes(bytes);
        }
        buffer.convert_to_f32_slice(out);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn view<'a>(dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> TensorView<'a> {
        TensorView {
            name: "w",
            dtype,
            shape,
            bytes,
        }
    }

    #[test]
    fn every_half_value_converts_exactly() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let shape = [1 << 16];
        let f16s = view(Dtype::F16, &shape, &bytes).to_f32();
        let bf16s = view(Dtype::Bf16, &shape, &bytes).to_f32();
        for bits in 0..=u16::MAX {
            let (a, b) = (f16s[usize::from(bits)], bf16s[usize::from(bits)]);
            let (ea, eb) = (
                f16::from_bits(bits).to_f32(),
                bf16::from_bits(bits).to_f32(),
            );
            assert!(a == ea || a.is_nan() && ea.is_nan(), "f16 {bits:#06x}");
            assert!(b == eb || b.is_nan() && eb.is_nan(), "bf16 {bits:#06x}");
        }
    }

    proptest! {
        #[test]
        fn any_range_at_any_alignment_is_read(skew in 0usize..4, start in 0usize..40, len in 0usize..600) {
            let values: Vec<f32> = (0..start + len).map(|i| i as f32 * 0.5).collect();
            let shape = [values.len()];
            for dtype in [Dtype::F32, Dtype::F16] {
                let mut bytes = vec![0u8; skew];
                for &value in &values {
                    match dtype {
                        Dtype::F32 => bytes.extend(value.to_le_bytes()),
                        _ => bytes.extend(f16::from_f32(value).to_le_bytes()),
                    }
                }
                let mut out = vec![0.0; len];
                view(dtype, &shape, &bytes[skew..]).read_f32(start, &mut out);
                prop_assert_eq!(&out, &values[start..]);
            }
        }
    }

    #[test]
    #[should_panic(expected = "I32 cannot be read as f32")]
    fn integers_are_not_weights() {
        view(Dtype::I32, &[1], &[0; 4]).to_f32();
    }
}
