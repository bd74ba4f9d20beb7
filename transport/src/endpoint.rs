//! A UDP port from which links begin. Judges every peer between the end of the handshake and the
//! first stream, and sees to it that both sides learn why a peer was refused: no `Link` exists
//! before this side has accepted the peer, and nothing but the control stream's first words leaves
//! before the peer has said, by its credit stream, that it accepts this side.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use quinn::VarInt;
use rustls_pki_types::CertificateDer;
use tokio::sync::{Mutex, Semaphore, mpsc};

use crate::config::TransportConfig;
use crate::congestion::steering::Steering;
use crate::error::{CloseCode, LinkError, TransportError};
use crate::identity::Identity;
use crate::link::credit::CreditSender;
use crate::link::{Link, Shared};
use crate::reset;
use crate::socket;
use crate::tls;
use crate::trust::{PeerIdentity, Rejection, Trust};

/// Handshakes under way at once; more are turned away before they cost anything.
const HANDSHAKES: usize = 16;

/// How often, and how many times at most, it is looked whether closing packets have been sent:
/// QUIC does not tell, and is at work on other threads at once.
const LOOK: Duration = Duration::from_millis(1);
const LOOKS: u32 = 250;

/// Opens links as a client, or takes them as a server.
pub struct Endpoint {
    quinn: quinn::Endpoint,
    judge: Arc<Judge>,
    /// Results of the handshakes of a server.
    arrivals: Mutex<mpsc::Receiver<Result<Link, TransportError>>>,
    acceptor: Option<tokio::task::AbortHandle>,
}

/// What turns a connection into a link.
struct Judge {
    trust: Trust,
    config: TransportConfig,
    steering: Arc<Steering>,
    /// Links that may still be open, to close them one by one, and those that were closed until
    /// their peers have been told.
    links: std::sync::Mutex<Vec<Arc<Shared>>>,
}

