//! Running the program in a folder of its own, and what came out of it.

use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A temporary folder in which the program is run, so that relative names in its arguments are files there.
/// `tiny` in it is the tiny model of the repository.
pub struct Lab {
    program: PathBuf,
    folder: TempDir,
}

/// How one run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status; none where a signal ended it.
    pub status: Option<i32>,
    /// What it printed, with the lab's folder written as `LAB`.
    pub stdout: String,
    /// What it said beside that, likewise.
    pub stderr: String,
}

impl Lab {
    /// A new folder for `program`: a test gives `env!("CARGO_BIN_EXE_qbin-under-test")`.
    ///
    /// # Panics
    /// If there is no place for temporary files.
    pub fn new(program: &str) -> Self {
        let lab = Self {
            program: program.into(),
            folder: TempDir::with_prefix("qbin-test-").expect("a temporary folder"),
        };
        std::os::unix::fs::symlink(crate::root().join("tests/models/tiny-1m"), lab.path("tiny"))
            .expect("link the tiny model");
        lab
    }

    /// A file of the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file of the folder, and the folders above it.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("files lie in a folder")).expect("make a folder");
        fs::write(&path, contents).unwrap_or_else(|error| panic!("`{name}`: {error}"));
    }

    /// Writes token ids as NumPy does: an array `[windows, tokens]` of int32 in C order.
    ///
    /// # Panics
    /// If the ids are not whole windows, or it cannot be written.
    pub fn write_npy(&self, name: &str, tokens: usize, ids: &[i32]) {
        assert!(
            ids.len().is_multiple_of(tokens),
            "ids are not [windows, {tokens}]"
        );
        let dict = format!(
            "{{'descr': '<i4', 'fortran_order': False, 'shape': ({}, {tokens}), }}",
            ids.len() / tokens
        );
        // Magic, version, length, text and a line feed are together a multiple of 64 bytes.
        let text = format!(
            "{dict:<width$}\n",
            width = (dict.len() + 11).next_multiple_of(64) - 11
        );
        let mut bytes = [
            b"\x93NUMPY\x01\x00".as_slice(),
            &(text.len() as u16).to_le_bytes(),
            text.as_bytes(),
        ]
        .concat();
        ids.iter().for_each(|id| bytes.extend(id.to_le_bytes()));
        self.write(name, bytes);
    }

    /// Reads a file of the folder.
    ///
    /// # Panics
    /// If it is not there.
    #[track_caller]
    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("`{name}`: {error}"))
    }

    /// Names of everything in the folder, sorted.
    ///
    /// # Panics
    /// If it cannot be listed.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).expect("list the folder");
        let mut names: Vec<String> = entries
            .map(|entry| {
                entry
                    .expect("list the folder")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        names.sort();
        names
    }

    /// Runs the program with arguments that are divided by white space.
    pub fn run(&self, args: &str) -> Outcome {
        self.run_args(args.split_whitespace())
    }

    /// Runs the program with arguments that may hold white space.
    pub fn run_args<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Outcome {
        self.outcome(Command::new(&self.program).args(args))
    }

    /// Runs a shell script in which `"$@"` is the program with its arguments, divided by white space.
    pub fn run_in_shell(&self, script: &str, args: &str) -> Outcome {
        self.outcome(
            Command::new("sh")
                .args(["-c", script, "sh"])
                .arg(&self.program)
                .args(args.split_whitespace()),
        )
    }

    /// Runs it and returns what it printed.
    ///
    /// # Panics
    /// If it does not succeed.
    #[track_caller]
    pub fn succeed(&self, args: &str) -> String {
        let outcome = self.run(args);
        assert_eq!(outcome.status, Some(0), "`{args}`: {}", outcome.stderr);
        outcome.stdout
    }

    /// Runs it with `--json` and returns the one object that it prints.
    ///
    /// # Panics
    /// If it does not succeed, or prints anything but one line of JSON.
    #[track_caller]
    pub fn json(&self, args: &str) -> Value {
        let stdout = self.succeed(&format!("{args} --json"));
        assert_eq!(stdout.lines().count(), 1, "`{args}` printed {stdout}");
        let value: Value = serde_json::from_str(&stdout)
            .unwrap_or_else(|error| panic!("`{args}`: {error} in {stdout}"));
        assert!(value.is_object(), "`{args}` printed {stdout}");
        value
    }

    /// Asserts that it cannot be done: status 2, a message that holds `words`, and nothing left behind. Where the
    /// output is `out.qbin`, that is tried over a file of this name, too, which must stay as it is.
    ///
    /// # Panics
    /// If it is otherwise.
    #[track_caller]
    pub fn refuse(&self, args: &str, words: &[&str]) {
        let before = self.names();
        self.run(args).assert_refused(args, words);
        assert_eq!(self.names(), before, "`{args}` left something behind");
        if args.contains(" out.qbin") && !before.iter().any(|name| name == "out.qbin") {
            self.write("out.qbin", "an artifact of an earlier run");
            self.run(args).assert_refused(args, words);
            assert!(
                self.read("out.qbin") == b"an artifact of an earlier run",
                "`{args}` touched what was there"
            );
            fs::remove_file(self.path("out.qbin")).expect("remove");
            assert_eq!(self.names(), before, "`{args}` left something behind");
        }
    }

    fn outcome(&self, command: &mut Command) -> Outcome {
        // Nothing may depend on who runs the tests.
        let output = command
            .current_dir(self.folder.path())
            .env_remove("HOME")
            .output()
            .expect("start the program");
        let text = |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).expect("the program prints UTF-8");
            text.replace(&self.folder.path().display().to_string(), "LAB")
        };
        Outcome {
            status: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }
}

impl Outcome {
    /// Asserts status 2 and an error message that holds `words`, and nothing on stdout.
    ///
    /// # Panics
    /// If it is otherwise.
    #[track_caller]
    pub fn assert_refused(&self, args: &str, words: &[&str]) {
        let text = &self.stderr;
        assert!(!text.contains("panicked"), "`{args}`: {text}");
        assert_eq!(self.status, Some(2), "`{args}`: {text}{}", self.stdout);
        assert_eq!(self.stdout, "", "`{args}`");
        assert!(text.starts_with("error: "), "`{args}`: {text}");
        for word in words {
            assert!(text.contains(word), "`{args}`: no `{word}` in: {text}");
        }
    }
}

/// Copies the files of a folder into a new one.
///
/// # Panics
/// If one cannot be copied.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("make a folder");
    for entry in fs::read_dir(from).expect("list a folder") {
        let path = entry.expect("list a folder").path();
        // Not `fs::copy`: that would copy a read-only file's mode, and tests damage their copies.
        fs::write(
            to.join(path.file_name().expect("a file")),
            fs::read(&path).expect("read a file"),
        )
        .expect("copy a file");
    }
}
