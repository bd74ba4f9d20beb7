//! The guest's worker threads: they make accesses at the profile's rate, stop at the boundary
//! between two accesses when the guest is frozen, and keep all that they need beside guest memory
//! in a [`WorkerState`]. This file must never let a worker stop in the middle of an access, nor
//! wait for one that waits for a page without a deadline.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::memory::SharedMemory;
use super::pages::{Contents, PAGE, Page};
use super::partition::{Damage, Partition};
use super::pattern::{Pattern, PatternState};
use super::profile::{ContentShares, Profile};
use super::stats::StatsPage;

/// How often a throttled worker looks at its clock at most.
const TICK: Duration = Duration::from_millis(1);
/// An access that takes longer has been stalled (a page was missing): the time is lost work, which
/// is not made up for later. Late wake-ups are, up to [`CATCH_UP`].
const STALL: Duration = Duration::from_millis(1);
const CATCH_UP: Duration = Duration::from_millis(20);
/// Accesses of an unthrottled worker between two releases of its state.
const BURST: u32 = 256;

/// What a guest does. Travels with its state.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The access pattern.
    pub profile: Profile,
    /// What the pages are filled with.
    pub contents: ContentShares,
    /// Decides all contents and accesses.
    pub seed: u64,
    /// Number of workers, 1 to [`super::stats::MAX_THREADS`].
    pub threads: u32,
    /// Multiplies the profile's rates; 0 means as fast as possible.
    pub rate_factor: f64,
    /// Each worker rests for good after this many accesses.
    pub max_accesses: Option<u64>,
}

/// What a worker knows beside guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerState {
    pattern: PatternState,
    /// Accesses that wrote.
    writes: u64,
    /// Wrapping sum of the digest terms of all data pages.
    digest: u64,
}

/// All workers of a guest.
pub struct Workers {
    shared: Arc<Shared>,
}

struct Shared {
    memory: Arc<SharedMemory>,
    stats: Arc<StatsPage>,
    contents: Contents,
    plan: Plan,
    slots: Vec<Slot>,
    gate: Mutex<Gate>,
    /// The gate's command, to be looked at between two accesses.
    command: AtomicU8,
    /// Told when the command changes.
    commanded: Condvar,
    /// Told when a worker parks.
    parked: Condvar,
    damage: Mutex<Damage>,
}

struct Slot {
    partition: Partition,
    pattern: Pattern,
    /// Held by the worker while it makes accesses, so free whenever it is parked.
    state: Mutex<WorkerState>,
}

struct Gate {
    parked: Vec<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Command {
    Run = 0,
    Freeze = 1,
    End = 2,
}

impl Workers {
    /// Fills the memory, which must be all zero, and makes the workers of a new guest, frozen.
    pub fn fill(memory: Arc<SharedMemory>, stats: Arc<StatsPage>, plan: Plan) -> io::Result<Self> {
        let contents = Contents::new(plan.profile, plan.contents, plan.seed);
        let digests = std::thread::scope(|scope| {
            let fillers: Vec<_> = partitions(plan.threads, memory.pages())
                .map(|partition| {
                    let memory = &memory;
                    scope.spawn(move || partition.fill(memory, &contents))
                })
                .collect();
            fillers
                .into_iter()
                .map(|filler| filler.join())
                .collect::<Result<Vec<u64>, _>>()
        })
        .map_err(|_| io::Error::other("a thread panicked while it filled the memory"))?;
        let states = (0..)
            .zip(digests)
            .map(|(worker, digest)| WorkerState {
                pattern: PatternState::new(plan.seed, worker),
                writes: 0,
                digest,
            })
            .collect();
        Self::load(memory, stats, plan, states)
    }

