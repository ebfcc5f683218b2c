//! Reads the logs of the processes under test: a line at level ERROR means that a person must look, so a test that did
//! not expect one fails.

use std::{fs, path::Path};

/// The lines at level ERROR, and panics, that none of `allowed` is part of.
#[must_use]
pub fn unexpected_errors(log: &Path, allowed: &[String]) -> Vec<String> {
    let Ok(text) = fs::read(log) else { return Vec::new() };
    let text = plain(&String::from_utf8_lossy(&text));
    let bad = text.lines().filter(|line| is_error(line)).filter(|line| !allowed.iter().any(|a| line.contains(a)));
    bad.map(str::to_owned).collect()
}

/// The last lines of a log.
#[must_use]
pub fn tail(log: &Path, lines: usize) -> String {
    let text = fs::read(log).map(|t| plain(&String::from_utf8_lossy(&t))).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// `2026-11-24T00:00:00.000000Z ERROR target: message`, or a panic.
fn is_error(line: &str) -> bool {
    line.split_whitespace().nth(1) == Some("ERROR") || line.contains("panicked at")
}

/// Without the colours of a terminal.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            for c in chars.by_ref() {
                if c.is_ascii_alphabetic() {
                    break;
                }
            }
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_and_panics_are_found_and_allowed_ones_are_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "2026-11-24T00:00:00Z  INFO a: no ERROR here\n\
                    2026-11-24T00:00:00Z ERROR a: the disk is full\n\
                    \u{1b}[2m2026-11-24T00:00:00Z\u{1b}[0m \u{1b}[31mERROR\u{1b}[0m a: coloured\n\
                    thread 'main' panicked at src/main.rs:1:1:\n";
        fs::write(file.path(), text).unwrap();
        assert_eq!(unexpected_errors(file.path(), &[]).len(), 3);
        let allowed = ["disk is full".to_owned(), "coloured".to_owned(), "panicked".to_owned()];
        assert_eq!(unexpected_errors(file.path(), &allowed), Vec::<String>::new());
        assert_eq!(tail(file.path(), 1), "thread 'main' panicked at src/main.rs:1:1:");
    }
}
