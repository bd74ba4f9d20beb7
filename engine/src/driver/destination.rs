//! Drives a [`DestinationMachine`]: accepts links, carries messages and inputs, runs the guest's
//! commands and keeps the marks for the report. It decides nothing about the migration.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hybridmig_transport::endpoint::Endpoint;
use hybridmig_transport::error::{CloseCode, TransportError};
use hybridmig_transport::link::{ControlReceiver, ControlSender, Link};
use hybridmig_transport::message::{Features, Message, Offer, Refusal, RefusalCode, SessionId};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::destination_data::ApplyPlane;
use super::destination_report::{Facts, build, summary};
use super::kept::KeptSession;
use super::sampler::{INTERVAL, Sampler};
use super::silence::Silence;
use super::source::{AbortOnDrop, cancelled, chain};
use super::worker::Worker;
use super::{DriverError, LinkTasks, say_goodbye, say_goodbye_briefly, wait_until};
use crate::guest::{DestinationGuest, GuestResult};
use crate::journal::{Context, Journal};
use crate::report::{Report, Verified};
use crate::seeds::Seeds;
use crate::session::destination::{DestinationConfig, DestinationMachine, DestinationProgress};
use crate::session::io::{
    DestinationCommand, DestinationInput, DestinationOutcome, DestinationRecord,
};

/// Inputs that may wait for the machine.
pub(super) const INPUTS: usize = 4096;

/// Faults given to the machine at once: as many as go in one message.
const FAULTS: usize = 64;

/// How long a new link may take to say who it is.
const FIRST_WORD: Duration = Duration::from_secs(30);

/// How often progress is shown.
const MEASURE: Duration = Duration::from_millis(100);

/// A destination that waits for one guest.
pub struct DestinationJob {
    /// What takes the guest.
    pub guest: Arc<dyn DestinationGuest>,
    /// Listening endpoint, with its identity and trust.
    pub endpoint: Arc<Endpoint>,
    /// What the machine is to do.
    pub config: DestinationConfig,
    /// Directory of the journals.
    pub state_dir: PathBuf,
    /// Existing folder for what another process would go on by, if this one is killed; the guest's
    /// pager keeps its part there too.
    pub keep_in: Option<PathBuf>,
    /// Ask the guest to verify its contents at the end.
    pub verify: bool,
    /// Files whose contents need not be sent.
    pub seeds: Option<Arc<Seeds>>,
}

/// How it ended.
pub struct DestinationRun {
    /// The machine's word.
    pub outcome: DestinationOutcome,
    /// All figures.
    pub report: Report,
}

/// What happens while a destination waits, for the operator.
#[derive(Clone, Debug)]
pub enum Waiting {
    /// Nobody yet.
    Listening,
    /// A connection was refused, or ended before it meant anything.
    TurnedAway(String),
    /// A check was answered; it goes on waiting.
    Checked,
    /// A session is on.
    Session(Box<DestinationProgress>),
}

/// Waits for a guest and takes it, to the end. Checks (`hybridmig check --to`), strangers and
/// senders whose guest does not fit are answered, and it goes on waiting.
///
/// # Errors
/// Only when no session could be served at all.
pub async fn run(
    job: DestinationJob,
    mut cancel: watch::Receiver<Option<String>>,
    progress: watch::Sender<Waiting>,
) -> Result<DestinationRun, DriverError> {
    let (arrivals, mut arrived) = mpsc::channel(16);
    let accepting = tokio::spawn(accept(job.endpoint.clone(), arrivals, progress.clone()));
    let _stop_accepting = AbortOnDrop(accepting.abort_handle());
    let job = Arc::new(job);
    loop {
        let first = tokio::select! {
            arrival = arrived.recv() => match arrival {
                Some(arrival) => arrival,
                None => return Err(DriverError::CancelledEarly { reason: "the endpoint was closed".into() }),
            },
            reason = cancelled(&mut cancel) => return Err(DriverError::CancelledEarly { reason }),
        };
        let run = serve(&job, first, &mut arrived, &mut cancel, &progress).await?;
        match &run.outcome {
            DestinationOutcome::Checked => {
                progress.send_replace(Waiting::Checked);
            }
            DestinationOutcome::Refused(refusal) => {
                progress.send_replace(Waiting::TurnedAway(refusal.to_string()));
            }
            DestinationOutcome::Moved
            | DestinationOutcome::Cancelled { .. }
            | DestinationOutcome::Incomplete { .. }
            | DestinationOutcome::Failed { .. } => return Ok(run),
        }
    }
}