    /// Makes the workers of a guest that was saved, frozen. Touches no guest memory.
    pub fn load(
        memory: Arc<SharedMemory>,
        stats: Arc<StatsPage>,
        plan: Plan,
        states: Vec<WorkerState>,
    ) -> io::Result<Self> {
        if states.len() != plan.threads as usize {
            return Err(io::Error::other("the state has not one entry per worker"));
        }
        let mut slots = Vec::with_capacity(states.len());
        for (partition, state) in partitions(plan.threads, memory.pages()).zip(states) {
            let pattern = Pattern::new(plan.profile, plan.threads, partition.data_pages());
            if !pattern.accepts(&state.pattern) {
                return Err(io::Error::other("the state is of a larger guest"));
            }
            slots.push(Slot {
                partition,
                pattern,
                state: Mutex::new(state),
            });
        }
        stats.set_threads(plan.threads);
        let shared = Arc::new(Shared {
            memory,
            stats,
            contents: Contents::new(plan.profile, plan.contents, plan.seed),
            plan,
            slots,
            gate: Mutex::new(Gate {
                parked: vec![false; plan.threads as usize],
            }),
            command: AtomicU8::new(Command::Freeze as u8),
            commanded: Condvar::new(),
            parked: Condvar::new(),
            damage: Mutex::new(Damage::default()),
        });
        for (worker, slot) in (0..).zip(&shared.slots) {
            shared.publish(worker, &lock(&slot.state));
        }
        let workers = Self { shared };
        for worker in 0..plan.threads {
            let shared = Arc::clone(&workers.shared);
            std::thread::Builder::new()
                .name(format!("worker {worker}"))
                .spawn(move || shared.work(worker))?;
        }
        Ok(workers)
    }

    /// What the guest does.
    pub fn plan(&self) -> &Plan {
        &self.shared.plan
    }

    /// Lets the workers run.
    pub fn run(&self) {
        self.shared.order(Command::Run);
    }

    /// Stops all workers between two accesses. If one does not stop in time, because it waits for a
    /// page, all go on; the names of those that did not stop are the error.
    pub fn freeze(&self, patience: Duration) -> Result<(), Vec<u32>> {
        let deadline = Instant::now() + patience;
        self.shared.order(Command::Freeze);
        let mut gate = lock(&self.shared.gate);
        while !gate.parked.iter().all(|parked| *parked) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let late = (0..)
                    .zip(&gate.parked)
                    .filter(|(_, parked)| !**parked)
                    .map(|(worker, _)| worker)
                    .collect();
                drop(gate);
                self.shared.order(Command::Run);
                return Err(late);
            }
            gate = wait_timeout(&self.shared.parked, gate, left);
        }
        Ok(())
    }

    /// The workers' states. They must be frozen.
    pub fn states(&self) -> Vec<WorkerState> {
        self.shared
            .slots
            .iter()
            .map(|slot| *lock(&slot.state))
            .collect()
    }

    /// Verifies all of guest memory while the workers are frozen: number of pages, or the damage.
    /// Waits for pages that are missing.
    pub fn verify(&self) -> Result<u64, Damage> {
        let shared = &self.shared;
        let mut damage = std::thread::scope(|scope| {
            let verifiers: Vec<_> = shared
                .slots
                .iter()
                .map(|slot| {
                    let digest = lock(&slot.state).digest;
                    scope.spawn(move || {
                        let Shared {
                            memory, contents, ..
                        } = &**shared;
                        slot.partition.verify(memory, contents, digest)
                    })
                })
                .collect();
            let mut damage = Damage::default();
            for verifier in verifiers {
                match verifier.join() {
                    Ok(found) => damage.merge(found),
                    Err(_) => damage.add("a thread panicked while it verified the memory"),
                }
            }
            damage
        });
        shared.stats.count_wrong_verified(damage.count);
        // What the workers came across counts too, even where it has been overwritten since.
        damage.merge(self.damage());
        if damage.count == 0 {
            Ok(u64::from(shared.memory.pages()))
        } else {
            Err(damage)
        }
    }

    /// What the workers have found to be wrong so far.
    pub fn damage(&self) -> Damage {
        lock(&self.shared.damage).clone()
    }
}

impl Drop for Workers {
    /// Tells the threads to end. One that waits for a page cannot be waited for.
    fn drop(&mut self) {
        self.shared.order(Command::End);
    }
}

impl Shared {
    fn order(&self, command: Command) {
        // Under the gate, so that no worker goes to sleep past the change.
        let gate = lock(&self.gate);
        self.command.store(command as u8, Ordering::Relaxed);
        self.commanded.notify_all();
        drop(gate);
    }

