//! The embedded guest alone, for this crate's tests: what `hybridmig guest` is in the program.

use std::process::ExitCode;

use hybridmig_engine::guest::workload::{GuestOptions, run};

fn main() -> ExitCode {
    match GuestOptions::from_args(std::env::args_os().skip(1)).and_then(run) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            eprintln!("guest: {error}: {}", cause.unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}