/// A link whose peer has said who it is.
pub(super) struct Arrival {
    link: Link,
    control: (ControlSender, ControlReceiver),
    hello: Message,
    session: SessionId,
    resume: bool,
}

pub(super) async fn accept(
    endpoint: Arc<Endpoint>,
    arrivals: mpsc::Sender<Arrival>,
    progress: watch::Sender<Waiting>,
) {
    loop {
        match endpoint.accept().await {
            Ok(link) => {
                let arrivals = arrivals.clone();
                tokio::spawn(greet(link, arrivals));
            }
            Err(TransportError::Closed) => return,
            Err(error) => {
                let text = chain(&error);
                tracing::warn!("{text}");
                progress.send_if_modified(|waiting| {
                    let idle = !matches!(waiting, Waiting::Session(_));
                    if idle {
                        *waiting = Waiting::TurnedAway(text);
                    }
                    idle
                });
            }
        }
    }
}

/// Reads the first message of a link.
async fn greet(link: Link, arrivals: mpsc::Sender<Arrival>) {
    let first = async {
        let (sender, mut receiver) = link.accept_control().await?;
        let hello = receiver.recv().await?;
        Ok::<_, hybridmig_transport::LinkError>((sender, receiver, hello))
    };
    let (sender, receiver, hello) = match timeout(FIRST_WORD, first).await {
        Ok(Ok(said)) => said,
        Ok(Err(error)) => {
            tracing::info!(
                "{} said nothing that is understood: {}",
                link.peer(),
                chain(&error)
            );
            return;
        }
        Err(_) => {
            link.close(CloseCode::PROTOCOL, "no Hello came in time");
            return;
        }
    };
    let Message::Hello {
        session, resume, ..
    } = &hello
    else {
        link.close(CloseCode::PROTOCOL, "the first message must be Hello");
        return;
    };
    let (session, resume) = (*session, *resume);
    let arrival = Arrival {
        link,
        control: (sender, receiver),
        hello,
        session,
        resume,
    };
    if arrivals.send(arrival).await.is_err() {
        tracing::debug!("a link came after the session");
    }
}

/// Serves one session from its first link to its end.
async fn serve(
    job: &Arc<DestinationJob>,
    first: Arrival,
    arrived: &mut mpsc::Receiver<Arrival>,
    cancel: &mut watch::Receiver<Option<String>>,
    progress: &watch::Sender<Waiting>,
) -> Result<DestinationRun, DriverError> {
    let (inputs, queue) = mpsc::channel(INPUTS);
    let session = Session {
        id: first.session,
        machine: DestinationMachine::new(job.config.clone()),
        plane: ApplyPlane::start(job.guest.clone(), inputs.clone(), job.seeds.clone())?,
        inputs,
        queue,
        first: Some(first),
        offer: None,
        journal: None,
    };
    conduct(job, session, arrived, cancel, progress).await
}

/// A session about to be driven.
pub(super) struct Session {
    pub id: SessionId,
    pub machine: DestinationMachine,
    pub plane: Arc<ApplyPlane>,
    pub inputs: mpsc::Sender<DestinationInput>,
    pub queue: mpsc::Receiver<DestinationInput>,
    /// The link that it begins with.
    pub first: Option<Arrival>,
    pub offer: Option<Offer>,
    /// Of a session that was begun by another process.
    pub journal: Option<Journal<DestinationRecord>>,
}

