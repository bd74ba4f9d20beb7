//! One authorised connection: the control stream, batches and short messages on streams of their
//! own, figures. A `Link` exists only after this side has accepted the other (see `endpoint`), and
//! sends nothing but control messages before the other has accepted it.
//!
//! Flow control is per lane: the receiver grants each lane a window of bytes that its application
//! has not taken yet, and takes everything off QUIC at once. So QUIC's own windows, which all
//! lanes share, never stop anything, and a lane whose receiver is slow holds up no other.

mod control;
pub(crate) mod credit;
mod inbound;
mod outbound;
pub mod repair;
mod stats;
pub mod urgent;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::VarInt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

pub use control::{ControlReceiver, ControlSender};
pub use stats::LinkStats;

use crate::config::TransportConfig;
use crate::congestion::Congestion;
use crate::congestion::quic::open_gate;
use crate::congestion::steering::Steering;
use crate::error::{CloseCode, LinkError, TransportError};
use crate::lane::Lane;
use crate::message::Message;
use crate::trust::PeerIdentity;
use credit::{CreditReceiver, CreditSender};
use inbound::Inbound;
use outbound::Outbound;
use urgent::driver::Urgent;

/// First byte of a unidirectional stream.
pub(crate) mod kind {
    /// Not a stream: a parcel with a copy of a part of the control stream.
    pub(crate) const CONTROL_COPY: u8 = 2;
    /// Lane windows and credit, for the life of the connection.
    pub(crate) const CREDIT: u8 = 1;
    /// One message; the lane's number is added.
    pub(crate) const MESSAGE: u8 = 8;
    /// One batch; the lane's number is added.
    pub(crate) const BATCH: u8 = 16;
    /// What could not be delivered in datagrams, marked with its parcel.
    pub(crate) const PARCEL: u8 = 24;
}

/// What arrives on streams of its own.
#[derive(Clone, Debug, PartialEq)]
pub enum Incoming {
    /// A batch of blocks, to be decoded.
    Batch {
        /// The lane it came on.
        lane: Lane,
        /// The batch.
        bytes: Bytes,
    },
    /// A message.
    Message(Message),
}

/// One authorised connection. Clones are the same link. It stays open until it is closed, or lost;
/// dropping every clone closes it.
#[derive(Clone)]
pub struct Link {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    outbound: Outbound,
    inbound: Arc<Inbound>,
    urgent: Arc<Urgent>,
    copies: Arc<control::Copies>,
    stats: stats::Sampler,
    /// Changes once, when the peer has accepted this side.
    accepted: watch::Receiver<bool>,
    connect_timeout: Duration,
    /// The peer's address as it was asked for, which a socket may show in another form.
    called: SocketAddr,
    tasks: Vec<tokio::task::AbortHandle>,
}

/// What the tasks of a link share with it. They must not keep the link itself alive.
pub(crate) struct Shared {
    pub(crate) connection: quinn::Connection,
    pub(crate) peer: PeerIdentity,
    pub(crate) idle_timeout: Duration,
    /// What the congestion controller is told.
    pub(crate) steering: Arc<Steering>,
    /// Why this side ended the link, where it did.
    cause: OnceLock<LinkError>,
    /// What is needed to see whether the peer has been told.
    closing: OnceLock<Closing>,
}

/// The moment in which a link was ended.
struct Closing {
    at: Instant,
    /// Datagrams sent by then.
    sent: u64,
    /// Whether the closing packet is certainly not among them.
    certain: bool,
}

/// How long the packet that closes a link may take to leave, where it cannot be seen: QUIC's task
/// is woken for it at once.
const CLOSE_LEAVES: Duration = Duration::from_millis(25);

