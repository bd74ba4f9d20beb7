//! The guest's threads: workers that access memory and those that use the disk. They make accesses at
//! the profile's rate, stop at the boundary between two accesses when the guest is frozen, and keep
//! all that they need beside memory and disk in a [`WorkerState`] or [`DiskWorkerState`]. This file
//! must never let a worker stop in the middle of an access, nor wait for one that waits for a page
//! without a deadline.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::disk::{
    BLOCK, Disk, DiskContents, DiskHand, DiskIo, DiskPattern, DiskPatternState, DiskSpec,
    DiskWorkerState, Share, Trouble, table_pages,
};
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

/// What the threads know beside memory and disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct States {
    /// By worker.
    memory: Vec<WorkerState>,
    /// By disk thread.
    disk: Vec<DiskWorkerState>,
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
    disk: Option<Arc<Disk>>,
    stats: Arc<StatsPage>,
    contents: Contents,
    disk_contents: DiskContents,
    plan: Plan,
    slots: Vec<Slot>,
    disk_slots: Vec<DiskSlot>,
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

struct DiskSlot {
    share: Share,
    pattern: DiskPattern,
    /// As in a [`Slot`].
    state: Mutex<DiskWorkerState>,
}

struct Gate {
    /// By thread: the workers, then those of the disk.
    parked: Vec<bool>,
}

/// What a thread does between two looks at the command.
trait Hand {
    /// Accesses made so far.
    fn accesses(&self) -> u64;
    /// Accesses per second at factor 1.
    fn rate(&self) -> f64;
    /// Makes an access and publishes the counters.
    fn access(&mut self);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Command {
    Run = 0,
    Freeze = 1,
    End = 2,
}

impl Workers {
    /// Fills the memory, which must be all zero, and the disk, which must be all holes, and makes the
    /// threads of a new guest, frozen.
    pub fn fill(
        memory: Arc<SharedMemory>,
        disk: Option<Arc<Disk>>,
        stats: Arc<StatsPage>,
        plan: Plan,
    ) -> io::Result<Self> {
        let contents = Contents::new(plan.profile, plan.contents, plan.seed);
        let disk_contents = DiskContents::new(plan.profile, plan.seed);
        let panicked = |_| io::Error::other("a thread panicked while it filled memory or disk");
        let (digests, disk_states) = std::thread::scope(|scope| {
            let fillers: Vec<_> = partitions(plan.threads, worker_pages(&memory, disk.as_deref()))
                .map(|partition| {
                    let memory = &memory;
                    scope.spawn(move || partition.fill(memory, &contents))
                })
                .collect();
            let disk_fillers: Vec<_> = disk
                .iter()
                .flat_map(|disk| shares(&plan, disk, &memory).map(move |share| (disk, share)))
                .map(|(disk, (worker, share))| {
                    let memory = &memory;
                    let pattern = DiskPatternState::new(plan.seed, worker);
                    scope.spawn(move || share.fill(memory, disk, &disk_contents, pattern))
                })
                .collect();
            let digests: Result<Vec<u64>, _> =
                fillers.into_iter().map(|filler| filler.join()).collect();
            let states: io::Result<Vec<_>> = disk_fillers
                .into_iter()
                .map(|filler| filler.join().unwrap_or_else(|panic| Err(panicked(panic))))
                .collect();
            Ok::<_, io::Error>((digests.map_err(panicked)?, states?))
        })?;
        let states = (0..)
            .zip(digests)
            .map(|(worker, digest)| WorkerState {
                pattern: PatternState::new(plan.seed, worker),
                writes: 0,
                digest,
            })
            .collect();
        let states = States {
            memory: states,
            disk: disk_states,
        };
        Self::load(memory, disk, stats, plan, states)
    }

