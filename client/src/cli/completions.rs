//! `uncloud completions`.

use clap::Args;
use clap_complete::Shell;

use super::Error;
use crate::output;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Error> {
    // Into memory first: clap_complete panics when its writer fails, as a closed pipe does.
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut super::definition(), "uncloud", &mut script);
    output::print_raw(&script)?;
    Ok(())
}
