//! Drives a [`SourceMachine`]: dials the destination, carries messages and inputs, runs the guest's
//! commands and keeps the marks for the report. It decides nothing about the migration.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hybridmig_transport::endpoint::Endpoint;
use hybridmig_transport::error::CloseCode;
use hybridmig_transport::link::Link;
use hybridmig_transport::message::{Message, RegionKind};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep_until};

use super::level::Level;
use super::sampler::{INTERVAL, Sampler};
use super::silence::Silence;
use super::source_data::DataPlane;
use super::source_report::{Marks, build, learned};
use super::worker::Worker;
use super::{DriverError, LinkTasks, figures, say_goodbye, say_goodbye_briefly, wait_until};
use crate::blocks::Blocks;
use crate::guest::{GuestError, GuestResult, SourceGuest};
use crate::journal::{Context, Journal};
use crate::predict::Costs;
use crate::profile::contents;
use crate::regions::PAGE;
use crate::report::Report;
use crate::session::io::{SourceCommand, SourceInput, SourceOutcome, SourceRecord};
use crate::session::source::{SourceConfig, SourceMachine, SourceProgress};

/// Inputs that may wait for the machine. Faults come in bursts of one for each waiting vCPU.
const INPUTS: usize = 4096;

/// How often the link is measured for the machine and the progress shown.
const MEASURE: Duration = Duration::from_millis(100);

/// Time between two attempts to dial a destination that was lost.
const REDIAL: Duration = Duration::from_millis(500);

/// A migration to be driven from the source.
pub struct SourceJob {
    /// The guest.
    pub guest: Arc<dyn SourceGuest>,
    /// Local endpoint, with its identity and trust.
    pub endpoint: Arc<Endpoint>,
    /// Where the destination listens.
    pub target: SocketAddr,
    /// What the machine is to do.
    pub config: SourceConfig,
    /// Directory of the journals.
    pub state_dir: PathBuf,
    /// zstd level of the bulk lane.
    pub level: Level,
}

/// How it ended.
pub struct SourceRun {
    /// The machine's word.
    pub outcome: SourceOutcome,
    /// All figures.
    pub report: Report,
    /// What the steps of a handover cost, where the guest was moved.
    pub learned: Option<Costs>,
}

/// Runs the migration to its end. `cancel` holds a reason once the operator wants it to stop;
/// `progress` is updated at every new phase, and a few times a second.
///
/// # Errors
/// Only for what comes before the first message: the destination cannot be reached or does not
/// trust this host, the journal cannot be made. The guest has not been touched then.
pub async fn run(
    mut job: SourceJob,
    mut cancel: watch::Receiver<Option<String>>,
    progress: watch::Sender<Option<SourceProgress>>,
) -> Result<SourceRun, DriverError> {
    let started = Instant::now();
    let started_unix = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64());
    let sampler = Arc::new(Sampler::default());
    let sampling = tokio::spawn(sample(job.guest.clone(), sampler.clone()));
    let _stop_sampling = AbortOnDrop(sampling.abort_handle());

    job.config.guest = job.guest.guest_use();
    let dialed = tokio::select! {
        dialed = job.endpoint.dial(job.target) => dialed,
        reason = cancelled(&mut cancel) => return Err(DriverError::CancelledEarly { reason }),
    };
    let target = job.target;
    let no_link = |source| DriverError::Connect {
        target,
        source: Box::new(source),
    };
    let link = dialed.map_err(no_link)?;

    let machine = SourceMachine::new(
        job.config.clone(),
        job.guest.describe().clone(),
        job.guest.regions().to_vec(),
    );
    let (inputs, input_queue) = mpsc::channel(INPUTS);
    let plane = DataPlane::start(
        machine,
        job.guest.clone(),
        started,
        job.level,
        inputs.clone(),
    )?;
    let marks = Arc::new(Marks::default());
    let worker = worker(&job, &plane, &marks, inputs.clone())?;

    let mut driver = Driver {
        job,
        started,
        plane,
        marks,
        inputs,
        worker,
        tasks: None,
        last_link: None,
        reconnects: 0,
        silence: Silence::new(started),
    };
    // The first words go out a round trip before it is known whether they are wanted.
    driver.adopt(link.clone()).await;
    let early = driver.obey();
    let wanted = tokio::select! {
        accepted = link.accepted() => accepted.map_err(no_link),
        reason = cancelled(&mut cancel) => Err(DriverError::CancelledEarly { reason }),
    };
    if let Err(error) = wanted {
        driver.plane.stop();
        driver.worker.finish();
        return Err(error);
    }
    let outcome = match early {
        Some(outcome) => outcome,
        None => driver.drive(input_queue, &mut cancel, &progress).await,
    };
    driver.farewell(&outcome).await;

    let (report, learned) = {
        let facts = driver.summary(started_unix, &outcome);
        let report = build(&facts, &sampler);
        let moved = matches!(outcome, SourceOutcome::Moved);
        let learned = moved.then(|| learned(&facts, &report)).flatten();
        (report, learned)
    };
    driver.plane.stop();
    driver.worker.finish();
    Ok(SourceRun {
        outcome,
        report,
        learned,
    })
}