impl Endpoint {
    /// Listens on `addr`. Must be called within a tokio runtime.
    pub fn server(
        addr: SocketAddr,
        identity: &Identity,
        trust: Trust,
        config: &TransportConfig,
    ) -> Result<Self, TransportError> {
        let tls = tls::server(identity).map_err(TransportError::Tls)?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls));
        let steering = Arc::new(Steering::new(config.rate_limit));
        server.transport_config(config.quinn(&steering));
        let quinn = open(addr, identity, Some(server))?;
        let judge = Arc::new(Judge::new(trust, config, steering));
        let (sender, arrivals) = mpsc::channel(HANDSHAKES);
        let acceptor = tokio::spawn(accept_all(quinn.clone(), judge.clone(), sender));
        Ok(Self {
            quinn,
            judge,
            arrivals: Mutex::new(arrivals),
            acceptor: Some(acceptor.abort_handle()),
        })
    }

    /// A client on a port of the system's choice. Must be called within a tokio runtime.
    pub fn client(
        identity: &Identity,
        trust: Trust,
        config: &TransportConfig,
    ) -> Result<Self, TransportError> {
        let tls = tls::client(identity).map_err(TransportError::Tls)?;
        let mut client = quinn::ClientConfig::new(Arc::new(tls));
        let steering = Arc::new(Steering::new(config.rate_limit));
        client.transport_config(config.quinn(&steering));
        // Both families on one socket; hosts without IPv6 have only the other.
        let mut quinn = open((Ipv6Addr::UNSPECIFIED, 0).into(), identity, None)
            .or_else(|_| open((Ipv4Addr::UNSPECIFIED, 0).into(), identity, None))?;
        quinn.set_default_client_config(client);
        Ok(Self {
            quinn,
            judge: Arc::new(Judge::new(trust, config, steering)),
            arrivals: Mutex::new(mpsc::channel(1).1),
            acceptor: None,
        })
    }

    /// The address it is bound to.
    pub fn local_addr(&self) -> Result<SocketAddr, TransportError> {
        self.quinn
            .local_addr()
            .map_err(|source| TransportError::Bind {
                addr: (Ipv6Addr::UNSPECIFIED, 0).into(),
                source,
            })
    }

    /// Another hard cap in bytes/s for all links of this endpoint, or none, from now on.
    pub fn set_rate_limit(&self, limit: Option<u64>) {
        self.judge.steering.set_rate_limit(limit);
    }

    /// Moves to another port of the system's choice, and with it every link: QUIC carries them to the
    /// new address without losing what is under way. For a host whose address has changed.
    pub fn rebind(&self) -> Result<(), TransportError> {
        let addr = unspecified(self.local_addr()?);
        let bind = |source| TransportError::Bind { addr, source };
        let socket = socket::bind(addr).map_err(bind)?;
        self.quinn.rebind(socket).map_err(bind)
    }

    /// Connects to a server. Returns when both sides have accepted each other.
    pub async fn connect(&self, addr: SocketAddr) -> Result<Link, TransportError> {
        let link = self.dial(addr).await?;
        link.accepted().await?;
        Ok(link)
    }

    /// Connects to a server. Returns when this side has accepted the other, a round trip before it
    /// can know whether it is accepted itself: see [`Link::accepted`]. Messages on the control
    /// stream go out at once, everything else waits.
    pub async fn dial(&self, addr: SocketAddr) -> Result<Link, TransportError> {
        let address = |what: String| TransportError::Address { peer: addr, what };
        let connecting = self
            .quinn
            .connect(addr, tls::SERVER_NAME)
            .map_err(|error| address(error.to_string()))?;
        self.judge.admit(addr, connecting).await
    }

    /// The next link that a client has opened. An error tells of a peer that was refused, or
    /// failed otherwise; this can be called again after every error except
    /// [`TransportError::Closed`]. Cancel-safe.
    pub async fn accept(&self) -> Result<Link, TransportError> {
        let mut arrivals = self.arrivals.lock().await;
        arrivals.recv().await.unwrap_or(Err(TransportError::Closed))
    }

    /// Closes every link of this endpoint, telling the peers why.
    pub fn close(&self, code: CloseCode, reason: &str) {
        for link in self.judge.links().iter() {
            let cause = LinkError::LocalClosed {
                reason: reason.to_owned(),
            };
            link.close_with(code.0, reason, cause);
        }
        // Handshakes under way go with the endpoint.
        self.quinn
            .close(VarInt::from_u32(code.0), reason.as_bytes());
    }

    /// Waits until every peer has been told of its link's end, or cannot be: for some three
    /// probe timeouts, in which a lost closing packet is repeated for a peer that still sends.
    pub async fn wait_idle(&self) {
        self.quinn.wait_idle().await;
    }

    /// Waits, after [`Self::close`], until what closes each link has left this host; not until it
    /// has arrived. For an end that the peer knows of by its own messages: were the packet lost, it
    /// would only find out later that nobody is left. Connections that are no links (in their
    /// handshake, or refused just now) are waited for as in [`Self::wait_idle`].
    pub async fn wait_sent(&self) {
        let mut looks = tokio::time::interval(LOOK);
        for _ in 0..LOOKS {
            looks.tick().await;
            let links = self.judge.links();
            let (all, told) = (links.len(), links.iter().filter(|link| link.told()).count());
            drop(links);
            if self.quinn.open_connections() > all {
                break;
            }
            if told == all {
                return;
            }
        }
        self.wait_idle().await;
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // Links that nobody accepted go with the channel; those that were taken live on.
        if let Some(acceptor) = &self.acceptor {
            acceptor.abort();
        }
    }
}

fn open(
    addr: SocketAddr,
    identity: &Identity,
    server: Option<quinn::ServerConfig>,
) -> Result<quinn::Endpoint, TransportError> {
    let bind = |source| TransportError::Bind { addr, source };
    let socket = socket::bind(addr).map_err(bind)?;
    let port = socket.local_addr().map_err(bind)?.port();
    quinn::Endpoint::new(
        reset::endpoint_config(identity, port),
        server,
        socket,
        Arc::new(quinn::TokioRuntime),
    )
    .map_err(bind)
}

