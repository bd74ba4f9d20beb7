//! `hybridmig relay`: an emulated link between two processes, for UDP only.

use std::process::ExitCode;

use anyhow::Context;
use hybridmig_netem::{Relay, RelayConfig};

use super::{cancel_on_signals, runtime, show_traffic};
use crate::cli::RelayArgs;

/// Relays until a signal comes.
pub fn run(args: RelayArgs) -> anyhow::Result<ExitCode> {
    let RelayArgs {
        listen,
        target,
        link,
        seed,
    } = args;
    let relay = Relay::start(RelayConfig {
        listen,
        target,
        link: link.clone(),
        seed,
    })?;
    eprintln!(
        "relaying {} to {target} over a link of: {link}",
        relay.local_addr()
    );
    runtime()?.block_on(async {
        let mut cancel = cancel_on_signals("")?;
        cancel
            .wait_for(Option::is_some)
            .await
            .context("no signal can come any more")?;
        Ok::<_, anyhow::Error>(())
    })?;
    let stats = relay.stop();
    show_traffic(["to the target", "back"], &stats);
    Ok(ExitCode::SUCCESS)
}