struct Driver {
    job: SourceJob,
    started: Instant,
    plane: Arc<DataPlane>,
    marks: Arc<Marks>,
    inputs: mpsc::Sender<SourceInput>,
    worker: Worker<SourceCommand>,
    tasks: Option<LinkTasks>,
    last_link: Option<Link>,
    reconnects: u32,
    silence: Silence,
}

impl Driver {
    async fn drive(
        &mut self,
        mut queue: mpsc::Receiver<SourceInput>,
        cancel: &mut watch::Receiver<Option<String>>,
        progress: &watch::Sender<Option<SourceProgress>>,
    ) -> SourceOutcome {
        let mut measure = interval(MEASURE);
        measure.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut redial = Redial::default();
        let mut phase = None;
        loop {
            if let Some(outcome) = self.obey() {
                progress.send_replace(Some(self.plane.progress()));
                return outcome;
            }
            let now = self.plane.phase();
            if phase.replace(now) != Some(now) {
                self.show(progress);
            }
            let deadline = self.plane.next_timeout().map(|at| self.started + at);
            let input = tokio::select! {
                biased;
                // First: it is rare, and inputs that never end must not keep it from its turn.
                _ = measure.tick() => {
                    self.show(progress);
                    match &self.last_link {
                        Some(link) if self.tasks.is_some() => SourceInput::Link(figures(&link.stats())),
                        _ => continue,
                    }
                }
                input = queue.recv() => input.expect("the driver itself holds a sender"),
                () = self.plane.nudged() => continue,
                () = wait_until(deadline) => SourceInput::Timeout,
                reason = cancelled(cancel) => SourceInput::Cancel { reason },
                link = redial.run(&self.job.endpoint, self.job.target),
                    if self.tasks.is_none() && self.plane.wants_link() =>
                {
                    self.reconnects += 1;
                    self.adopt(link).await;
                    continue;
                }
            };
            self.marks.see(&input);
            if let SourceInput::Disconnected { reason } = &input {
                tracing::warn!("link to {} lost: {reason}", self.job.target);
                // The word of a link that was let go comes late, when another may serve already.
                self.tasks.take_if(|tasks| tasks.is_over());
            }
            self.plane.handle(input);
        }
    }

    /// Shows where the session stands.
    fn show(&mut self, progress: &watch::Sender<Option<SourceProgress>>) {
        let received = self.tasks.as_ref().map(LinkTasks::received);
        let silent = self.silence.look(Instant::now(), received);
        progress.send_replace(Some(SourceProgress {
            silent,
            ..self.plane.progress()
        }));
    }

    /// Carries out what the machine wants; the outcome, when it has ended.
    fn obey(&mut self) -> Option<SourceOutcome> {
        while let Some(command) = self.plane.next_command() {
            tracing::debug!(?command, "source");
            match command {
                SourceCommand::Send(message) => {
                    if let Some(tasks) = &self.tasks {
                        tasks.send(message);
                    }
                }
                SourceCommand::CloseLink { reason } => {
                    if let Some(tasks) = self.tasks.take() {
                        tokio::spawn(say_goodbye(tasks, CloseCode::REFUSED, reason));
                    }
                }
                SourceCommand::Finish(outcome) => return Some(outcome),
                _ => self.worker.submit(command),
            }
        }
        None
    }