    /// Makes the threads of a guest that was saved, frozen. Touches neither memory nor disk.
    pub fn load(
        memory: Arc<SharedMemory>,
        disk: Option<Arc<Disk>>,
        stats: Arc<StatsPage>,
        plan: Plan,
        states: States,
    ) -> io::Result<Self> {
        let disk_threads = disk.as_ref().map_or(0, |_| disk_threads(&plan));
        if states.memory.len() != plan.threads as usize
            || states.disk.len() != disk_threads as usize
        {
            return Err(io::Error::other("the state has not one entry per thread"));
        }
        let larger = || io::Error::other("the state is of a larger guest");
        let mut slots = Vec::with_capacity(states.memory.len());
        let pages = worker_pages(&memory, disk.as_deref());
        for (partition, state) in partitions(plan.threads, pages).zip(states.memory) {
            let pattern = Pattern::new(plan.profile, plan.threads, partition.data_pages());
            if !pattern.accepts(&state.pattern) {
                return Err(larger());
            }
            slots.push(Slot {
                partition,
                pattern,
                state: Mutex::new(state),
            });
        }
        let mut disk_slots = Vec::with_capacity(states.disk.len());
        let shares = disk.iter().flat_map(|disk| shares(&plan, disk, &memory));
        for ((_, share), state) in shares.zip(states.disk) {
            let pattern = share.pattern(plan.profile);
            if !pattern.accepts(&state.pattern) {
                return Err(larger());
            }
            disk_slots.push(DiskSlot {
                share,
                pattern,
                state: Mutex::new(state),
            });
        }
        stats.set_threads(plan.threads, disk_threads);
        let shared = Arc::new(Shared {
            memory,
            disk,
            stats,
            contents: Contents::new(plan.profile, plan.contents, plan.seed),
            disk_contents: DiskContents::new(plan.profile, plan.seed),
            plan,
            gate: Mutex::new(Gate {
                parked: vec![false; slots.len() + disk_slots.len()],
            }),
            slots,
            disk_slots,
            command: AtomicU8::new(Command::Freeze as u8),
            commanded: Condvar::new(),
            parked: Condvar::new(),
            damage: Mutex::new(Damage::default()),
        });
        for (worker, slot) in (0..).zip(&shared.slots) {
            shared.publish(worker, &lock(&slot.state));
        }
        for (worker, slot) in (0..).zip(&shared.disk_slots) {
            shared.publish_disk(worker, &lock(&slot.state));
        }
        let workers = Self { shared };
        for worker in 0..plan.threads {
            let shared = Arc::clone(&workers.shared);
            std::thread::Builder::new()
                .name(format!("worker {worker}"))
                .spawn(move || shared.work(worker))?;
        }
        for worker in 0..disk_threads {
            let shared = Arc::clone(&workers.shared);
            std::thread::Builder::new()
                .name(format!("disk {worker}"))
                .spawn(move || shared.work_on_disk(worker))?;
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

    /// Stops all threads between two accesses, so that no operation on the disk is under way. If one
    /// does not stop in time, because it waits for a page or a block, all go on; the names of those
    /// that did not stop are the error.
    pub fn freeze(&self, patience: Duration) -> Result<(), Vec<String>> {
        let deadline = Instant::now() + patience;
        self.shared.order(Command::Freeze);
        let mut gate = lock(&self.shared.gate);
        while !gate.parked.iter().all(|parked| *parked) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let late = (0..)
                    .zip(&gate.parked)
                    .filter(|(_, parked)| !**parked)
                    .map(|(thread, _)| self.shared.name(thread))
                    .collect();
                drop(gate);
                self.shared.order(Command::Run);
                return Err(late);
            }
            gate = wait_timeout(&self.shared.parked, gate, left);
        }
        Ok(())
    }

    /// The threads' states. They must be frozen.
    pub fn states(&self) -> States {
        let Shared {
            slots, disk_slots, ..
        } = &*self.shared;
        States {
            memory: slots.iter().map(|slot| *lock(&slot.state)).collect(),
            disk: disk_slots.iter().map(|slot| *lock(&slot.state)).collect(),
        }
    }