/// Any address of the same family, and any port.
fn unspecified(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Takes connections until the endpoint is closed. Handshakes run beside each other: one that
/// stalls holds up nobody.
async fn accept_all(
    endpoint: quinn::Endpoint,
    judge: Arc<Judge>,
    arrivals: mpsc::Sender<Result<Link, TransportError>>,
) {
    let room = Arc::new(Semaphore::new(HANDSHAKES));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::warn!(peer = %incoming.remote_address(), "too many handshakes, turned away");
            incoming.refuse();
            continue;
        };
        let (judge, arrivals) = (judge.clone(), arrivals.clone());
        tokio::spawn(async move {
            let peer = incoming.remote_address();
            let result = match incoming.accept() {
                Ok(connecting) => welcome(&judge, peer, connecting).await,
                Err(error) => Err(handshake_error(peer, &error)),
            };
            // Without a receiver the endpoint is gone, and the link with it.
            let _unwanted = arrivals.send(result).await;
            drop(permit);
        });
    }
}

/// A client's link, once each side has accepted the other.
async fn welcome(
    judge: &Judge,
    peer: SocketAddr,
    connecting: quinn::Connecting,
) -> Result<Link, TransportError> {
    let link = judge.admit(peer, connecting).await?;
    link.accepted().await?;
    Ok(link)
}

impl Judge {
    fn new(trust: Trust, config: &TransportConfig, steering: Arc<Steering>) -> Self {
        Self {
            trust,
            config: config.clone(),
            steering,
            links: std::sync::Mutex::default(),
        }
    }

    fn links(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Shared>>> {
        // Only pushed to and filtered: sound even after a panic elsewhere.
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a link, and forgets those that have ended. A link that is dropped is closed, so
    /// that none stays here for ever.
    fn remember(&self, shared: Arc<Shared>) {
        let mut links = self.links();
        links.retain(|link| !link.told());
        links.push(shared);
    }

    /// Completes the handshake, judges the peer, tells it that it is accepted.
    async fn admit(
        &self,
        addr: SocketAddr,
        connecting: quinn::Connecting,
    ) -> Result<Link, TransportError> {
        let after = self.config.connect_timeout;
        tokio::time::timeout(after, self.admit_untimed(addr, connecting))
            .await
            .unwrap_or(Err(TransportError::Unreachable { peer: addr, after }))
    }

    async fn admit_untimed(
        &self,
        addr: SocketAddr,
        connecting: quinn::Connecting,
    ) -> Result<Link, TransportError> {
        let connection = connecting.await.map_err(|error| match error {
            quinn::ConnectionError::TimedOut => TransportError::Unreachable {
                peer: addr,
                after: self.config.connect_timeout,
            },
            error => handshake_error(addr, &error),
        })?;
        let peer = self.judge(addr, &connection)?;
        let shared = Arc::new(Shared::new(
            connection,
            peer,
            self.config.idle_timeout,
            self.steering.clone(),
        ));
        let credit_out = CreditSender::open(&shared, self.config.lane_windows())
            .await
            .map_err(|error| TransportError::of_link(addr, error))?;
        self.remember(shared.clone());
        Ok(Link::new(addr, shared, &self.config, credit_out))
    }

    fn judge(
        &self,
        addr: SocketAddr,
        connection: &quinn::Connection,
    ) -> Result<PeerIdentity, TransportError> {
        let chain = connection
            .peer_identity()
            .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
            .ok_or(Rejection::NoCertificate);
        chain
            .and_then(|chain| self.trust.judge(&chain))
            .map_err(|rejection| {
                connection.close(
                    VarInt::from_u32(CloseCode::UNAUTHORISED.0),
                    rejection.for_peer().as_bytes(),
                );
                TransportError::Stranger {
                    peer: addr,
                    fingerprint: rejection.fingerprint(),
                    reason: rejection.to_string(),
                }
            })
    }
}

fn handshake_error(peer: SocketAddr, error: &quinn::ConnectionError) -> TransportError {
    match error {
        quinn::ConnectionError::ApplicationClosed(close)
            if close.error_code == VarInt::from_u32(CloseCode::UNAUTHORISED.0) =>
        {
            TransportError::Refused {
                peer,
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            }
        }
        other => TransportError::Handshake {
            peer,
            what: other.to_string(),
        },
    }
}
