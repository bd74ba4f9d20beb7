//! `hybridmig relay`: an emulated link between two processes, for UDP only.

use std::process::ExitCode;

use anyhow::Context;
use hybridmig_netem::{Relay, RelayConfig};

use super::{cancel_on_signals, runtime};
use crate::cli::RelayArgs;
use crate::units::{show_bytes, show_time};

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
    for (name, way) in [("to the target", stats.forward), ("back", stats.back)] {
        eprintln!(
            "{name}: {} packets, {}; lost at random {}, in the queue {}, while down {}, in the \
             relay itself {}; late by {} at the most",
            way.packets,
            show_bytes(way.bytes),
            way.dropped_loss,
            way.dropped_queue,
            way.dropped_down,
            way.dropped_relay,
            show_time(way.lateness_max),
        );
    }
    Ok(ExitCode::SUCCESS)
}