/// Drives a session to its end.
pub(super) async fn conduct(
    job: &Arc<DestinationJob>,
    session: Session,
    arrived: &mut mpsc::Receiver<Arrival>,
    cancel: &mut watch::Receiver<Option<String>>,
    progress: &watch::Sender<Waiting>,
) -> Result<DestinationRun, DriverError> {
    let started = Instant::now();
    let started_unix = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64());
    let Session {
        id: session,
        machine,
        plane,
        inputs,
        mut queue,
        first,
        offer,
        journal,
    } = session;
    let sampler = Arc::new(Sampler::default());
    let sampling = tokio::spawn(sample(job.guest.clone(), sampler.clone()));
    let _stop_sampling = AbortOnDrop(sampling.abort_handle());
    let peer = first.as_ref().map_or_else(String::new, |first| {
        let link = &first.link;
        format!("{} ({})", link.peer_addr(), link.peer().fingerprint)
    });
    let context = Context {
        session,
        guest: "unnamed".to_owned(),
        peer,
        software: crate::SOFTWARE.to_owned(),
    };
    let mut driver = Driver {
        job: job.clone(),
        session,
        started,
        machine,
        worker: worker(job, context, journal, &plane, inputs.clone())?,
        plane,
        inputs,
        tasks: None,
        last_link: None,
        reconnects: 0,
        silence: Silence::new(started),
        sampler,
        peer_software: None,
        version: None,
        features: 0,
        offer,
    };
    if let Some(first) = first {
        driver.adopt(first);
    }
    let outcome = driver.drive(&mut queue, arrived, cancel, progress).await;
    driver.farewell(&outcome).await;

    let verified = match &outcome {
        DestinationOutcome::Moved if job.verify => {
            let guest = job.guest.clone();
            let verified = tokio::task::spawn_blocking(move || guest.verify()).await;
            verified.ok().flatten().map(Verified::from)
        }
        _ => None,
    };
    let report = build(Facts {
        session,
        started,
        started_unix,
        outcome: &outcome,
        offer: driver.offer.as_ref(),
        version: driver.version,
        notes: driver.machine.warnings().to_vec(),
        plane: &driver.plane,
        link: driver.last_link.as_ref(),
        reconnects: driver.reconnects,
        silence: &driver.silence,
        peer_software: driver.peer_software.clone(),
        verified,
        sampler: &driver.sampler,
        guest: job.guest.as_ref(),
    });
    driver.plane.stop();
    driver.worker.finish();
    Ok(DestinationRun { outcome, report })
}

struct Driver {
    job: Arc<DestinationJob>,
    session: SessionId,
    started: Instant,
    machine: DestinationMachine,
    plane: Arc<ApplyPlane>,
    worker: Worker<Task>,
    inputs: mpsc::Sender<DestinationInput>,
    tasks: Option<LinkTasks>,
    last_link: Option<Link>,
    reconnects: u32,
    silence: Silence,
    sampler: Arc<Sampler>,
    peer_software: Option<String>,
    version: Option<u16>,
    features: u64,
    offer: Option<Offer>,
}

