//! Two network namespaces, near and far, joined by an emulated link: whatever protocol the programs
//! in them speak, each of their packets meets the link's fate. It takes the right to make namespaces
//! (root, or a user namespace) and touches none but its own two.
//!
//! In each namespace is a TUN device with an address; a thread for each direction carries what
//! comes out of one into the other. TCP and UDP hand over up to 64 KiB at a time (see `gso`), which keeps
//! the cost of a fast link bearable and changes nothing about the fate of each packet.
//!
//! Nothing outlives the process: the devices and the namespaces live by its descriptors.

mod device;
mod direction;
mod gso;
mod judge;
mod pool;
mod sys;

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use device::Device;
use direction::Direction;

use crate::model::Path;
use crate::namespace::{Namespace, NamespaceError};
use crate::runner::{Counters, DirectionStats, LinkStats, Steering, join, keep_awake, seed_of};
use crate::spec::LinkSpec;
use crate::sys::Wake;

/// The device of the link in both namespaces.
pub const DEVICE: &str = device::NAME;

/// The near end, of the range that RFC 2544 sets aside for measuring networks.
pub const NEAR_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

/// The far end.
pub const FAR_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

/// The near end in IPv6, of the range that RFC 5180 sets aside for the same.
pub const NEAR_ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 1);

/// The far end in IPv6.
pub const FAR_ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 2);

/// Least MTU that IPv4 can work with.
const MTU_MIN: u16 = 68;

/// What joins the two namespaces.
#[derive(Clone, Debug)]
pub struct TunConfig {
    /// The link; its timed changes count from the start.
    pub link: LinkSpec,
    /// Seed of what is random; the two directions draw from different sequences of it.
    pub seed: u64,
    /// The largest packet on the link, IP header included, in bytes; at least 68.
    pub mtu: u16,
    /// Whether the kernel may hand over many packets at once. Without it every packet costs a system
    /// call, and a link reaches a sixth of the throughput.
    pub offload: bool,
}

impl TunConfig {
    /// A link with the MTU of Ethernet and offloads.
    pub fn new(link: LinkSpec, seed: u64) -> Self {
        Self {
            link,
            seed,
            mtu: 1500,
            offload: true,
        }
    }
}

/// Why a link between namespaces cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// No namespace.
    #[error("TUN link: no namespace")]
    Namespace(#[from] NamespaceError),
    /// A device cannot be made or set up.
    #[error(
        "TUN link: cannot {what} the device {DEVICE}; it takes CAP_NET_ADMIN and a /dev/net/tun \
         that can be opened (modprobe tun)"
    )]
    Device {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A packet size that no link has.
    #[error("TUN link: an MTU of {mtu} bytes is too small for IP; use {MTU_MIN} or more")]
    Mtu {
        /// What was asked for.
        mtu: u16,
    },
    /// Something that every link needs cannot be had.
    #[error("TUN link: cannot set up {what}")]
    SetUp {
        /// What it was.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The link; [`TunLink::start`] is all of it.
#[derive(Debug)]
pub struct TunLink;

impl TunLink {
    /// Makes both namespaces and joins them, by two threads that end with the handle.
    pub fn start(config: TunConfig) -> Result<TunHandle, TunError> {
        if config.mtu < MTU_MIN {
            return Err(TunError::Mtu { mtu: config.mtu });
        }
        let set_up = |what| move |source| TunError::SetUp { what, source };
        let side = |address| -> Result<Side, TunError> {
            let namespace = Namespace::new()?;
            Ok(Side {
                device: Device::create(&namespace, address, config.mtu, config.offload)?,
                namespace,
                wake: Wake::new().map_err(set_up("an eventfd"))?,
                counters: Counters::default(),
            })
        };
        let shared = Arc::new(Shared {
            near: side((NEAR_ADDRESS, NEAR_ADDRESS_V6))?,
            far: side((FAR_ADDRESS, FAR_ADDRESS_V6))?,
            start: Instant::now(),
            steering: Steering::new(config.link.clone()),
            stopping: AtomicBool::new(false),
        });
        let mut handle = TunHandle {
            shared,
            threads: Vec::new(),
            _awake: keep_awake(),
        };
        // An error on the way drops the handle, which ends a thread that has started.
        let LinkSpec { forward, back, .. } = &config.link;
        for (name, spec, is_back) in [("tun-forward", forward, false), ("tun-back", back, true)] {
            let shared = Arc::clone(&handle.shared);
            let path = Path::new(spec, seed_of(config.seed, is_back));
            let run = move || Direction::new(&shared, path, is_back).run();
            let thread = std::thread::Builder::new().name(name.to_owned());
            let thread = thread.spawn(run).map_err(set_up("a thread"))?;
            handle.threads.push(thread);
        }
        Ok(handle)
    }
}

/// A running link between two namespaces; link, devices and namespaces end when this is dropped (a
/// namespace not before the last process in it).
#[derive(Debug)]
pub struct TunHandle {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// No core sleeps while it is open.
    _awake: Option<File>,
}

impl TunHandle {
    /// The near namespace.
    pub fn near(&self) -> &Namespace {
        &self.shared.near.namespace
    }

    /// The far namespace.
    pub fn far(&self) -> &Namespace {
        &self.shared.far.namespace
    }

    /// The address of the near end of the link.
    pub fn near_address(&self) -> Ipv4Addr {
        NEAR_ADDRESS
    }

    /// The address of the far end of the link.
    pub fn far_address(&self) -> Ipv4Addr {
        FAR_ADDRESS
    }

    /// What has happened so far; forward is from near to far. Packets that a device dropped before they
    /// could be read are in `dropped_relay`.
    pub fn stats(&self) -> LinkStats {
        LinkStats {
            forward: self.shared.near.stats(),
            back: self.shared.far.stats(),
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

    /// Ends the link and says what happened in its life.
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

impl Drop for TunHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the two threads and the handle share.
#[derive(Debug)]
struct Shared {
    near: Side,
    far: Side,
    /// Zero of the virtual time of both directions.
    start: Instant,
    steering: Steering,
    stopping: AtomicBool,
}

/// One end, and what belongs to the direction that begins there.
#[derive(Debug)]
struct Side {
    // The order matters: a device goes before its namespace.
    device: Device,
    namespace: Namespace,
    wake: Wake,
    counters: Counters,
}

impl Shared {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Makes both threads look at what has changed.
    fn announce(&self) {
        self.near.wake.wake();
        self.far.wake.wake();
    }
}

impl Side {
    fn stats(&self) -> DirectionStats {
        let mut stats = self.counters.snapshot();
        match self.device.dropped_unread() {
            Ok(dropped) => stats.dropped_relay += dropped,
            Err(error) => tracing::warn!(%error, "cannot count what the device itself dropped"),
        }
        stats
    }
}
