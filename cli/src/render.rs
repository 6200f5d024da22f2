//! What is shown: errors with their causes and hints, tables, sizes. Colour and layout live only here.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};

/// Prints an error, its causes and its hint on stderr.
pub(crate) fn error(error: &(dyn Error + 'static), hint: Option<String>) {
    let (label, hint_label) =
        match std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
            true => ("\x1b[1;31merror\x1b[0m", "\x1b[1;36mhint\x1b[0m"),
            false => ("error", "hint"),
        };
    let mut text = format!("{label}: {error}\n");
    let mut shown = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let message = cause.to_string();
        // Wrappers that only pass a message on would show it twice.
        if !shown.contains(&message) {
            let _ = writeln!(text, "  cause: {message}");
        }
        shown = message;
        source = cause.source();
    }
    if let Some(hint) = hint {
        let _ = writeln!(text, "{hint_label}: {hint}");
    }
    // A broken stderr is no reason to fail differently.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Writes to stdout; a reader that went away is not an error.
///
/// # Errors
/// Any other failure to write, for example a full disk.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// A table: the first column is left-aligned, the others right; no lines.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_string()).collect();
    let mut text = String::new();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(width - cell.chars().count());
            let gap = if column == 0 { "" } else { "  " };
            let _ = if column == 0 {
                write!(line, "{gap}{cell}{pad}")
            } else {
                write!(line, "{gap}{pad}{cell}")
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// A Markdown table, its columns as wide as their longest cell: the first is left-aligned, the others right.
pub(crate) fn markdown_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header = header.iter().map(|cell| (*cell).to_string()).collect();
    let rows: Vec<&Vec<String>> = std::iter::once(&header).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..header.len()).filter_map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(width - cell.chars().count());
            let _ = match column {
                0 => write!(text, "| {cell}{pad} |"),
                _ => write!(text, " {pad}{cell} |"),
            };
        }
        text.push('\n');
        if number == 0 {
            for (column, width) in widths.iter().enumerate() {
                let dashes = "-".repeat(width + 1);
                let _ = match column {
                    0 => write!(text, "|{dashes}-|"),
                    _ => write!(text, "{dashes}:|"),
                };
            }
            text.push('\n');
        }
    }
    text
}

/// Bytes with a binary unit.
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut unit = 0;
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{value:.2} {}", UNITS[unit])
    }
}

/// `value ± error`, both with `digits` decimals.
pub(crate) fn with_error(value: f64, error: Option<f64>, digits: usize) -> String {
    match error {
        Some(error) => format!("{value:.digits$} ± {error:.digits$}"),
        None => format!("{value:.digits$}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_by_characters() {
        let rows = vec![
            vec!["äb".into(), "1".into()],
            vec!["c".into(), "100".into()],
        ];
        assert_eq!(table(&["x", "n"], &rows), "x     n\näb    1\nc   100\n");
    }

    #[test]
    fn markdown_tables_align_by_characters() {
        let rows = vec![vec!["äb".into(), "100".into()]];
        let expected = "| x  |   n |\n|----|----:|\n| äb | 100 |\n";
        assert_eq!(markdown_table(&["x", "n"], &rows), expected);
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(
            (bytes(1023), bytes(1536), bytes(3 << 30)),
            ("1023 B".into(), "1.50 KiB".into(), "3.00 GiB".into())
        );
    }
}
