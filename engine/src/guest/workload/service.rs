//! The guest behind its control socket: it takes connections, answers requests and keeps track of
//! how the guest stands. This file must never hand guest memory to a system call.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hybridmig_pager::Uffd;
use hybridmig_pager::handover::GuestMapping;
use serde::{Deserialize, Serialize};

use super::control::{Description, FORMAT, Purpose, Reply, Request, Standing, from_hex, to_hex};
use super::disk::{Disk, Served};
use super::memory::SharedMemory;
use super::options::GuestOptions;
use super::process::{Ending, GuestProcessError};
use super::stats::StatsPage;
use super::wire::{self, LineReader};
use super::workers::{Plan, States, Workers};

/// Most control connections at a time.
const MAX_CONNECTIONS: usize = 16;
/// Longest time to wait until a client takes its reply.
const REPLY_PATIENCE: Duration = Duration::from_secs(30);
/// How long a verification of a running guest waits for the workers.
const FREEZE_PATIENCE: Duration = Duration::from_secs(60);
/// How long operations on the disk may take to end when everything is here.
const SETTLE_PATIENCE: Duration = Duration::from_secs(20);

/// What is saved and loaded.
#[derive(Serialize, Deserialize)]
struct SavedGuest {
    format: u32,
    bytes: u64,
    disk_bytes: u64,
    plan: Plan,
    workers: States,
}

/// A guest, shared by the threads of its control connections.
pub struct Service {
    memory: Arc<SharedMemory>,
    disk: Option<Arc<Disk>>,
    stats: Arc<StatsPage>,
    state: Mutex<State>,
    connections: AtomicUsize,
    end_when_abandoned: bool,
    end: SyncSender<Ending>,
}

struct State {
    standing: Standing,
    /// None while the guest waits.
    workers: Option<Arc<Workers>>,
    /// The guest's own copy of the userfaultfd that serves missing pages.
    paging: Option<OwnedFd>,
    /// What the pager gave to keep for the next one.
    kept: Option<OwnedFd>,
    /// A request that is under way without the lock.
    busy: Option<&'static str>,
    /// The process ends because it was abandoned.
    ending: bool,
}

type Answer = Result<(Reply, Vec<OwnedFd>), String>;

impl Service {
    /// Makes memory and disk and, unless the guest is incoming, fills them and lets the threads run.
    /// Reasons to end go to `end`. The disk's file is removed again if this fails, and otherwise by
    /// [`Self::remove_disk`].
    pub fn create(
        options: &GuestOptions,
        end: SyncSender<Ending>,
    ) -> Result<Self, GuestProcessError> {
        let failed = |source| GuestProcessError::Memory {
            bytes: options.bytes,
            source,
        };
        let len = usize::try_from(options.bytes).expect("checked to be at most 8 GiB");
        let memory = Arc::new(SharedMemory::create(c"hybridmig-guest", len).map_err(failed)?);
        let stats = Arc::new(StatsPage::create().map_err(failed)?);
        let disk = make_disk(options)?;
        let (standing, workers) = if options.incoming {
            (Standing::Waiting, None)
        } else {
            let (memory, stats) = (Arc::clone(&memory), Arc::clone(&stats));
            let filled = Workers::fill(memory, disk.clone(), stats, options.plan());
            let workers = filled.map_err(|source| {
                disk.as_deref().map(remove);
                GuestProcessError::System("cannot fill the guest's memory and disk", source)
            })?;
            workers.run();
            (Standing::Running, Some(Arc::new(workers)))
        };
        Ok(Self {
            memory,
            disk,
            stats,
            state: Mutex::new(State {
                standing,
                workers,
                paging: None,
                kept: None,
                busy: None,
                ending: false,
            }),
            connections: AtomicUsize::new(0),
            end_when_abandoned: options.end_when_abandoned,
            end,
        })
    }

    /// Removes the disk's file: the guest has ended.
    pub fn remove_disk(&self) {
        self.disk.as_deref().map(remove);
    }

