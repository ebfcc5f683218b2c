//! The table of `docs/fencing.md` says the truth: every claim has a row, every test that it names is there, and the numbers of mutants
//! are those of `mutants.toml`, each of which still fits the source.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use harness::paths;

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All Rust sources of the project.
fn sources(root: &Path) -> String {
    let mut left: Vec<PathBuf> = ["agent", "client", "controller", "integration-tests"].map(|d| root.join(d)).to_vec();
    let mut text = String::new();
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                text.push_str(&read(&path));
            }
        }
    }
    text
}

#[derive(Debug, Default)]
struct Mutant {
    rules: Vec<String>,
    what: String,
    file: String,
    find: String,
}

/// The strings of `mutants.toml`, of which each lies on one line, as in JSON.
fn mutants(root: &Path) -> Vec<Mutant> {
    let mut mutants: Vec<Mutant> = Vec::new();
    for line in read(&root.join("integration-tests/mutants/mutants.toml")).lines() {
        if line == "[[mutant]]" {
            mutants.push(Mutant::default());
        }
        let (Some(mutant), Some((key, value))) = (mutants.last_mut(), line.split_once(" = ")) else { continue };
        let text = || serde_json::from_str::<String>(value).unwrap_or_else(|e| panic!("{line}: {e}"));
        match key {
            "rule" => mutant.rules = text().split(", ").map(ToOwned::to_owned).collect(),
            "what" => mutant.what = text(),
            "file" => mutant.file = text(),
            "find" => mutant.find = text(),
            _ => {}
        }
    }
    mutants
}

/// Claim, tests, number of mutants.
fn rows(fencing: &str) -> Vec<(String, String, String)> {
    let (_, table) = fencing.split_once("| claim | test | mutants |\n|---|---|---|\n").expect("the table");
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [claim, tests, mutants] = cells[..] else { panic!("{line}") };
        (claim.to_owned(), tests.to_owned(), mutants.to_owned())
    };
    table.lines().take_while(|l| l.starts_with('|')).map(row).collect()
}

#[test]
fn every_claim_has_a_row_and_every_rule_that_is_broken_is_a_claim() {
    let root = paths::source_root();
    let fencing = read(&root.join("docs/fencing.md"));
    let claims: BTreeSet<&str> = fencing
        .split("**")
        .filter(|w| w.len() == 2 && w.as_bytes()[0].is_ascii_uppercase() && w.as_bytes()[1].is_ascii_digit())
        // The assumptions are not tested; they are what the tests assume.
        .filter(|w| !w.starts_with('A'))
        .collect();
    assert!(claims.len() > 20, "{claims:?}");
    let rows = rows(&fencing);
    let in_table: BTreeSet<&str> = rows.iter().flat_map(|(claim, ..)| claim.split(", ")).collect();
    let missing: Vec<_> = claims.difference(&in_table).collect();
    assert!(missing.is_empty(), "no row for {missing:?}");

    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    let mutants = mutants(root);
    for rule in mutants.iter().flat_map(|m| &m.rules) {
        *counts.entry(rule.clone()).or_default() += 1;
    }
    for (claim, _, told) in &rows {
        let counted = if claim == "all of them" {
            mutants.len().to_string()
        } else {
            let count = |c| counts.remove(c).unwrap_or(0).to_string();
            claim.split(", ").map(count).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(*told, counted, "mutants of {claim}");
    }
    assert!(counts.is_empty(), "rules of mutants that are no claims: {counts:?}");
}

#[test]
fn every_test_in_the_table_is_there() {
    let root = paths::source_root();
    let (fencing, sources) = (read(&root.join("docs/fencing.md")), sources(root));
    let mut seen = 0;
    for (claim, tests, _) in rows(&fencing) {
        let named = tests.split('`').skip(1).step_by(2);
        for name in named.filter(|n| n.contains('_') && !n.contains(['/', '.', ' '])) {
            let name = name.rsplit("::").next().unwrap_or(name);
            assert!(sources.contains(&format!("fn {name}(")), "{claim}: there is no test {name}");
            seen += 1;
        }
    }
    assert!(seen > 60, "only {seen} tests are named");
}

#[test]
fn every_mutant_fits_the_source() {
    let root = paths::source_root();
    for Mutant { rules, what, file, find } in mutants(root) {
        assert_eq!(read(&root.join(&file)).matches(&find).count(), 1, "{rules:?}: {what}: in {file}");
    }
}