    /// Starts the tasks of a new link and tells the machine.
    async fn adopt(&mut self, link: Link) {
        let control = match link.open_control().await {
            Ok(control) => control,
            Err(error) => {
                tracing::warn!("link to {} lost at once: {error}", self.job.target);
                if self.last_link.is_none() {
                    // The first link: the machine must hear of it to end.
                    self.plane.handle(SourceInput::Disconnected {
                        reason: error.to_string(),
                    });
                }
                return;
            }
        };
        let inputs = self.inputs.clone();
        let mut tasks = LinkTasks::start(
            link.clone(),
            control,
            inputs,
            SourceInput::Message,
            |reason| SourceInput::Disconnected { reason },
        );
        self.plane.clone().serve(&link, &mut tasks);
        self.tasks = Some(tasks);
        self.last_link = Some(link);
        self.plane.handle(SourceInput::Connected);
    }

    /// Lets the last messages reach the destination before the connection goes.
    async fn farewell(&mut self, outcome: &SourceOutcome) {
        let Some(tasks) = self.tasks.take() else {
            return;
        };
        let done = "done".to_owned();
        match outcome {
            SourceOutcome::Moved => say_goodbye(tasks, CloseCode::DONE, done).await,
            _ => say_goodbye_briefly(tasks, CloseCode::DONE, done).await,
        }
    }

    fn summary<'a>(
        &'a self,
        started_unix: f64,
        outcome: &'a SourceOutcome,
    ) -> super::source_report::Facts<'a> {
        super::source_report::Facts {
            started: self.started,
            started_unix,
            outcome,
            config: &self.job.config,
            guest: self.job.guest.as_ref(),
            plane: &self.plane,
            marks: &self.marks,
            link: self.last_link.as_ref(),
            reconnects: self.reconnects,
            silence: &self.silence,
        }
    }
}

/// Dials again and again on a task of its own: an attempt takes several round trips, in which the
/// driver has other things to do.
#[derive(Default)]
struct Redial {
    dialing: Option<(tokio::task::JoinHandle<Link>, AbortOnDrop)>,
}

impl Redial {
    /// The new link. May be dropped and called again while it waits.
    async fn run(&mut self, endpoint: &Arc<Endpoint>, target: SocketAddr) -> Link {
        loop {
            let (dialing, _) = self.dialing.get_or_insert_with(|| {
                let task = tokio::spawn(redial(endpoint.clone(), target));
                let abort = AbortOnDrop(task.abort_handle());
                (task, abort)
            });
            let dialed = dialing.await;
            self.dialing = None;
            match dialed {
                Ok(link) => return link,
                Err(error) => {
                    tracing::error!("dialing {target} failed: {error}");
                    tokio::time::sleep(REDIAL).await;
                }
            }
        }
    }
}

async fn redial(endpoint: Arc<Endpoint>, target: SocketAddr) -> Link {
    loop {
        let next = tokio::time::Instant::now() + REDIAL;
        match endpoint.connect(target).await {
            Ok(link) => return link,
            Err(error) => tracing::info!("{target} is not back yet: {}", chain(&error)),
        }
        sleep_until(next).await;
    }
}

/// Waits for the operator's next wish to stop. Each is given once.
pub(super) async fn cancelled(cancel: &mut watch::Receiver<Option<String>>) -> String {
    while cancel.changed().await.is_ok() {
        if let Some(reason) = cancel.borrow_and_update().clone() {
            return reason;
        }
    }
    // Nobody can cancel any more.
    std::future::pending().await
}

async fn sample(guest: Arc<dyn SourceGuest>, sampler: Arc<Sampler>) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        match guest.work_done() {
            Some(work) => sampler.note(Instant::now(), work),
            None => return,
        }
    }
}