impl Driver {
    async fn drive(
        &mut self,
        queue: &mut mpsc::Receiver<DestinationInput>,
        arrived: &mut mpsc::Receiver<Arrival>,
        cancel: &mut watch::Receiver<Option<String>>,
        progress: &watch::Sender<Waiting>,
    ) -> DestinationOutcome {
        let mut measure = interval(MEASURE);
        measure.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut next, mut phase) = (None, None);
        loop {
            if let Some(outcome) = self.obey() {
                return outcome;
            }
            let now = self.machine.phase();
            if phase.replace(now) != Some(now) {
                self.show(progress);
            }
            let deadline = self.machine.poll_timeout().map(|at| self.started + at);
            let input = tokio::select! {
                biased;
                input = std::future::ready(next.take()), if next.is_some() => {
                    input.expect("checked before")
                }
                // Before these: it is rare, and inputs that never end must not keep it from its turn.
                _ = measure.tick() => {
                    self.show(progress);
                    continue;
                }
                input = queue.recv() => input.expect("the driver itself holds a sender"),
                () = wait_until(deadline) => DestinationInput::Timeout,
                reason = cancelled(cancel) => DestinationInput::Cancel { reason },
                arrival = arrived.recv() => {
                    if let Some(arrival) = arrival {
                        self.visit(arrival);
                    }
                    continue;
                }
            };
            if let DestinationInput::Disconnected { reason } = &input {
                tracing::warn!("link lost: {reason}");
                // The word of a link that was let go comes late, when another may serve already.
                self.tasks.take_if(|tasks| tasks.is_over());
            }
            let fault = matches!(input, DestinationInput::Fault { .. });
            self.handle(input);
            if fault {
                next = self.more_faults(queue);
            }
        }
    }

    /// Shows where the session stands.
    fn show(&mut self, progress: &watch::Sender<Waiting>) {
        let received = self.tasks.as_ref().map(LinkTasks::received);
        let traffic = self.plane.traffic();
        progress.send_replace(Waiting::Session(Box::new(DestinationProgress {
            silent: self.silence.look(Instant::now(), received),
            seeded: traffic.seeded,
            seeded_bytes: traffic.seeded_bytes,
            ..self.machine.progress(self.started.elapsed())
        })));
    }

    /// Gives the machine the faults that wait already, so that they go in one message; the first input
    /// that is something else.
    fn more_faults(
        &mut self,
        queue: &mut mpsc::Receiver<DestinationInput>,
    ) -> Option<DestinationInput> {
        for _ in 0..FAULTS {
            match queue.try_recv().ok()? {
                fault @ DestinationInput::Fault { .. } => self.handle(fault),
                other => return Some(other),
            }
        }
        None
    }

    fn handle(&mut self, input: DestinationInput) {
        if let DestinationInput::Message(Message::Offer(offer)) = &input {
            self.offer = Some(offer.clone());
        }
        self.plane.see(&input);
        self.machine.handle(self.started.elapsed(), input);
    }

    fn obey(&mut self) -> Option<DestinationOutcome> {
        while let Some(command) = self.machine.poll_command() {
            tracing::debug!(?command, "destination");
            match command {
                DestinationCommand::Send(Message::AllPlaced(_)) => {
                    let summary = summary(&self.plane, self.job.guest.as_ref(), &self.sampler);
                    self.send(Message::AllPlaced(summary));
                }
                DestinationCommand::Send(message) => {
                    if let Message::Welcome {
                        version, features, ..
                    } = &message
                    {
                        self.version = Some(*version);
                        self.features = *features;
                    }
                    let resumed = matches!(message, Message::Status { .. });
                    self.send(message);
                    if resumed {
                        self.tell_of_seeds();
                    }
                }
                DestinationCommand::Fetch { region, blocks } => {
                    if self.tasks.is_some()
                        && let Some(link) = self.last_link.clone()
                    {
                        ApplyPlane::fetch(link, region, blocks);
                    }
                }
                DestinationCommand::CloseLink { reason } => {
                    if let Some(tasks) = self.tasks.take() {
                        tokio::spawn(say_goodbye(tasks, CloseCode::REFUSED, reason));
                    }
                }
                DestinationCommand::Finish(outcome) => return Some(outcome),
                DestinationCommand::Prepare(_) => {
                    // Beside the preparation: the source should know before it sends.
                    self.tell_of_seeds();
                    self.worker.submit(Task::Command(command));
                }
                DestinationCommand::Check(_)
                | DestinationCommand::Arm { .. }
                | DestinationCommand::LoadState { .. }
                | DestinationCommand::Resume
                | DestinationCommand::Journal(_)
                | DestinationCommand::Disarm => self.worker.submit(Task::Command(command)),
                DestinationCommand::Abandon => {
                    self.worker.submit(abandon(self.job.guest.clone()));
                }
            }
        }
        None
    }

    fn send(&self, message: Message) {
        if let Some(tasks) = &self.tasks {
            tasks.send(message);
        }
    }

    fn tell_of_seeds(&mut self) {
        let regions = self.offer.as_ref().map_or(&[][..], |offer| &offer.regions);
        if self.features & Features::SEEDS != 0
            && self.plane.seeds().is_some_and(|seeds| seeds.serve(regions))
            && let (Some(link), Some(tasks)) = (&self.last_link, &mut self.tasks)
        {
            self.plane.tell_of_seeds(link, tasks);
        }
    }

    /// Another link while a session is on: our sender that comes back, or somebody else.
    fn visit(&mut self, arrival: Arrival) {
        if arrival.session == self.session && arrival.resume {
            if let Some(link) = self.last_link.take() {
                link.close(
                    CloseCode::DONE,
                    "replaced by a newer link of the same session",
                );
            }
            if self.tasks.take().is_some() {
                self.handle(DestinationInput::Disconnected {
                    reason: "the source came back over a new link".to_owned(),
                });
            }
            self.reconnects += 1;
            self.adopt(arrival);
            return;
        }
        let Arrival {
            link,
            control: (mut sender, receiver),
            session,
            ..
        } = arrival;
        let refusal = Refusal {
            code: RefusalCode::Busy,
            reasons: vec![format!(
                "this destination is busy with session {}; start another `hybridmig recv` on \
                 another port for session {session}",
                self.session
            )],
        };
        tracing::warn!("{} was refused: {refusal}", link.peer_addr());
        tokio::spawn(async move {
            let refused = async {
                sender.send(&Message::Refuse(refusal)).await?;
                sender.finish().await
            };
            // Whether it hears why or not, it does not get in.
            if refused.await.is_ok() && timeout(FIRST_WORD, link.closed()).await.is_err() {
                link.close(CloseCode::REFUSED, "busy");
            }
            drop(receiver);
        });
    }

    fn adopt(&mut self, arrival: Arrival) {
        let Arrival {
            link,
            control,
            hello,
            ..
        } = arrival;
        if let Message::Hello { software, .. } = &hello {
            self.peer_software = Some(software.clone());
        }
        let mut tasks = LinkTasks::start(
            link.clone(),
            control,
            self.inputs.clone(),
            DestinationInput::Message,
            |reason| DestinationInput::Disconnected { reason },
        );
        self.plane.serve(&link, &mut tasks);
        self.tasks = Some(tasks);
        self.last_link = Some(link);
        self.handle(DestinationInput::Connected);
        self.handle(DestinationInput::Message(hello));
    }

    async fn farewell(&mut self, outcome: &DestinationOutcome) {
        let Some(tasks) = self.tasks.take() else {
            return;
        };
        let done = "done".to_owned();
        match outcome {
            // After `Released` the source ends the link as soon as it knows that this has arrived,
            // and needs nothing more from here.
            DestinationOutcome::Moved | DestinationOutcome::Cancelled { .. } => {
                say_goodbye_briefly(tasks, CloseCode::DONE, done).await;
            }
            _ => say_goodbye(tasks, CloseCode::DONE, done).await,
        }
    }
}

