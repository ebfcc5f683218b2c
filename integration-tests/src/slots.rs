//! Clusters take turns: QEMU guests are heavy, and a test that waits for a time limit must not wait for the CPU instead.
//!
//! A slot is a locked file, so that it works between processes too (nextest, two runs at once) and is free again
//! whatever becomes of its holder.

use std::{
    fs::{File, OpenOptions},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context as _;

use crate::paths;

/// How many clusters run at once on one machine. They mostly wait: two of them leave one of two processors idle.
const SLOTS: usize = 3;

/// What one cluster may use. Given back when dropped.
pub struct Slot(#[expect(dead_code, reason = "held for its locks")] Vec<File>);

/// How much of the machine a cluster wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// One of the slots.
    One,
    /// All but one: the test measures time, with limits that leave room for one neighbour.
    Most,
    /// All of them: something is measured exactly.
    Whole,
}

impl Slot {
    /// Waits for a turn.
    ///
    /// # Errors
    ///
    /// The lock files cannot be made.
    pub async fn take(share: Share) -> anyhow::Result<Self> {
        let mut files = Vec::new();
        for i in 0..SLOTS {
            let path = slot_file(i)?;
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
            files.push(file.with_context(|| format!("open {}", path.display()))?);
        }
        match share {
            // Always in the same order, so two that want many do not wait for each other.
            Share::Most | Share::Whole => {
                files.truncate(if share == Share::Most { SLOTS - 1 } else { SLOTS });
                for file in &files {
                    while file.try_lock().is_err() {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
                Ok(Self(files))
            }
            Share::One => loop {
                // From the last one on: the first is what those who want many wait for first.
                if let Some(i) = (0..SLOTS).rev().find(|i| files[*i].try_lock().is_ok()) {
                    return Ok(Self(vec![files.swap_remove(i)]));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            },
        }
    }
}

fn slot_file(i: usize) -> anyhow::Result<PathBuf> {
    Ok(paths::binary_dir()?.join(format!(".cluster-slot-{i}")))
}
