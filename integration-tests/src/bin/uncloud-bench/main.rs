//! The numbers, as a table and in `target/bench.json` (see `make bench`).
fn main() {}
