//! Who waits for which block, and the locks that order placing, the guest's first writes and the
//! beginning of waits. A block has one lock of [`SHARDS`]; nobody holds one while it waits.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::map::GranuleMap;
use super::stats::Stats;

const SHARDS: u32 = 256;
/// Blocks that are locked together, at most: what a request that needs the same lock waits for.
pub(super) const LOCKED_TOGETHER: u32 = 32;

/// What goes on when missing granules are here.
pub(crate) trait Resume: Send + Sync {
    /// They are here. Called once, on the thread that placed the last of them: must not block.
    fn resume(self: Arc<Self>);
    /// Nobody is interested any more.
    fn abandoned(&self) -> bool;
}

/// Something that waits for granules of one or more blocks.
pub(super) struct Waiting {
    /// Blocks that it waits for, and one more while these are still being entered.
    left: AtomicUsize,
    since: Instant,
    then: Arc<dyn Resume>,
    stats: Arc<Stats>,
}

impl Waiting {
    pub(super) fn new(then: Arc<dyn Resume>, stats: Arc<Stats>) -> Arc<Self> {
        stats.waiting.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self {
            left: AtomicUsize::new(1),
            since: Instant::now(),
            then,
            stats,
        })
    }

    /// One reason less to wait; goes on after the last.
    pub(super) fn one_less(&self) {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.stats.waited(self.since);
            Arc::clone(&self.then).resume();
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.stats.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Those go on that waited for what is here now. No lock of a block may be held.
pub(super) fn go_on(ready: &[Arc<Waiting>]) {
    for waiting in ready {
        waiting.one_less();
    }
}

/// Blocks that were asked for and are not complete. An entry lasts until its block is.
#[derive(Default)]
pub(super) struct Shard {
    asked: HashMap<u32, Vec<Waiter>>,
}

struct Waiter {
    /// The granules it needs, as bits of the block's word in the map.
    needs: u64,
    waiting: Arc<Waiting>,
}

/// All locks.
pub(super) struct Shards(Vec<Mutex<Shard>>);

impl Shards {
    pub(super) fn new() -> Self {
        Self((0..SHARDS).map(|_| Mutex::default()).collect())
    }

    /// Locks up to [`LOCKED_TOGETHER`] blocks, always in the order of the locks.
    pub(super) fn lock(&self, first: u32, count: u32) -> Locked<'_> {
        assert!(
            (1..=LOCKED_TOGETHER).contains(&count),
            "callers split at {LOCKED_TOGETHER} blocks"
        );
        let start = first % SHARDS;
        // Those past the end of the table come first in it.
        let wrapped = (start + count).saturating_sub(SHARDS);
        let mut shards: Vec<_> = (0..wrapped)
            .chain(start..start + count - wrapped)
            .map(|index| lock(&self.0[index as usize]))
            .collect();
        shards.rotate_left(wrapped as usize);
        Locked { first, shards }
    }

    /// Forgets waits that nobody is interested in any more.
    pub(super) fn sweep(&self) {
        for shard in &self.0 {
            for waiters in lock(shard).asked.values_mut() {
                waiters.retain(|waiter| !waiter.waiting.then.abandoned());
            }
        }
    }
}

/// The locks of consecutive blocks.
pub(super) struct Locked<'a> {
    first: u32,
    shards: Vec<MutexGuard<'a, Shard>>,
}

impl Locked<'_> {
    /// Enters a wait for granules of a block, one that is locked. True if the block has to be
    /// asked for.
    pub(super) fn wait(&mut self, block: u32, needs: u64, waiting: &Arc<Waiting>) -> bool {
        waiting.left.fetch_add(1, Ordering::SeqCst);
        let asked = &mut self.shards[(block - self.first) as usize].asked;
        let new = !asked.contains_key(&block);
        asked.entry(block).or_default().push(Waiter {
            needs,
            waiting: Arc::clone(waiting),
        });
        new
    }

    /// Ends the waits for what is here now. The result goes on once the locks are given back.
    pub(super) fn arrived(&mut self, map: &GranuleMap) -> Vec<Arc<Waiting>> {
        let mut ready = Vec::new();
        for (block, shard) in (self.first..).zip(&mut self.shards) {
            let Some(waiters) = shard.asked.get_mut(&block) else {
                continue;
            };
            let missing = map.missing_of(block, &ALL);
            let mut index = 0;
            while let Some(waiter) = waiters.get(index) {
                if waiter.needs & missing == 0 {
                    ready.push(waiters.swap_remove(index).waiting);
                } else {
                    index += 1;
                }
            }
            if missing == 0 {
                shard.asked.remove(&block);
            }
        }
        ready
    }
}

const ALL: Range<u64> = 0..u64::MAX;

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    // Entries are added and taken whole, whatever a panicking thread was doing.
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
