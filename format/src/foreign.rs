//! Recognising files that are not safetensors, to say what they are instead.

use std::fmt;
use std::path::Path;

/// A kind of file that is often given by mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Foreign {
    /// `torch.save`: a zip archive or a bare pickle.
    PyTorch,
    /// llama.cpp's format.
    Gguf,
    /// What stands in a repository that was cloned without git-lfs.
    GitLfsPointer,
}

impl Foreign {
    /// Recognises a file by its first bytes; a bare pickle has only two, so its name must agree.
    pub(crate) fn detect(path: &Path, bytes: &[u8]) -> Option<Self> {
        if bytes.starts_with(b"GGUF") {
            Some(Self::Gguf)
        } else if bytes.starts_with(b"version https://git-lfs") {
            Some(Self::GitLfsPointer)
        } else if bytes.starts_with(b"PK\x03\x04")
            || bytes.starts_with(b"\x80") && Self::by_name(path) == Some(Self::PyTorch)
        {
            Some(Self::PyTorch)
        } else {
            None
        }
    }

    /// Recognises a file by its extension.
    pub(crate) fn by_name(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "bin" | "pt" | "pth" | "ckpt" => Some(Self::PyTorch),
            "gguf" => Some(Self::Gguf),
            _ => None,
        }
    }

    /// How to get a file that can be read.
    pub(crate) fn way_out(self) -> &'static str {
        match self {
            Self::PyTorch => {
                "convert it with `model.save_pretrained(folder, safe_serialization=True)` of transformers"
            }
            Self::Gguf => "use the safetensors checkpoint that the GGUF file was made from",
            Self::GitLfsPointer => "run `git lfs pull` in its repository to get the file itself",
        }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PyTorch => "a PyTorch file",
            Self::Gguf => "a GGUF file",
            Self::GitLfsPointer => "a git-lfs pointer, not the file itself",
        })
    }
}
