//! `make tour`: takes the tour and writes it down; or, with `--check`, says whether what is written down is what it would be.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use harness::tour;
use tokio::signal::unix::{SignalKind, signal};

/// Types the commands of docs/tour.md into a cluster of its own and checks what each does.
#[derive(Parser)]
struct Options {
    /// The document.
    #[arg(long, default_value = "docs/tour.md")]
    out: PathBuf,
    /// Leaves the document alone, and fails if its commands are not those of the tour.
    #[arg(long)]
    check: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let mut terminated = signal(SignalKind::terminate())?;
    // What is dropped here takes processes and namespaces with it.
    let transcript = tokio::select! {
        taken = tour::run() => taken?,
        interrupted = tokio::signal::ctrl_c() => { interrupted?; bail!("interrupted") }
        _ = terminated.recv() => bail!("terminated"),
    };
    if !options.check {
        fs::write(&options.out, transcript.text()).with_context(|| options.out.display().to_string())?;
        eprintln!("wrote {}", options.out.display());
        return Ok(());
    }
    let written = fs::read_to_string(&options.out).with_context(|| options.out.display().to_string())?;
    // Ids and times differ from run to run; the checks of the steps have looked at what came out.
    let (written, taken) = (tour::commands(&written), tour::commands(transcript.text()));
    ensure!(written == taken, "{} has other commands than the tour: run `make tour`", options.out.display());
    eprintln!(
        "the {} commands in {} are those of the tour, and each did what it says",
        taken.len(),
        options.out.display()
    );
    Ok(())
}
