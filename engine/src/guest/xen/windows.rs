//! A domain's memory as it is read at the source: mapped in windows that stay, since mapping costs a paravirtual dom0
//! far more than copying. A mapping shows the memory that a gfn had when it was mapped; a guest may give a page back
//! and get other memory for it. Xen reports such a page as written, so what was reported since its window was mapped
//! is mapped anew for each reading.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hybridmig_pager::xen::{Mapping, Xen};

use crate::blocks::BlockSet;

/// Pages of a window.
const WINDOW: u64 = 256;
/// The most windows that are kept: 4 GiB.
const WINDOWS: usize = 4096;
/// With more pages than this to be mapped one by one, a window is mapped anew.
const REWRITTEN: u64 = 48;

/// See the module's text.
pub(super) struct Windows {
    xen: Arc<Xen>,
    domain: u32,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    windows: BTreeMap<u64, Arc<Mapping>>,
    /// Gfns that were reported as written since their window was mapped.
    rewritten: BlockSet,
}

impl Kept {
    fn forget(&mut self, window: u64) {
        self.windows.remove(&window);
        self.rewritten.remove_range(range(window));
    }
}

/// The gfns of a window; those of 16 TiB and more are not supported.
fn range(window: u64) -> std::ops::Range<u32> {
    let first = window * WINDOW;
    first as u32..(first + WINDOW) as u32
}

impl Windows {
    pub(super) fn new(xen: Arc<Xen>, domain: u32) -> Self {
        Self {
            xen,
            domain,
            kept: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These were written since the last report.
    pub(super) fn reported(&self, dirty: &BlockSet) {
        let mut kept = self.lock();
        let mut windows: Vec<u64> = dirty.iter().map(|gfn| u64::from(gfn) / WINDOW).collect();
        windows.dedup();
        for window in windows {
            if !kept.windows.contains_key(&window) {
                continue;
            }
            let new: BlockSet = dirty.range(range(window)).collect();
            kept.rewritten |= new;
            if kept.rewritten.range_cardinality(range(window)) > REWRITTEN {
                kept.forget(window);
            }
        }
    }

    /// Lets go of the domain's memory.
    pub(super) fn clear(&self) {
        *self.lock() = Kept::default();
    }

    /// Copies one page; one that the domain does not have reads as zero.
    pub(super) fn read(&self, gfn: u64, into: &mut [u8]) -> io::Result<()> {
        let number = gfn / WINDOW;
        let mut kept = self.lock();
        if kept.windows.contains_key(&number) && kept.rewritten.contains(gfn as u32) {
            drop(kept);
            self.xen.map(self.domain, gfn, 1, false)?.read(0, into);
            return Ok(());
        }
        let window = if let Some(window) = kept.windows.get(&number) {
            Arc::clone(window)
        } else {
            if kept.windows.len() >= WINDOWS
                && let Some(oldest) = kept.windows.keys().next().copied()
            {
                kept.forget(oldest);
            }
            let pages = WINDOW as usize;
            let window = Arc::new(self.xen.map(self.domain, number * WINDOW, pages, false)?);
            kept.windows.insert(number, Arc::clone(&window));
            window
        };
        drop(kept);
        window.read((gfn % WINDOW) as usize, into);
        Ok(())
    }
}
