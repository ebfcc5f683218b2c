//! What the command prints: tables for people, JSON for programs, both on stdout; everything else on stderr.
//!
//! The functions that make text are pure and covered by golden files; this file does the writing. Nothing here
//! panics when the reader has gone away.

mod cluster;
mod host;
mod image;
pub mod json;
pub mod text;
mod vm;

use std::io::{self, Write as _};

use comfy_table::{ContentArrangement, Table, presets};

pub(crate) use self::vm::{cloud_init, is_in_machine};
pub use self::{
    cluster::{event_line, events, status},
    host::{drain, drain_line, host_line, hosts, show_host, what_if},
    image::{image_line, images, show_image},
    text::{clean, clean_lines},
    vm::{Columns, explain, nic, phase_word, show_vm, snapshots, vm_line, vms},
};

/// In which form data is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Tables for people.
    Table,
    /// JSON, in protobuf's canonical mapping with the field names of the .proto files.
    Json,
}

/// Writes data to stdout, with a line end.
///
/// # Errors
///
/// Nobody reads any more, or the disk is full.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    out.flush()
}

/// Writes data to stdout where a reader that has gone away must not stop what is going on.
pub fn say(text: &str) {
    if let Err(e) = print(text)
        && e.kind() != io::ErrorKind::BrokenPipe
    {
        note(&format!("warning: cannot write the output: {e}"));
    }
}

/// Writes bytes to stdout as they are.
///
/// # Errors
///
/// Nobody reads any more, or the disk is full.
pub fn print_raw(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// Writes a line to stderr. There is nobody to tell if that fails.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Lays out a table without borders: a header and rows, two spaces between columns. Cells are cleaned.
#[must_use]
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| clean(cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// Lays out names and values, one pair to a line. Values are cleaned; pairs without a value are left out.
#[must_use]
pub fn pairs(pairs: &[(&str, String)]) -> String {
    let shown = pairs.iter().filter(|(_, value)| !value.is_empty());
    let width = shown.clone().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
    shown.map(|(name, value)| format!("{:width$}{}\n", format!("{name}:"), clean(value))).collect()
}