    /// Serves control connections for ever.
    pub fn accept(self: &Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            match stream.and_then(|stream| self.admit(stream)) {
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(%error, "a control connection was not accepted");
                    // Out of descriptors or threads: neither comes back at once.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        stream.set_write_timeout(Some(REPLY_PATIENCE))?;
        let refuse = |error: String| wire::send(&stream, &Reply::Failed { error }, &[]);
        let peer = rustix::net::sockopt::socket_peercred(&stream)?;
        if !peer.uid.is_root() && peer.uid != rustix::process::geteuid() {
            return refuse("the guest belongs to another user".into());
        }
        if self.connections.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
            self.connections.fetch_sub(1, Ordering::SeqCst);
            return refuse(format!(
                "the guest has {MAX_CONNECTIONS} control connections already: close one"
            ));
        }
        let guest = Arc::clone(self);
        let thread = std::thread::Builder::new().name("control".into());
        let started = thread.spawn(move || {
            if let Err(error) = guest.converse(stream) {
                tracing::debug!(%error, "a control connection broke");
            }
            guest.disconnect();
        });
        if started.is_err() {
            self.connections.fetch_sub(1, Ordering::SeqCst);
        }
        started.map(|_| ())
    }

    fn disconnect(&self) {
        if self.connections.fetch_sub(1, Ordering::SeqCst) == 1 && self.end_when_abandoned {
            self.end_if_abandoned();
        }
    }

    /// Ends a guest that has no connection and never had a state.
    pub fn end_if_abandoned(&self) {
        let mut state = self.lock();
        let alone = self.connections.load(Ordering::SeqCst) == 0;
        if alone && state.standing == Standing::Waiting {
            // A client that comes now must not be told that its state has been loaded.
            state.ending = true;
            self.finish(Ending::Abandoned);
        }
    }

    fn finish(&self, ending: Ending) {
        // A full channel holds an earlier reason to end, which is as good.
        _ = self.end.try_send(ending);
    }