    /// Verifies all of guest memory and of the disk while the threads are frozen: number of pages and
    /// sectors, or the damage. Waits for what is missing.
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
            let disk_verifiers = shared.disk.iter().flat_map(|disk| {
                shared.disk_slots.iter().map(move |slot| {
                    let state = *lock(&slot.state);
                    scope.spawn(move || {
                        let Shared {
                            memory,
                            disk_contents,
                            ..
                        } = &**shared;
                        slot.share.verify(memory, disk, disk_contents, &state)
                    })
                })
            });
            let verifiers: Vec<_> = verifiers.into_iter().chain(disk_verifiers).collect();
            let mut damage = Damage::default();
            for verifier in verifiers {
                match verifier.join() {
                    Ok(found) => damage.merge(found),
                    Err(_) => damage.add("a thread panicked while it verified memory or disk"),
                }
            }
            damage
        });
        shared.stats.count_wrong_verified(damage.count);
        // What the workers came across counts too, even where it has been overwritten since.
        damage.merge(self.damage());
        if damage.count == 0 {
            let sectors = shared.disk.as_ref().map_or(0, |disk| disk.sectors());
            Ok(u64::from(shared.memory.pages()) + u64::from(sectors))
        } else {
            Err(damage)
        }
    }

    /// What the threads have found to be wrong so far, operations on the disk that failed included.
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

    /// What a thread is called: the workers count first.
    fn name(&self, thread: u32) -> String {
        match thread.checked_sub(self.plan.threads) {
            None => format!("worker {thread}"),
            Some(disk) => format!("disk {disk}"),
        }
    }

    fn work(&self, worker: u32) {
        self.stats.set_thread_id(worker, thread_id());
        let slot = &self.slots[worker as usize];
        let mut buffer = [0; PAGE];
        self.work_with(worker, |due| {
            let mut hand = MemoryHand {
                shared: self,
                worker,
                slot,
                state: lock(&slot.state),
                buffer: &mut buffer,
            };
            self.burst(&mut hand, due)
        });
    }

    fn work_on_disk(&self, worker: u32) {
        self.stats.set_disk_thread_id(worker, thread_id());
        let slot = &self.disk_slots[worker as usize];
        let Some(disk) = &self.disk else {
            unreachable!("a disk thread without a disk");
        };
        let mut hand = DiskHand {
            share: &slot.share,
            pattern: &slot.pattern,
            memory: &self.memory,
            contents: &self.disk_contents,
            stats: &self.stats,
            io: DiskIo::new(Arc::clone(disk)),
            buffer: vec![0; BLOCK],
            unflushed: 0,
        };
        self.work_with(self.plan.threads + worker, |due| {
            let mut hand = DiskThread {
                shared: self,
                worker,
                state: lock(&slot.state),
                hand: &mut hand,
            };
            self.burst(&mut hand, due)
        });
    }

    /// Runs the thread with this number until it is to end. `burst` makes what accesses are due; true
    /// if it has none left to make at all.
    fn work_with(&self, thread: u32, mut burst: impl FnMut(&mut Instant) -> bool) {
        while self.park(thread) {
            let mut due = Instant::now();
            while self.ordered(Command::Run) {
                if burst(&mut due) {
                    self.sleep(None);
                } else if self.plan.rate_factor > 0.0 {
                    self.sleep(Some(due.max(Instant::now() + TICK)));
                }
            }
        }
    }

    /// Waits while the guest is frozen; false if the thread is to end.
    fn park(&self, thread: u32) -> bool {
        let mut gate = lock(&self.gate);
        while self.ordered(Command::Freeze) {
            gate.parked[thread as usize] = true;
            self.parked.notify_all();
            gate = self
                .commanded
                .wait(gate)
                .unwrap_or_else(PoisonError::into_inner);
        }
        gate.parked[thread as usize] = false;
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

    /// Makes the accesses that are due; true if there are none left to make at all.
    fn burst(&self, hand: &mut dyn Hand, due: &mut Instant) -> bool {
        let mut now = Instant::now();
        let mut left = BURST;
        while self.ordered(Command::Run) {
            if self
                .plan
                .max_accesses
                .is_some_and(|max| hand.accesses() >= max)
            {
                return true;
            }
            let throttled = self.plan.rate_factor > 0.0;
            if if throttled { *due > now } else { left == 0 } {
                break;
            }
            left = left.saturating_sub(1);
            let rate = hand.rate() * self.plan.rate_factor;
            hand.access();
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

    fn publish(&self, worker: u32, state: &WorkerState) {
        self.stats
            .publish(worker, state.pattern.accesses(), state.writes);
    }

    fn publish_disk(&self, worker: u32, state: &DiskWorkerState) {
        let operations = state.pattern.operations();
        self.stats
            .publish_disk(worker, operations, state.sectors, state.writes);
    }

    fn found_wrong(&self, worker: u32, wrong: impl ToString) {
        let wrong = wrong.to_string();
        self.stats.count_wrong(worker);
        tracing::error!("wrong contents in the guest: {wrong}");
        lock(&self.damage).add(wrong);
    }
}

struct MemoryHand<'a> {
    shared: &'a Shared,
    worker: u32,
    slot: &'a Slot,
    state: MutexGuard<'a, WorkerState>,
    buffer: &'a mut Page,
}

impl Hand for MemoryHand<'_> {
    fn accesses(&self) -> u64 {
        self.state.pattern.accesses()
    }

    fn rate(&self) -> f64 {
        self.slot.pattern.rate(&self.state.pattern)
    }

    fn access(&mut self) {
        let Self {
            slot,
            state,
            buffer,
            ..
        } = self;
        let access = slot.pattern.next(&mut state.pattern);
        let Shared {
            memory, contents, ..
        } = self.shared;
        let partition = &slot.partition;
        match partition.read(memory, contents, access.index, buffer) {
            Ok(generation) if access.write => {
                let change = partition.write(memory, contents, access.index, generation, buffer);
                state.digest = state.digest.wrapping_add(change);
                state.writes = state.writes.wrapping_add(1);
            }
            Ok(_) => {}
            // A wrong page is never written: it stays to be seen.
            Err(wrong) => self.shared.found_wrong(self.worker, wrong),
        }
        self.shared.publish(self.worker, &self.state);
    }
}

