//! A UDP relay that behaves like a link: clients send to its address, it passes their datagrams on
//! to the target and the answers back, each direction through a [`Link`] of its own. It never
//! looks into a datagram.
//!
//! Every client has its own socket towards the target, so the target sees as many peers as
//! there are clients. Each direction runs on one thread; see `direction`.

mod direction;

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use socket2::SockAddr;

use crate::model::Link;
use crate::spec::LinkSpec;
use crate::sys::{self, Wake};

/// Clients at a time; one more takes the place of the one that has been silent longest.
pub const MAX_CLIENTS: usize = 64;

/// Socket buffers asked for, in bytes.
const SOCKET_BUFFER: usize = 8 << 20;

/// What a relay does.
#[derive(Clone, Copy, Debug)]
pub struct RelayConfig {
    /// Where clients send to; port 0 picks a free one, see [`RelayHandle::local_addr`].
    pub listen: SocketAddr,
    /// Where their datagrams go.
    pub target: SocketAddr,
    /// The link, the same in both directions.
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
            controls: Mutex::new(Controls {
                spec: config.link,
                down: false,
            }),
            changes: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            forward: DirectionState::new(Wake::new().map_err(set_up("an eventfd"))?),
            back: DirectionState::new(Wake::new().map_err(set_up("an eventfd"))?),
        });
        let mut handle = RelayHandle {
            local,
            shared,
            threads: Vec::new(),
        };
        // An error on the way drops the handle, which ends a thread that has started.
        for (name, seed, run) in [
            (
                "relay-forward",
                0,
                direction::forward as fn(&Shared, Link<_>),
            ),
            ("relay-back", 1, direction::back),
        ] {
            let shared = Arc::clone(&handle.shared);
            let link = Link::new(config.link, config.seed.wrapping_mul(2).wrapping_add(seed));
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
}

impl RelayHandle {
    /// Where clients send to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// What has happened so far.
    pub fn stats(&self) -> RelayStats {
        RelayStats {
            forward: self.shared.forward.counters.snapshot(),
            back: self.shared.back.counters.snapshot(),
        }
    }

    /// Cuts both directions, which loses everything under way, or joins them again.
    pub fn set_down(&self, down: bool) {
        self.change(|controls| controls.down = down);
    }

    /// Changes the link of both directions for packets that come from now on.
    pub fn set_link(&self, link: LinkSpec) {
        self.change(|controls| controls.spec = link);
    }

    /// Ends the relay and says what happened in its life.
    pub fn stop(mut self) -> RelayStats {
        self.end();
        self.stats()
    }

    fn change(&self, change: impl FnOnce(&mut Controls)) {
        change(&mut lock(&self.shared.controls));
        self.shared.announce();
    }

    fn end(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared.announce();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a relay thread panicked");
            }
        }
    }
}

impl Drop for RelayHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// What has happened on a relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayStats {
    /// From the clients to the target.
    pub forward: DirectionStats,
    /// From the target to the clients.
    pub back: DirectionStats,
}

/// What has happened in one direction. Bytes are IP-level: payload plus
/// [`UDP_OVERHEAD`](crate::model::UDP_OVERHEAD).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectionStats {
    /// Packets that came to the link.
    pub packets: u64,
    /// Bytes that came to the link.
    pub bytes: u64,
    /// Packets passed on.
    pub delivered_packets: u64,
    /// Bytes passed on.
    pub delivered_bytes: u64,
    /// Packets lost at random.
    pub dropped_loss: u64,
    /// Packets that found the queue full.
    pub dropped_queue: u64,
    /// Packets lost to a cut, under way or on arrival.
    pub dropped_down: u64,
    /// Packets that the emulator itself failed to carry: its own bounds, or a refused send. A
    /// measurement with many of them is not one of the link.
    pub dropped_relay: u64,
    /// Sum over delivered packets of how much later than due they were sent.
    pub lateness_total: Duration,
    /// The largest of these.
    pub lateness_max: Duration,
}

impl DirectionStats {
    /// How much later than due a packet was sent on average. A measurement of a link with a large
    /// figure here is one of the machine instead.
    pub fn lateness_mean(&self) -> Duration {
        let packets = self.delivered_packets.max(1);
        Duration::from_nanos((self.lateness_total.as_nanos() / u128::from(packets)) as u64)
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
    controls: Mutex<Controls>,
    /// Counts changes of `clients` and `controls`, so that the threads look only when there is one.
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

/// What the handle asks for.
#[derive(Clone, Copy, Debug)]
struct Controls {
    spec: LinkSpec,
    down: bool,
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

/// [`DirectionStats`] as its one thread counts and everybody reads.
#[derive(Debug, Default)]
struct Counters {
    packets: AtomicU64,
    bytes: AtomicU64,
    delivered_packets: AtomicU64,
    delivered_bytes: AtomicU64,
    dropped_loss: AtomicU64,
    dropped_queue: AtomicU64,
    dropped_down: AtomicU64,
    dropped_relay: AtomicU64,
    lateness_total: AtomicU64,
    lateness_max: AtomicU64,
}

impl Counters {
    fn snapshot(&self) -> DirectionStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DirectionStats {
            packets: load(&self.packets),
            bytes: load(&self.bytes),
            delivered_packets: load(&self.delivered_packets),
            delivered_bytes: load(&self.delivered_bytes),
            dropped_loss: load(&self.dropped_loss),
            dropped_queue: load(&self.dropped_queue),
            dropped_down: load(&self.dropped_down),
            dropped_relay: load(&self.dropped_relay),
            lateness_total: Duration::from_nanos(load(&self.lateness_total)),
            lateness_max: Duration::from_nanos(load(&self.lateness_max)),
        }
    }
}

/// Locks what is never left half-changed: a panic of another holder takes nothing from it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
