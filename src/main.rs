//! The command line of hybridmig: parses, starts, reports. No migration logic lives here.

mod cli;
mod commands;
mod control;
mod foretold;
mod progress;
mod show;
mod show_profile;
mod units;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(cli.verbose);
    let result = match cli.command {
        Command::Send(args) => commands::send::run(args),
        Command::Recv(args) => commands::recv::run(args),
        Command::Check(args) => commands::check::run(args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Profile(args) => commands::profile::run(args),
        Command::Keys(args) => commands::keys::run(args),
        Command::Demo(args) => commands::demo::run(args),
        Command::Guest(args) => commands::guest::run(args),
        Command::Netem(args) => commands::netem::run(args.command),
        Command::Relay(args) => commands::relay::run(args),
        Command::Limit(args) => commands::limit::run(&args),
        Command::Resolve(args) => commands::resolve::run(args),
        Command::Completions { shell } => Ok(commands::generate::completions(shell)),
        Command::Man { directory } => commands::generate::man(&directory),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hybridmig: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_logging(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => {
            "warn,hybridmig=info,hybridmig_engine=info,hybridmig_transport=info,hybridmig_pager=info"
        }
        _ => {
            "info,hybridmig=debug,hybridmig_engine=debug,hybridmig_transport=debug,hybridmig_pager=debug"
        }
    };
    let filter =
        EnvFilter::try_from_env("HYBRIDMIG_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}