async fn sample(guest: Arc<dyn DestinationGuest>, sampler: Arc<Sampler>) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        if let Some(work) = guest.work_done() {
            sampler.note(Instant::now(), work);
        }
    }
}

/// What the worker executes, in order.
enum Task {
    /// A guest command or a journal record.
    Command(DestinationCommand),
    /// The answer of an `Abandon` that runs beside this thread.
    Abandoned(std::sync::mpsc::Receiver<GuestResult<()>>),
}

/// Ends what was prepared, at once: a command that waits for a block which will never come ends
/// by it. Its own answer comes after that command's.
fn abandon(guest: Arc<dyn DestinationGuest>) -> Task {
    let (answer, answered) = std::sync::mpsc::sync_channel(1);
    let run = move || {
        // Nobody listens only when the session has ended.
        let _ = answer.send(guest.abandon());
    };
    if let Err(error) = std::thread::Builder::new()
        .name("abandon".to_owned())
        .spawn(run)
    {
        tracing::error!("no thread to end the guest with: {error}");
    }
    Task::Abandoned(answered)
}

fn worker(
    job: &Arc<DestinationJob>,
    mut context: Context,
    mut journal: Option<Journal<DestinationRecord>>,
    plane: &Arc<ApplyPlane>,
    inputs: mpsc::Sender<DestinationInput>,
) -> Result<Worker<Task>, DriverError> {
    let guest = job.guest.clone();
    let plane = plane.clone();
    let directory = job.state_dir.clone();
    let keep_in = job.keep_in.clone();
    let mut offered = None;
    let execute = move |task: Task| {
        let result = match task {
            Task::Abandoned(answered) => answered
                .recv()
                .map_err(|_| "ending what was prepared: no thread could be started".to_owned())
                .and_then(|ended| {
                    ended.map_err(|error| format!("ending what was prepared: {}", error.chain()))
                })
                .map(|()| DestinationInput::Abandoned),
            Task::Command(command) => match command {
                DestinationCommand::Check(offer) => {
                    Ok(DestinationInput::Checked(check(&guest, &plane, &offer)))
                }
                DestinationCommand::Prepare(offer) => {
                    context.guest.clone_from(&offer.guest.name);
                    let prepared = plane.prepare(&offer);
                    offered = Some(offer);
                    prepared
                }
                DestinationCommand::Arm {
                    behind,
                    postcopy_pass,
                } => {
                    let kept = match (&keep_in, offered.take()) {
                        (Some(folder), Some(offer)) => {
                            KeptSession::new(context.session, offer, postcopy_pass).write(folder)
                        }
                        _ => Ok(()),
                    };
                    // The journal decides whether the guest is taken. Without this it is taken all
                    // the same, and cannot be taken over.
                    if let Err(error) = kept {
                        tracing::error!("nobody could follow this process: {}", chain(&error));
                    }
                    plane.arm(&behind, postcopy_pass)
                }
                DestinationCommand::LoadState { len, hash } => plane.load_state(len, hash),
                DestinationCommand::Journal(record) => {
                    write_journal(&mut journal, &directory, &context, &record)
                }
                DestinationCommand::Resume => {
                    plane.mark_resume();
                    guest
                        .resume()
                        .map(|()| DestinationInput::Resumed)
                        .map_err(|error| format!("starting the guest: {}", error.chain()))
                }
                DestinationCommand::Disarm => plane.disarm().inspect(|_| {
                    if let Some(folder) = &keep_in
                        && let Err(error) = KeptSession::remove(folder)
                    {
                        tracing::warn!("{}", chain(&error));
                    }
                }),
                DestinationCommand::Abandon
                | DestinationCommand::Send(_)
                | DestinationCommand::Fetch { .. }
                | DestinationCommand::CloseLink { .. }
                | DestinationCommand::Finish(_) => unreachable!("not the worker's"),
            },
        };
        let input = result.unwrap_or_else(|error| DestinationInput::Failed { error });
        // The receiver is gone only when the session has ended.
        let _ = inputs.blocking_send(input);
    };
    Worker::spawn("guest", execute).map_err(DriverError::Thread)
}

fn check(
    guest: &Arc<dyn DestinationGuest>,
    plane: &ApplyPlane,
    offer: &Offer,
) -> Result<Vec<String>, Refusal> {
    let mut notes = guest.check(offer)?;
    if let Some(what) = plane.conflicting_seed() {
        return Err(Refusal {
            code: RefusalCode::Guest,
            reasons: vec![what],
        });
    }
    if let Some(seeds) = plane.seeds() {
        let kib = seeds.block_size() >> 10;
        notes.push(if seeds.serve(&offer.regions) {
            let blocks = seeds.len();
            format!("seeds: {blocks} blocks of {kib} KiB that need not be sent")
        } else {
            format!("seeds: of no use, the guest has no region in blocks of {kib} KiB (a disk)")
        });
    }
    Ok(notes)
}

fn write_journal(
    journal: &mut Option<Journal<DestinationRecord>>,
    directory: &Path,
    context: &Context,
    record: &DestinationRecord,
) -> Result<DestinationInput, String> {
    super::append(journal, directory, context, record)
        .map(|()| DestinationInput::Journaled)
        .map_err(|error| format!("writing the journal: {}", chain(&error)))
}