impl Shared {
    pub(crate) fn new(
        connection: quinn::Connection,
        peer: PeerIdentity,
        idle_timeout: Duration,
        steering: Arc<Steering>,
    ) -> Self {
        Self {
            connection,
            peer,
            idle_timeout,
            steering,
            cause: OnceLock::new(),
            closing: OnceLock::new(),
        }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    /// Closes the link because the peer broke the protocol.
    pub(crate) fn violation(&self, what: impl Into<String>) -> LinkError {
        let what = what.into();
        let error = LinkError::Protocol {
            peer: self.addr(),
            what: what.clone(),
        };
        self.close_with(CloseCode::PROTOCOL.0, &what, error);
        self.error()
    }

    pub(crate) fn close_with(&self, code: u32, reason: &str, cause: LinkError) {
        if let Some(reason) = self.connection.close_reason() {
            if reason != quinn::ConnectionError::LocallyClosed {
                // Ended by the peer, or lost. QUIC forgets this when the whole endpoint is closed.
                self.closing.get_or_init(|| Closing {
                    at: Instant::now(),
                    sent: 0,
                    certain: true,
                });
            }
        } else if self.cause.set(cause).is_ok() {
            let reason = truncated(reason);
            open_gate(&self.connection);
            let sent = || self.connection.stats().udp_tx.datagrams;
            let before = sent();
            self.connection
                .close(VarInt::from_u32(code), reason.as_bytes());
            // Whatever is sent from here on is the closing packet. What was sent since `before` may
            // be that one, or one of those that preceded it.
            let sent = sent();
            self.closing.get_or_init(|| Closing {
                at: Instant::now(),
                sent,
                certain: sent == before,
            });
        }
    }

    /// Whether the link has ended and the packet that says so has left this host, as far as can be
    /// seen (QUIC does not tell); or the peer has ended it.
    pub(crate) fn told(&self) -> bool {
        let Some(closing) = self.closing.get() else {
            // An end that this side did not make needs no telling.
            let reason = self.connection.close_reason();
            return reason.is_some_and(|reason| reason != quinn::ConnectionError::LocallyClosed);
        };
        self.connection.stats().udp_tx.datagrams > closing.sent
            || !closing.certain && closing.at.elapsed() > CLOSE_LEAVES
    }

    /// Why the link is no more. Falls back to a general answer on a link that is up.
    pub(crate) fn error(&self) -> LinkError {
        match self.connection.close_reason() {
            Some(reason) => self.explain(reason),
            None => LinkError::Lost {
                peer: self.addr(),
                what: "a stream ended before its time".to_owned(),
            },
        }
    }

    pub(crate) fn explain(&self, error: quinn::ConnectionError) -> LinkError {
        use quinn::ConnectionError as E;
        let peer = self.addr();
        match error {
            E::ApplicationClosed(close) => LinkError::PeerClosed {
                peer,
                code: u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            E::TimedOut => LinkError::TimedOut {
                peer,
                after: self.idle_timeout,
            },
            E::LocallyClosed => self.cause.get().cloned().unwrap_or(LinkError::LocalClosed {
                reason: "the endpoint was closed".to_owned(),
            }),
            other => LinkError::Lost {
                peer,
                what: other.to_string(),
            },
        }
    }
}

/// Close reasons must fit one packet.
fn truncated(reason: &str) -> &str {
    let mut end = reason.len().min(800);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

impl Link {
    /// Takes over a connection whose peer has been judged and told so.
    pub(crate) fn new(
        called: SocketAddr,
        shared: Arc<Shared>,
        config: &TransportConfig,
        credit_out: CreditSender,
    ) -> Self {
        let urgent = Arc::new(Urgent::new(shared.clone()));
        let outbound = Outbound::new(shared.clone(), urgent.clone());
        let windows = config.lane_windows();
        let copies = Arc::<control::Copies>::default();
        let inbound = Arc::new(Inbound::new(
            shared.clone(),
            windows,
            urgent.clone(),
            copies.clone(),
        ));
        let (accept, accepted) = watch::channel(false);
        let begin = begin(
            shared.clone(),
            outbound.clone(),
            inbound.clone(),
            urgent.clone(),
            accept,
        );
        let tasks = vec![
            tokio::spawn(begin).abort_handle(),
            tokio::spawn(inbound.clone().grant_credit(credit_out)).abort_handle(),
        ];
        let adaptive = config.congestion == Congestion::Adaptive;
        Self {
            inner: Arc::new(Inner {
                stats: stats::Sampler::new(adaptive),
                shared,
                outbound,
                inbound,
                urgent,
                copies,
                accepted,
                connect_timeout: config.connect_timeout,
                called,
                tasks,
            }),
        }
    }

    /// Waits until the peer has accepted this side, or says why it has not.
    pub async fn accepted(&self) -> Result<(), TransportError> {
        let peer = self.inner.called;
        let after = self.inner.connect_timeout;
        let mut accepted = self.inner.accepted.clone();
        match timeout(after, accepted.wait_for(|accepted| *accepted)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(TransportError::of_link(peer, self.inner.shared.error())),
            Err(_) => Err(TransportError::Unreachable { peer, after }),
        }
    }

    /// Opens the control stream. Only the client does, once.
    pub async fn open_control(&self) -> Result<(ControlSender, ControlReceiver), LinkError> {
        let inner = &self.inner;
        control::open(
            inner.shared.clone(),
            inner.outbound.clone(),
            inner.copies.clone(),
        )
        .await
    }

    /// Takes the control stream that the client opened. Only the server does, once. Returns with
    /// the client's first message.
    pub async fn accept_control(&self) -> Result<(ControlSender, ControlReceiver), LinkError> {
        let inner = &self.inner;
        control::accept(
            inner.shared.clone(),
            inner.outbound.clone(),
            inner.copies.clone(),
        )
        .await
    }

    /// Sends a batch ([`crate::codec::MAX_BATCH`] bytes at most) on a stream of its own, or, where it
    /// is urgent and short, as datagrams with redundancy. Waits
    /// while the lane's share is used up, never for a lower lane; returns when QUIC has the bytes,
    /// which says nothing about their arrival.
    pub async fn send_batch(&self, lane: Lane, bytes: Bytes) -> Result<(), LinkError> {
        self.inner.outbound.send_batch(lane, bytes, false).await
    }

    /// Sends a batch as [`Self::send_batch`] does, with parity that stands in for packets that are lost: for
    /// what a guest that stands still waits for. Costs a few percent of its bytes.
    pub async fn send_batch_with_parity(&self, lane: Lane, bytes: Bytes) -> Result<(), LinkError> {
        self.inner.outbound.send_batch(lane, bytes, true).await
    }

    /// Sends a message as [`Self::send_batch`] sends a batch, ahead of whatever waits on lower lanes. Messages
    /// sent like this can overtake each other and those of the control lane.
    pub async fn send_message(&self, lane: Lane, message: &Message) -> Result<(), LinkError> {
        self.inner.outbound.send_message(lane, message).await
    }

    /// The next batch or message that has arrived completely, from the highest lane that has one.
    /// What came before the link was lost is still delivered.
    pub async fn next_incoming(&self) -> Result<Incoming, LinkError> {
        self.inner.inbound.next().await
    }

    /// Figures of the link.
    pub fn stats(&self) -> LinkStats {
        LinkStats {
            urgent: self.inner.urgent.stats(),
            repair: repair::RepairStats {
                restored: self.inner.inbound.restored(),
                ..self.inner.urgent.repair_stats()
            },
            ..self.inner.stats.sample(&self.inner.shared.connection)
        }
    }

    /// Who is on the other side.
    pub fn peer(&self) -> &PeerIdentity {
        &self.inner.shared.peer
    }

    /// The other side's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.inner.shared.addr()
    }

    /// Ends the link at once, telling the peer why. What has not arrived will not.
    pub fn close(&self, code: CloseCode, reason: &str) {
        let cause = LinkError::LocalClosed {
            reason: reason.to_owned(),
        };
        self.inner.shared.close_with(code.0, reason, cause);
    }

    /// Waits until the link is no more; says who ended it and why.
    pub async fn closed(&self) -> LinkError {
        let error = self.inner.shared.connection.closed().await;
        self.inner.shared.explain(error)
    }
}

/// Waits for the peer's credit stream, its first one and its sign that it accepts this side; then
/// takes its streams and follows its credit until the link ends.
async fn begin(
    shared: Arc<Shared>,
    outbound: Outbound,
    inbound: Arc<Inbound>,
    urgent: Arc<Urgent>,
    accept: watch::Sender<bool>,
) {
    // An error has closed the link or tells of its end, which everyone learns by themselves.
    let Ok(credit) = CreditReceiver::accept(&shared).await else {
        return;
    };
    outbound.open(credit.windows);
    accept.send_replace(true);
    // Ended with this task.
    let mut tasks = JoinSet::new();
    tasks.spawn(outbound.follow_credit(credit));
    tasks.spawn(urgent.clone().keep_sending());
    tasks.spawn(urgent.keep_receiving(inbound.clone()));
    tasks.spawn(inbound.accept_streams());
    while tasks.join_next().await.is_some() {}
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("peer", self.peer())
            .field("addr", &self.peer_addr())
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        let reason = "dropped";
        let cause = LinkError::LocalClosed {
            reason: reason.to_owned(),
        };
        self.shared.close_with(CloseCode::SHUTDOWN.0, reason, cause);
    }
}
