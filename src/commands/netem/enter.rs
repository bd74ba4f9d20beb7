//! `hybridmig netem enter`: a command at the other end, from within `hybridmig netem run`.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, anyhow};
use nix::sched::{CloneFlags, setns};

use super::run::{FAR, NEAR};
use crate::cli::{EndArg, NetemEnterArgs};

/// Takes this process to the other end and becomes the command.
pub fn run(args: &NetemEnterArgs) -> anyhow::Result<ExitCode> {
    let variable = match args.end {
        EndArg::Near => NEAR,
        EndArg::Far => FAR,
    };
    let path = std::env::var_os(variable).with_context(|| {
        format!(
            "{variable} is not set: this works within `hybridmig netem run`; from other terminals \
             use its --name and `ip netns exec`"
        )
    })?;
    let namespace = File::open(&path).with_context(|| {
        format!(
            "no namespace at {}; has `hybridmig netem run` ended?",
            path.display()
        )
    })?;
    setns(&namespace, CloneFlags::CLONE_NEWNET)
        .context("cannot enter the namespace; that takes root")?;
    let mut command = command(&args.command);
    // Returns only when it has failed.
    let error = command.exec();
    let program = command.get_program().display();
    Err(anyhow!(error).context(format!("cannot run {program}")))
}

/// The command that was asked for, or a shell.
pub fn command(words: &[OsString]) -> Command {
    if let Some((program, arguments)) = words.split_first() {
        let mut command = Command::new(program);
        command.args(arguments);
        return command;
    }
    let shell = std::env::var_os("SHELL").filter(|shell| !shell.is_empty());
    Command::new(shell.unwrap_or_else(|| "/bin/sh".into()))
}
