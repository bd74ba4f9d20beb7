//! `hybridmig guest`: the embedded guest.

use std::process::ExitCode;

use hybridmig_engine::guest::workload::{self, Ending, GuestOptions};

use crate::cli::GuestArgs;

/// Runs the guest until it is stopped over its control socket.
pub fn run(args: GuestArgs) -> anyhow::Result<ExitCode> {
    let options = GuestOptions {
        disk_bytes: args.disk_size,
        disk: args.disk,
        incoming: args.incoming,
        profile: args.profile,
        contents: args.contents,
        seed: args.seed,
        threads: args.threads,
        rate_factor: args.rate_factor,
        max_accesses: args.max_accesses,
        detach: args.detach,
        die_with: args.die_with,
        end_when_abandoned: args.end_when_abandoned,
        ..GuestOptions::new(args.control, args.size)
    };
    match workload::run(options)? {
        Ending::Stopped => tracing::info!("stopped over its control socket"),
        Ending::Abandoned => tracing::info!("nobody came for this guest"),
        Ending::Orphaned => tracing::info!("the process that it was to end with has ended"),
    }
    // Not `exit`: threads may still wait for pages that will never come, and must not be joined.
    Ok(ExitCode::SUCCESS)
}