    fn converse(&self, stream: UnixStream) -> io::Result<()> {
        let mut reader = LineReader::new(stream);
        loop {
            let (request, given) = match reader.receive::<Request>() {
                Ok(Some(request)) => request,
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    let error = format!("not a request: {error}");
                    wire::send(reader.stream(), &Reply::Failed { error }, &[])?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let stop = request == Request::Stop;
            let (reply, fds) = self
                .answer(request, given)
                .unwrap_or_else(|error| (Reply::Failed { error }, Vec::new()));
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let sent = wire::send(reader.stream(), &reply, &fds);
            if stop {
                self.finish(Ending::Stopped);
            }
            sent?;
        }
    }

    fn answer(&self, request: Request, given: Vec<OwnedFd>) -> Answer {
        let done = |result: Result<(), String>| result.map(|()| (Reply::Done, Vec::new()));
        match request {
            Request::Describe => Ok((Reply::Description(Box::new(self.describe())), Vec::new())),
            Request::Memory { purpose } => self.hand_over(purpose),
            Request::Keep => done(self.keep(given)),
            Request::Disk => self.show_disk(),
            Request::Serve { by } => done(self.serve(by)),
            Request::Settled => done(self.settle()),
            Request::Freeze { patience_ms } => {
                done(self.freeze(Duration::from_millis(patience_ms.into())))
            }
            Request::Thaw | Request::Resume => done(self.go_on()),
            Request::Save => {
                let state = to_hex(&self.save()?);
                Ok((Reply::State { state }, Vec::new()))
            }
            Request::Load { state } => done(from_hex(&state).and_then(|state| self.load(&state))),
            Request::Verify => {
                let blocks = self.verify()?;
                Ok((Reply::Verified { blocks }, Vec::new()))
            }
            Request::Stop => done(Ok(())),
        }
    }

    fn describe(&self) -> Description {
        let state = self.lock();
        let workers = state.workers.as_ref();
        Description {
            format: FORMAT,
            pid: std::process::id(),
            bytes: self.memory.len() as u64,
            disk_bytes: self.disk_bytes(),
            standing: state.standing,
            paged: state.paging.is_some(),
            plan: workers.map(|workers| *workers.plan()),
            served: self.disk.as_ref().and_then(|disk| disk.served()),
            stats: self.stats.sample(),
            latencies: self.stats.latencies(),
            wrong: workers.map_or_else(Vec::new, |workers| workers.damage().examples),
        }
    }

    fn hand_over(&self, purpose: Purpose) -> Answer {
        let os = |error: io::Error| format!("a descriptor could not be copied: {error}");
        let mut state = self.lock();
        let uffd = match (purpose, &state.paging) {
            (Purpose::Track, Some(_)) => {
                return Err(
                    "pages of this guest are still missing: wait until its last \
                            migration is complete"
                        .into(),
                );
            }
            (Purpose::Track, None) if state.standing == Standing::Waiting => {
                return Err("this guest waits for its state: there is nothing to track".into());
            }
            (Purpose::Track, None) => userfaultfd()?,
            (Purpose::Page, _) if state.ending => {
                return Err("this guest is ending: nobody had come for it".into());
            }
            (Purpose::Page, Some(uffd)) => uffd.try_clone().map_err(os)?,
            (Purpose::Page, None) if state.standing == Standing::Waiting => {
                let uffd = userfaultfd()?;
                state.paging = Some(uffd.try_clone().map_err(os)?);
                uffd
            }
            (Purpose::Page, None) => {
                return Err("no page of this guest is missing: it needs no pager".into());
            }
        };
        let copy = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().map_err(os);
        let len = self.memory.len() as u64;
        let mapping = GuestMapping::new(self.memory.address() as u64, len, 0, None);
        let reply = Reply::Memory {
            mappings: vec![mapping],
        };
        let mut fds = vec![uffd, copy(&*self.memory)?, copy(&*self.stats)?];
        if let Some(kept) = &state.kept {
            fds.push(copy(kept)?);
        }
        Ok((reply, fds))
    }

    fn disk_bytes(&self) -> u64 {
        self.disk.as_ref().map_or(0, |disk| disk.bytes())
    }

    fn show_disk(&self) -> Answer {
        let disk = self.disk.as_ref().ok_or("this guest has no disk")?;
        let fds = disk
            .descriptors()
            .map_err(|error| format!("a descriptor could not be copied: {error}"))?;
        let reply = Reply::Disk {
            path: disk.path().to_owned(),
            bytes: disk.bytes(),
        };
        Ok((reply, fds.into()))
    }

    fn serve(&self, by: Served) -> Result<(), String> {
        let disk = self.disk.as_ref().ok_or("this guest has no disk")?;
        if self.lock().standing != Standing::Waiting {
            return Err(
                "the guest has a state, and with it all of its disk: nobody serves it".into(),
            );
        }
        disk.serve(by);
        Ok(())
    }

    /// Everything is here: nobody else is needed any more.
    fn settle(&self) -> Result<(), String> {
        if let Some(disk) = &self.disk {
            disk.unserve(SETTLE_PATIENCE)?;
        }
        let mut state = self.lock();
        state.paging = None;
        state.kept = None;
        Ok(())
    }

    fn keep(&self, given: Vec<OwnedFd>) -> Result<(), String> {
        let [kept] = <[OwnedFd; 1]>::try_from(given)
            .map_err(|given| format!("{} descriptors were given to keep, not one", given.len()))?;
        self.lock().kept = Some(kept);
        Ok(())
    }

    fn freeze(&self, patience: Duration) -> Result<(), String> {
        let workers = self.begin("freeze")?;
        let result = workers.freeze(patience).map_err(|late| {
            format!(
                "waiting for missing pages or blocks, and cannot stop: {}; bring back the pager, or \
                 wait until it has placed them",
                late.join(", ")
            )
        });
        self.finish_with(result.is_ok().then_some(Standing::Frozen));
        result
    }

    fn go_on(&self) -> Result<(), String> {
        let workers = self.begin("resume")?;
        workers.run();
        self.finish_with(Some(Standing::Running));
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, String> {
        let state = self.lock();
        let workers = match (&state.workers, state.standing) {
            (Some(workers), Standing::Frozen) if state.busy.is_none() => workers,
            _ => return Err("only a frozen guest can be saved: freeze it first".into()),
        };
        let saved = SavedGuest {
            format: FORMAT,
            bytes: self.memory.len() as u64,
            disk_bytes: self.disk_bytes(),
            plan: *workers.plan(),
            workers: workers.states(),
        };
        postcard::to_stdvec(&saved).map_err(|error| format!("the state cannot be encoded: {error}"))
    }

    fn load(&self, bytes: &[u8]) -> Result<(), String> {
        let saved: SavedGuest = match postcard::take_from_bytes(bytes) {
            Ok((saved, [])) => saved,
            Ok(_) => return Err("the state has bytes to spare".into()),
            Err(error) => return Err(format!("the state cannot be decoded: {error}")),
        };
        if saved.format != FORMAT {
            return Err(format!(
                "the state has format {} where {FORMAT} is expected: use the same version of \
                 hybridmig on both hosts",
                saved.format
            ));
        }
        let own = self.memory.len() as u64;
        if saved.bytes != own {
            let theirs = saved.bytes;
            return Err(format!(
                "the state is of a guest of {theirs} bytes, this one has {own}"
            ));
        }
        if saved.disk_bytes != self.disk_bytes() {
            return Err(format!(
                "the state is of a guest with a disk of {} bytes, this one has {}",
                saved.disk_bytes,
                self.disk_bytes()
            ));
        }
        saved.plan.check()?;
        let mut state = self.lock();
        if state.standing != Standing::Waiting {
            return Err("this guest has a state already".into());
        }
        if state.ending {
            return Err("this guest is ending: nobody had come for it".into());
        }
        let (memory, stats) = (Arc::clone(&self.memory), Arc::clone(&self.stats));
        let disk = self.disk.clone();
        let workers = Workers::load(memory, disk, stats, saved.plan, saved.workers)
            .map_err(|error| format!("the state cannot be loaded: {error}"))?;
        state.workers = Some(Arc::new(workers));
        state.standing = Standing::Frozen;
        Ok(())
    }

    fn verify(&self) -> Result<u64, String> {
        let was_running = self.lock().standing == Standing::Running;
        let workers = self.begin("verify")?;
        let frozen = if was_running {
            workers.freeze(FREEZE_PATIENCE)
        } else {
            Ok(())
        };
        let result = match frozen {
            Err(late) => Err(format!(
                "waiting for missing pages or blocks: {}",
                late.join(", ")
            )),
            Ok(()) => workers.verify().map_err(|damage| {
                format!("{} wrong: {}", damage.count, damage.examples.join("; "))
            }),
        };
        if was_running {
            workers.run();
        }
        self.finish_with(None);
        result
    }

    /// Marks the guest as busy with a request that works without the lock.
    fn begin(&self, what: &'static str) -> Result<Arc<Workers>, String> {
        let mut state = self.lock();
        if let Some(busy) = state.busy {
            return Err(format!("the guest is busy with '{busy}': ask again later"));
        }
        let workers = state
            .workers
            .as_ref()
            .ok_or("this guest waits for its state: load it first")?;
        let workers = Arc::clone(workers);
        state.busy = Some(what);
        Ok(workers)
    }

    fn finish_with(&self, standing: Option<Standing>) {
        let mut state = self.lock();
        state.busy = None;
        if let Some(standing) = standing {
            state.standing = standing;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn make_disk(options: &GuestOptions) -> Result<Option<Arc<Disk>>, GuestProcessError> {
    let Some(path) = options.disk_path() else {
        return Ok(None);
    };
    match Disk::create(&path, options.disk_bytes, options.disk.is_none()) {
        Ok(disk) => Ok(Some(Arc::new(disk))),
        Err(source) => Err(GuestProcessError::Disk { path, source }),
    }
}

fn remove(disk: &Disk) {
    if let Err(error) = std::fs::remove_file(disk.path()) {
        tracing::warn!(path = %disk.path().display(), %error, "the guest's disk was not removed");
    }
}

fn userfaultfd() -> Result<OwnedFd, String> {
    // One that sees no faults of system calls will do: none of ours touches guest memory.
    Uffd::for_this_process(true)
        .map(OwnedFd::from)
        .map_err(|error| crate::guest::GuestError::from(error).chain())
}

#[cfg(test)]
mod tests;