    fn ordered(&self, command: Command) -> bool {
        self.command.load(Ordering::Relaxed) == command as u8
    }

    fn work(&self, worker: u32) {
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        self.stats.set_thread_id(worker, id.unsigned_abs());
        let slot = &self.slots[worker as usize];
        let mut buffer = [0; PAGE];
        while self.park(worker) {
            let mut due = Instant::now();
            while self.ordered(Command::Run) {
                let mut state = lock(&slot.state);
                let rested = self.burst(worker, slot, &mut state, &mut due, &mut buffer);
                drop(state);
                if rested {
                    self.sleep(None);
                } else if self.plan.rate_factor > 0.0 {
                    self.sleep(Some(due.max(Instant::now() + TICK)));
                }
            }
        }
    }

    /// Waits while the guest is frozen; false if the thread is to end.
    fn park(&self, worker: u32) -> bool {
        let mut gate = lock(&self.gate);
        while self.ordered(Command::Freeze) {
            gate.parked[worker as usize] = true;
            self.parked.notify_all();
            gate = self
                .commanded
                .wait(gate)
                .unwrap_or_else(PoisonError::into_inner);
        }
        gate.parked[worker as usize] = false;
        !self.ordered(Command::End)
    }

    fn sleep(&self, until: Option<Instant>) {
        let mut gate = lock(&self.gate);
        while self.ordered(Command::Run) {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            match left {
                Some(left) if left.is_zero() => return,
                Some(left) => gate = wait_timeout(&self.commanded, gate, left),
                None => {
                    gate = self
                        .commanded
                        .wait(gate)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Makes the accesses that are due; true if the worker has none left to make at all.
    fn burst(
        &self,
        worker: u32,
        slot: &Slot,
        state: &mut WorkerState,
        due: &mut Instant,
        buffer: &mut Page,
    ) -> bool {
        let mut now = Instant::now();
        let mut left = BURST;
        while self.ordered(Command::Run) {
            if self
                .plan
                .max_accesses
                .is_some_and(|max| state.pattern.accesses() >= max)
            {
                return true;
            }
            let throttled = self.plan.rate_factor > 0.0;
            if if throttled { *due > now } else { left == 0 } {
                break;
            }
            left = left.saturating_sub(1);
            let rate = slot.pattern.rate(&state.pattern) * self.plan.rate_factor;
            self.access(worker, slot, state, buffer);
            self.publish(worker, state);
            if throttled {
                let started = now;
                now = Instant::now();
                let spent = now - started;
                if spent > STALL {
                    *due += spent;
                }
                *due += Duration::from_secs_f64(1.0 / rate);
                if let Some(earliest) = now.checked_sub(CATCH_UP) {
                    *due = (*due).max(earliest);
                }
            }
        }
        false
    }

    fn access(&self, worker: u32, slot: &Slot, state: &mut WorkerState, buffer: &mut Page) {
        let access = slot.pattern.next(&mut state.pattern);
        let Shared {
            memory, contents, ..
        } = self;
        match slot.partition.read(memory, contents, access.index, buffer) {
            Ok(generation) if access.write => {
                let change =
                    slot.partition
                        .write(memory, contents, access.index, generation, buffer);
                state.digest = state.digest.wrapping_add(change);
                state.writes = state.writes.wrapping_add(1);
            }
            Ok(_) => {}
            // A wrong page is never written: it stays to be seen.
            Err(wrong) => {
                self.stats.count_wrong(worker);
                tracing::error!("wrong contents in the guest: {wrong}");
                lock(&self.damage).add(wrong);
            }
        }
    }

    fn publish(&self, worker: u32, state: &WorkerState) {
        self.stats
            .publish(worker, state.pattern.accesses(), state.writes);
    }
}

fn partitions(threads: u32, pages: u32) -> impl Iterator<Item = Partition> {
    (0..threads).map(move |worker| Partition::of(worker, threads, pages))
}

/// A panicking holder leaves nothing half-done in these mutexes that the verification would miss.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_timeout<'a, T>(
    condition: &Condvar,
    guard: MutexGuard<'a, T>,
    left: Duration,
) -> MutexGuard<'a, T> {
    condition
        .wait_timeout(guard, left)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}

#[cfg(test)]
mod tests;
