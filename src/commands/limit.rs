//! `hybridmig limit`: another cap for a running `send`.

use std::process::ExitCode;

use super::state_dir;
use crate::cli::LimitArgs;
use crate::control::{self, Wish};
use crate::units::show_rate;

/// Tells the session.
pub fn run(args: &LimitArgs) -> anyhow::Result<ExitCode> {
    let directory = state_dir(args.state_dir.as_deref())?;
    let cap = args.rate.0;
    let session = control::tell(&directory, args.session, &Wish::RateLimit(cap))?;
    match cap {
        Some(cap) => println!("session {session}: at most {}", show_rate(cap as f64)),
        None => println!("session {session}: no cap"),
    }
    Ok(ExitCode::SUCCESS)
}
