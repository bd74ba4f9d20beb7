//! `hybridmig completions` and `hybridmig man`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::{Cli, EXIT_CODES};

/// Prints a completion script.
pub fn completions(shell: Shell) -> ExitCode {
    clap_complete::generate(
        shell,
        &mut Cli::command(),
        "hybridmig",
        &mut std::io::stdout(),
    );
    ExitCode::SUCCESS
}

/// Writes one man page for hybridmig and one for each subcommand.
pub fn man(directory: &Path) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let command = Cli::command().after_help(EXIT_CODES);
    clap_mangen::generate_to(command, directory)
        .with_context(|| format!("cannot write man pages to {}", directory.display()))?;
    Ok(ExitCode::SUCCESS)
}
