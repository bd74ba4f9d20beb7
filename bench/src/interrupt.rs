//! Ctrl-C and SIGTERM, as something to ask for. A series must end in order: what a run made in the kernel
//! (namespaces, settings) is taken back by whoever made it, which a signal's default would skip.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGINT, SIGTERM};

/// Whether somebody wants this process to end.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on SIGINT and SIGTERM only set this.
    pub fn catch() -> Result<Self> {
        let this = Self::default();
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, this.0.clone())
                .with_context(|| format!("signal {signal} cannot be caught"))?;
        }
        Ok(this)
    }

    /// Whether it was asked for.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Fails if it was asked for: to be called in every loop that waits.
    pub fn check(&self) -> Result<()> {
        if self.is_set() {
            bail!("interrupted");
        }
        Ok(())
    }
}
