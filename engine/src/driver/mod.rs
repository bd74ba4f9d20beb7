//! Thin drivers: they carry between the session machines, the transport and the guest. What to do
//! is decided in `session`; nothing here may decide it again.

pub mod destination;
mod destination_data;
mod destination_report;
mod encoding;
mod fault_desk;
pub mod kept;
pub mod level;
mod sampler;
mod silence;
pub mod source;
mod source_data;
mod source_report;
pub mod take_over;
mod worker;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hybridmig_transport::error::{CloseCode, TransportError};
use hybridmig_transport::link::{ControlReceiver, ControlSender, Link, LinkStats};
use hybridmig_transport::message::Message;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use self::silence::Silence;
use crate::journal::{Context, Journal, JournalError, Record};
use crate::session::io::LinkFigures;

/// What stops a driver before there is a session. The guest has not been touched.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// No link to the destination.
    #[error("no link to {target}")]
    Connect {
        /// Who was dialed.
        target: SocketAddr,
        /// Why it failed.
        #[source]
        source: Box<TransportError>,
    },
    /// Cancelled while dialing.
    #[error("cancelled before the destination was reached: {reason}")]
    CancelledEarly {
        /// The operator's word.
        reason: String,
    },
    /// The compressor could not be set up.
    #[error("the block encoder could not be set up")]
    Encoder(#[source] hybridmig_transport::codec::EncodeError),
    /// No thread could be started.
    #[error("a thread could not be started")]
    Thread(#[source] std::io::Error),
}

/// Control messages that may wait to be sent.
const CONTROL_DEPTH: usize = 4096;

/// How long the peer is given to take last messages that it waits for.
const FAREWELL: Duration = Duration::from_secs(10);

/// How long it is given, at least, to take those that it can do without.
const BRIEF_FAREWELL: Duration = Duration::from_secs(1);

/// The tasks that serve one link. They end with it, or when this is dropped.
pub(crate) struct LinkTasks {
    link: Link,
    control: Option<mpsc::Sender<Message>>,
    writer: tokio::task::JoinHandle<()>,
    tasks: JoinSet<()>,
    over: Arc<AtomicBool>,
}

impl LinkTasks {
    /// Starts reading and writing the control lane. Every message becomes an input, and so does,
    /// once, the end of the link.
    pub(crate) fn start<I: Send + 'static>(
        link: Link,
        (sender, receiver): (ControlSender, ControlReceiver),
        inputs: mpsc::Sender<I>,
        message: impl Fn(Message) -> I + Send + 'static,
        gone: impl FnOnce(String) -> I + Send + 'static,
    ) -> Self {
        let (control, queue) = mpsc::channel(CONTROL_DEPTH);
        let writer = tokio::spawn(write_control(sender, queue));
        let mut tasks = JoinSet::new();
        let over = Arc::new(AtomicBool::new(false));
        tasks.spawn(read_control(receiver, inputs, message, gone, over.clone()));
        Self {
            link,
            control: Some(control),
            writer,
            tasks,
            over,
        }
    }

    /// Runs a task as long as the link.
    pub(crate) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// Whether the link has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Bytes received over the link, as UDP payload.
    pub(crate) fn received(&self) -> u64 {
        self.link.stats().received_bytes
    }

    /// Queues a message for the control lane.
    pub(crate) fn send(&self, message: Message) {
        let Some(control) = &self.control else { return };
        if control.try_send(message).is_err() {
            // Either the link is going, which the reader reports, or the peer has not read
            // thousands of messages: then it is as good as gone.
            self.link.close(
                CloseCode::PROTOCOL,
                "the peer does not read its control lane",
            );
        }
    }
}

impl Drop for LinkTasks {
    fn drop(&mut self) {
        self.writer.abort();
    }
}

/// Sends what is queued, waits until the peer's transport has all of it (it reads what it has
/// before it looks at the close), then closes with `reason`.
pub(crate) async fn say_goodbye(tasks: LinkTasks, code: CloseCode, reason: String) {
    say_goodbye_within(FAREWELL, tasks, code, reason).await;
}

/// Like [`say_goodbye`], for an operator who waits and a peer that finds out by itself: over a link
/// that works nothing is lost, and a dead one is not waited for.
pub(crate) async fn say_goodbye_briefly(tasks: LinkTasks, code: CloseCode, reason: String) {
    // The first try and what a lossy link makes of it.
    let patience = (8 * tasks.link.stats().rtt).clamp(BRIEF_FAREWELL, FAREWELL);
    say_goodbye_within(patience, tasks, code, reason).await;
}

async fn say_goodbye_within(
    patience: Duration,
    mut tasks: LinkTasks,
    code: CloseCode,
    reason: String,
) {
    tasks.control.take();
    // The end of this link is of no interest any more.
    tasks.tasks.abort_all();
    match tokio::time::timeout(patience, &mut tasks.writer).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!("the control lane's task failed: {error}"),
        Err(_) => tracing::warn!("the peer did not take the last messages within {patience:?}"),
    }
    tasks.link.close(code, &reason);
}

async fn write_control(mut sender: ControlSender, mut queue: mpsc::Receiver<Message>) {
    while let Some(message) = queue.recv().await {
        // The guest stands still until these have arrived.
        let awaited = matches!(
            message,
            Message::Behind { .. } | Message::Handover { .. } | Message::Declined(_)
        );
        let sent = if awaited {
            sender.send_twice(&message).await
        } else {
            sender.send(&message).await
        };
        if let Err(error) = sent {
            tracing::debug!("control lane: {error}");
            return;
        }
    }
    if let Err(error) = sender.finish().await {
        tracing::debug!("control lane: {error}");
    }
}

async fn read_control<I>(
    mut receiver: ControlReceiver,
    inputs: mpsc::Sender<I>,
    message: impl Fn(Message) -> I,
    gone: impl FnOnce(String) -> I,
    over: Arc<AtomicBool>,
) {
    loop {
        match receiver.recv().await {
            Ok(received) => {
                tracing::trace!(?received, "control");
                if inputs.send(message(received)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                over.store(true, Ordering::Release);
                // The driver is gone only when the session has ended.
                let _ = inputs.send(gone(source::chain(&error))).await;
                return;
            }
        }
    }
}

/// Waits for a point in time, or for ever.
pub(crate) async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Appends to the session's journal, which begins with its first record.
pub(crate) fn append<R: Record + Clone>(
    journal: &mut Option<Journal<R>>,
    directory: &Path,
    context: &Context,
    record: &R,
) -> Result<(), JournalError> {
    if journal.is_none() {
        *journal = Some(Journal::create(directory, context)?);
    }
    journal.as_mut().expect("made above").append(record)
}

/// What a report says of the link, of which that many were lost before.
fn link_report(link: &Link, reconnects: u32, silence: &Silence) -> crate::report::Link {
    let stats = link.stats();
    crate::report::Link {
        sent_bytes: stats.sent_bytes,
        received_bytes: stats.received_bytes,
        reconnects,
        urgent: stats.urgent,
        repair: stats.repair,
        longest_silence: silence.longest().as_secs_f64(),
        ..figures(&stats).into()
    }
}

/// The transport's figures in the machine's form.
pub(crate) fn figures(stats: &LinkStats) -> LinkFigures {
    LinkFigures {
        rtt: stats.rtt,
        min_rtt: stats.min_rtt,
        bandwidth: stats.bandwidth,
        loss: stats.loss,
        loss_burst: stats.loss_burst,
        queue: stats.queue,
        shared: stats.shared,
    }
}
