//! A UDP relay that behaves like a link: clients send to its address, it passes their datagrams on
//! to the target and the answers back, each direction through a [`Link`] of its own. It never
//! looks into a datagram.
//!
//! Every client has its own socket towards the target, so the target sees as many peers as
//! there are clients. Each direction runs on one thread; see `direction`.

mod direction;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::SockAddr;

use crate::model::Link;
use crate::runner::{Counters, LinkStats, Steering, join, keep_awake, lock, seed_of};
use crate::spec::LinkSpec;
use crate::sys::{self, Wake};

/// Clients at a time; one more takes the place of the one that has been silent longest.
pub const MAX_CLIENTS: usize = 64;

/// Socket buffers asked for, in bytes.
const SOCKET_BUFFER: usize = 8 << 20;

/// What a relay does.
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// Where clients send to; port 0 picks a free one, see [`RelayHandle::local_addr`].
    pub listen: SocketAddr,
    /// Where their datagrams go.
    pub target: SocketAddr,
    /// The link; its timed changes count from the start of the relay.
    pub link: LinkSpec,
    /// Seed of the random losses; the two directions draw from different sequences of it.
    pub seed: u64,
}

/// Why a relay cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The listening address cannot be had.
    #[error("relay: cannot listen on {address}; is it an address of this machine, and free?")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something that every relay needs cannot be had.
    #[error("relay: cannot set up {what}")]
    SetUp {
        /// What it was.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The relay; [`Relay::start`] is all of it.
#[derive(Debug)]
pub struct Relay;

impl Relay {
    /// Starts to relay, on two threads that end with the handle.
    pub fn start(config: RelayConfig) -> Result<RelayHandle, RelayError> {
        let address = config.listen;
        let listener =
            UdpSocket::bind(address).map_err(|source| RelayError::Listen { address, source })?;
        let set_up = |what| move |source| RelayError::SetUp { what, source };
        sys::grow_buffers(&listener, SOCKET_BUFFER).map_err(set_up("socket buffers"))?;
        let local = listener
            .local_addr()
            .map_err(set_up("the listening socket"))?;
        let shared = Arc::new(Shared {
            start: Instant::now(),
            target: config.target,
            listener,
            clients: Mutex::default(),
            steering: Steering::new(config.link.clone()),
            changes: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            forward: DirectionState::new(Wake::new().map_err(set_up("an eventfd"))?),
            back: DirectionState::new(Wake::new().map_err(set_up("an eventfd"))?),
        });
        let mut handle = RelayHandle {
            local,
            shared,
            threads: Vec::new(),
            _awake: keep_awake(),
        };
        // An error on the way drops the handle, which ends a thread that has started.
        let forward = direction::forward as fn(&Shared, Link<_>);
        for (name, back, run) in [
            ("relay-forward", false, forward),
            ("relay-back", true, direction::back),
        ] {
            let shared = Arc::clone(&handle.shared);
            let LinkSpec {
                forward: there,
                back: here,
                ..
            } = &config.link;
            let link = Link::new(if back { here } else { there }, seed_of(config.seed, back));
            let thread = std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || run(&shared, link))
                .map_err(set_up("a thread"))?;
            handle.threads.push(thread);
        }
        Ok(handle)
    }
}

/// A running relay; it ends when this is dropped.
#[derive(Debug)]
pub struct RelayHandle {
    local: SocketAddr,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// No core sleeps while it is open.
    _awake: Option<File>,
}

impl RelayHandle {
    /// Where clients send to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// What has happened so far.
    pub fn stats(&self) -> LinkStats {
        LinkStats {
            forward: self.shared.forward.counters.snapshot(),
            back: self.shared.back.counters.snapshot(),
        }
    }

    /// Cuts both directions, which loses everything under way, or leaves them to the timeline again.
    pub fn set_down(&self, down: bool) {
        self.shared.steering.set_down(down);
        self.shared.announce();
    }

    /// Changes the link for packets that come from now on, and starts its timeline.
    pub fn set_link(&self, link: LinkSpec) {
        self.shared.steering.set_link(link, self.shared.now());
        self.shared.announce();
    }

    /// Starts the timeline of the link's changes again.
    pub fn restart_timeline(&self) {
        self.shared.steering.restart_timeline(self.shared.now());
        self.shared.announce();
    }

    /// Gives every client another socket towards the target from its next datagram on, as a NAT does
    /// that has forgotten them: the target sees them come from new ports, and what it sends to the
    /// old ones is lost.
    pub fn rebind(&self) {
        lock(&self.shared.clients).clear();
        self.shared.announce();
    }

    /// Ends the relay and says what happened in its life.
    pub fn stop(mut self) -> LinkStats {
        self.end();
        self.stats()
    }

    fn end(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared.announce();
        join(&mut self.threads);
    }
}

impl Drop for RelayHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the two threads and the handle share.
#[derive(Debug)]
struct Shared {
    /// Zero of the virtual time of both links.
    start: Instant,
    target: SocketAddr,
    listener: UdpSocket,
    clients: Mutex<HashMap<SocketAddr, Arc<Client>>>,
    steering: Steering,
    /// Counts changes of `clients`, so that the threads look only when there is one.
    changes: AtomicU64,
    stopping: AtomicBool,
    forward: DirectionState,
    back: DirectionState,
}

impl Shared {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Makes both threads look at what has changed.
    fn announce(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        self.forward.wake.wake();
        self.back.wake.wake();
    }

    /// The client at `address`, with a socket of its own towards the target. A new one takes the
    /// place of the most silent one when there are too many.
    fn client(&self, address: SocketAddr) -> io::Result<Arc<Client>> {
        let mut clients = lock(&self.clients);
        if let Some(client) = clients.get(&address) {
            return Ok(Arc::clone(client));
        }
        if clients.len() >= MAX_CLIENTS {
            let silent = clients
                .values()
                .min_by_key(|client| client.last_seen.load(Ordering::Relaxed))
                .map(|client| client.address);
            if let Some(silent) = silent {
                clients.remove(&silent);
            }
        }
        let any: SocketAddr = match self.target {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let upstream = UdpSocket::bind(any)?;
        sys::grow_buffers(&upstream, SOCKET_BUFFER)?;
        upstream.connect(self.target)?;
        let client = Arc::new(Client {
            address,
            answer_to: address.into(),
            upstream,
            last_seen: AtomicU64::new(0),
        });
        clients.insert(address, Arc::clone(&client));
        drop(clients);
        self.announce();
        Ok(client)
    }
}

/// One address that has sent something.
#[derive(Debug)]
struct Client {
    address: SocketAddr,
    answer_to: SockAddr,
    /// Connected to the target.
    upstream: UdpSocket,
    /// When it last sent something, in milliseconds of the relay's life.
    last_seen: AtomicU64,
}

#[derive(Debug)]
struct DirectionState {
    wake: Wake,
    counters: Counters,
}

impl DirectionState {
    fn new(wake: Wake) -> Self {
        Self {
            wake,
            counters: Counters::default(),
        }
    }
}
