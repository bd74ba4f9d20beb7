//! Durability: contents first, then the map's word that they are here.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::image::DiskImage;
use crate::PagerError;

/// Groups flushes that wait for each other into one.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    /// Flushes that were asked for.
    asked: AtomicU64,
    /// Of these, how many are done: all that had been asked for when the last one began.
    done: Mutex<u64>,
    /// A flush has failed. The kernel forgets what it could not write, so that the next one would
    /// succeed and be wrong.
    failed: AtomicBool,
}

impl DiskImage {
    /// Makes every write durable that was answered before the call, on whichever connection.
    pub(crate) fn flush(&self) -> io::Result<()> {
        let flusher = &self.flusher;
        let mine = flusher.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut done = flusher.done.lock().unwrap_or_else(PoisonError::into_inner);
        if flusher.failed.load(Ordering::SeqCst) {
            return Err(io::Error::other(
                "an earlier flush of the image has failed: what it holds durably is unknown",
            ));
        }
        if *done >= mine {
            return Ok(());
        }
        let asked = flusher.asked.load(Ordering::SeqCst);
        // Before the contents are synced: what a bit promises was written before it was cleared.
        let changed = self.map.take_changed();
        let synced = self
            .file
            .sync_data()
            .and_then(|()| self.map.make_durable(&changed));
        if let Err(error) = synced {
            flusher.failed.store(true, Ordering::SeqCst);
            if let Some(faults) = self.faults.get() {
                let kind = error.kind();
                faults.failed(PagerError::os(
                    format!("fdatasync of {} and its map", self.path.display()),
                    io::Error::new(kind, error.to_string()),
                ));
            }
            return Err(error);
        }
        *done = asked;
        Ok(())
    }
}