struct DiskThread<'a, 'b> {
    shared: &'a Shared,
    worker: u32,
    state: MutexGuard<'a, DiskWorkerState>,
    hand: &'b mut DiskHand<'a>,
}

impl Hand for DiskThread<'_, '_> {
    fn accesses(&self) -> u64 {
        self.state.pattern.operations()
    }

    fn rate(&self) -> f64 {
        let threads = self.shared.disk_slots.len() as f64;
        f64::from(DiskSpec::of(self.shared.plan.profile).rate()) / threads
    }

    fn access(&mut self) {
        let Self {
            shared,
            worker,
            state,
            hand,
        } = self;
        let flush_every = DiskSpec::of(shared.plan.profile).flush_every;
        let ending = || shared.ordered(Command::End);
        hand.operate(state, flush_every, &ending, |trouble| match trouble {
            Trouble::Wrong(wrong) => shared.found_wrong(*worker, wrong),
            Trouble::Failed(failure) => {
                shared.stats.count_disk_error();
                tracing::error!("{failure}");
                lock(&shared.damage).add(failure);
            }
        });
        self.shared.publish_disk(self.worker, &self.state);
    }
}

fn thread_id() -> u32 {
    let id = rustix::thread::gettid().as_raw_nonzero().get();
    id.unsigned_abs()
}

/// Pages of memory that the workers own; the rest hold what belongs to the disk.
fn worker_pages(memory: &SharedMemory, disk: Option<&Disk>) -> u32 {
    memory.pages() - disk.map_or(0, |disk| table_pages(disk.sectors()))
}

/// Number of threads that use the disk, where there is one: no more than there are workers.
fn disk_threads(plan: &Plan) -> u32 {
    DiskSpec::of(plan.profile).threads.min(plan.threads)
}

/// The shares of the disk, by thread.
fn shares(
    plan: &Plan,
    disk: &Disk,
    memory: &SharedMemory,
) -> impl Iterator<Item = (u32, Share)> + use<> {
    let threads = disk_threads(plan);
    let shares: Vec<_> = (0..threads)
        .map(|worker| (worker, Share::of(worker, threads, disk, memory)))
        .collect();
    shares.into_iter()
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