pub(super) struct AbortOnDrop(pub(super) tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One thread for guest commands and journal records: the machine wants them in order.
fn worker(
    job: &SourceJob,
    plane: &Arc<DataPlane>,
    marks: &Arc<Marks>,
    inputs: mpsc::Sender<SourceInput>,
) -> Result<Worker<SourceCommand>, DriverError> {
    let guest = job.guest.clone();
    let plane = plane.clone();
    let marks = marks.clone();
    let directory = job.state_dir.clone();
    let context = Context {
        session: job.config.session,
        guest: job.guest.describe().name.clone(),
        peer: job.target.to_string(),
        software: crate::SOFTWARE.to_owned(),
    };
    let mut journal = None;
    let execute = move |command: SourceCommand| {
        let began = Instant::now();
        let what = name(&command);
        let looks = matches!(command, SourceCommand::StartTracking | SourceCommand::Scan);
        let result = match &command {
            SourceCommand::StartTracking => guest.start_tracking().map(SourceInput::Tracking),
            SourceCommand::Scan => guest.take_dirty().map(SourceInput::Dirty),
            SourceCommand::Freeze => guest.freeze().map(|()| SourceInput::Frozen {
                needed: guest.before_resume(),
            }),
            SourceCommand::SaveState => guest.save_state().map(|state| plane.keep_state(state)),
            SourceCommand::Thaw => guest.thaw().map(|()| SourceInput::Thawed),
            SourceCommand::Release => guest.release().map(|()| SourceInput::Released),
            SourceCommand::Journal(record) => {
                write_journal(&mut journal, &directory, &context, record)
            }
            SourceCommand::Send(_) | SourceCommand::CloseLink { .. } | SourceCommand::Finish(_) => {
                unreachable!("not the worker's")
            }
        };
        marks.executed(&command, began, Instant::now());
        if let Ok(SourceInput::Tracking(content)) = &result {
            look_at_contents(&guest, content.clone(), &inputs);
        }
        let input = result.unwrap_or_else(|error| SourceInput::Failed {
            error: format!("{what}: {}", error.chain()),
        });
        // The receiver is gone only when the session has ended.
        let tell = |input| {
            let _ = inputs.blocking_send(input);
        };
        if looks {
            let samples = guest.access_samples();
            if !samples.is_empty() {
                tell(SourceInput::Sampled(samples));
            }
            let accessed = guest.accessed();
            if !accessed.is_empty() {
                tell(SourceInput::Accessed(accessed));
            }
        }
        tell(input);
    };
    Worker::spawn("guest", execute).map_err(DriverError::Thread)
}

/// Finds out what a page takes on the wire, from a sample, on a thread of its own: pre-copy need not wait for it. A
/// bounded sample, so it ends by itself; where it fails the machine learns from what it sends.
fn look_at_contents(
    guest: &Arc<dyn SourceGuest>,
    content: Blocks,
    inputs: &mpsc::Sender<SourceInput>,
) {
    let (guest, inputs) = (guest.clone(), inputs.clone());
    let look = move || {
        // Pages, and bytes on the wire, of memory and of disks.
        let mut sums = [(0.0, 0.0); 2];
        for info in guest.regions() {
            let disk = info.kind == RegionKind::Disk;
            let Some(set) = content.get(info.id).filter(|set| !set.is_empty()) else {
                continue;
            };
            match contents::look(guest.as_ref(), info, set, disk) {
                Ok(found) => {
                    if let Some(bytes) = found.mean_bytes() {
                        let pages = set.len() as f64 * f64::from(info.block_size / PAGE);
                        let sum = &mut sums[usize::from(disk)];
                        *sum = (sum.0 + pages, sum.1 + pages * bytes);
                    }
                }
                Err(error) => tracing::info!("contents of {}: {}", info.name, error.chain()),
            }
        }
        for (disk, (pages, bytes)) in sums.into_iter().enumerate() {
            if pages > 0.0 {
                // The receiver is gone only when the session has ended.
                let _ = inputs.blocking_send(SourceInput::Contents {
                    disk: disk == 1,
                    bytes_per_page: bytes / pages,
                });
            }
        }
    };
    let spawned = std::thread::Builder::new()
        .name("contents".into())
        .spawn(look);
    if let Err(error) = spawned {
        tracing::info!("no thread to look at contents: {error}");
    }
}

fn write_journal(
    journal: &mut Option<Journal<SourceRecord>>,
    directory: &Path,
    context: &Context,
    record: &SourceRecord,
) -> GuestResult<SourceInput> {
    super::append(journal, directory, context, record)
        .map(|()| SourceInput::Journaled)
        .map_err(|error| GuestError::caused("the record is not durable", error))
}

fn name(command: &SourceCommand) -> &'static str {
    match command {
        SourceCommand::StartTracking => "starting to track writes",
        SourceCommand::Scan => "scanning for written blocks",
        SourceCommand::Freeze => "stopping the guest",
        SourceCommand::SaveState => "saving the device state",
        SourceCommand::Thaw => "letting the guest run again",
        SourceCommand::Release => "releasing the guest",
        SourceCommand::Journal(_) => "writing the journal",
        SourceCommand::Send(_) | SourceCommand::CloseLink { .. } | SourceCommand::Finish(_) => "",
    }
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// True for messages of the session that this side alone may send on the urgent lane.
pub(super) fn is_fetch(message: &Message) -> bool {
    matches!(message, Message::Fetch { .. })
}
