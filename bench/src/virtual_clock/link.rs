//! One direction of the link, packet by packet: queues of lanes at the sender, which sends as fast as the bottleneck
//! drains, what is urgent first; the emulator's own model decides what becomes of each packet. What has parity does
//! without a few of its packets, others have to be sent again.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::Duration;

use hybridmig_engine::session::io::Lane;
use hybridmig_netem::DirectionSpec;
use hybridmig_netem::model::Path;
use hybridmig_transport::link::repair::plan::share;

use super::seconds;

/// Contents of a full packet, and its length with all headers.
const PACKET: usize = 1414;
const HEADERS: usize = 66;
/// What congestion control lets wait at the bottleneck.
const QUEUE: Duration = Duration::from_millis(2);
/// Window that bulk begins with, in bytes; it doubles every round trip.
const FIRST_WINDOW: f64 = 40_000.0;
/// Round trips until a loss is known.
const NOTICED: f64 = 1.125;
/// Packets of parity that what a guest or the handover waits for has at least.
const LEAST_PARITY: usize = 2;
/// Bytes of bulk that QUIC takes beyond two windows.
const BULK_AHEAD: f64 = (1 << 20) as f64;
/// Rate of a link that has none.
const UNLIMITED: f64 = 125e6;
/// Packets after which a path shows what it is.
const PROBES: u32 = 4000;

/// Something that is on its way.
struct Cargo {
    lane: Lane,
    bytes: usize,
    /// Packets that have yet to be sent for the first time.
    unsent: usize,
    /// Packets that it takes, and those that came.
    needed: usize,
    came: usize,
    /// Lost packets that parity makes up for.
    spare: usize,
    latest: Duration,
}

impl Cargo {
    /// Bytes of contents in the next packet.
    fn packet(&self) -> usize {
        self.bytes.clamp(40, PACKET)
    }
}

/// One direction.
pub struct Direction {
    path: Path,
    /// Of the bottleneck, bytes per second with all headers.
    wire: f64,
    /// Mean and least time on the way, without a queue.
    way: Duration,
    least: Duration,
    /// Round trip with the other direction.
    rtt: Duration,
    loss: f64,
    burst: f64,
    /// Parity of what a guest or the handover waits for, as a share.
    parity: f64,
    queues: [VecDeque<u64>; 4],
    cargo: BTreeMap<u64, Cargo>,
    /// Lost packets, by when that is known.
    again: BinaryHeap<Reverse<(Duration, u64)>>,
    /// When the next packet may be sent.
    free: Duration,
    opened: Option<Duration>,
    last_control: Duration,
    unsent_bulk: f64,
    /// Bytes that were sent, without headers.
    pub sent: u64,
}

impl Direction {
    /// An idle one.
    pub fn new(spec: &DirectionSpec, seed: u64) -> Self {
        let wire = spec.rate.map_or(UNLIMITED, |bits| bits as f64 / 8.0);
        let Probed { way, least, burst } = probe(spec, wire, seed);
        let loss = spec.loss.mean();
        Self {
            path: Path::new(spec, seed),
            wire,
            way,
            least,
            rtt: 2 * way,
            loss,
            burst,
            parity: share(loss, burst),
            queues: Default::default(),
            cargo: BTreeMap::new(),
            again: BinaryHeap::new(),
            free: Duration::ZERO,
            opened: None,
            last_control: Duration::ZERO,
            unsent_bulk: 0.0,
            sent: 0,
        }
    }

    /// Both directions of a link.
    pub fn pair(link: &hybridmig_netem::LinkSpec, seed: u64) -> [Self; 2] {
        let mut pair = [
            Self::new(&link.forward, seed),
            Self::new(&link.back, seed ^ 1),
        ];
        let rtt = pair[0].way + pair[1].way;
        for direction in &mut pair {
            direction.rtt = rtt;
        }
        pair
    }

    /// Round trip that is seen, and the shortest.
    pub fn rtts(&self, other: &Self) -> (Duration, Duration) {
        (self.rtt + QUEUE, self.least + other.least)
    }

    /// Bytes per second that congestion control measures.
    pub fn bandwidth(&self) -> f64 {
        0.985 * self.wire
    }

    /// Share of packets that are lost.
    pub fn loss(&self) -> f64 {
        self.loss
    }

    /// Packets that are lost together.
    pub fn burst(&self) -> f64 {
        self.burst
    }

    /// Whether QUIC takes more bulk.
    pub fn has_room(&self) -> bool {
        self.unsent_bulk < 2.0 * self.wire * self.rtt.as_secs_f64() + BULK_AHEAD
    }

    /// Takes something to be sent. `guarded`: with parity.
    pub fn give(&mut self, id: u64, lane: Lane, bytes: f64, guarded: bool) {
        let bytes = (bytes as usize).max(1);
        let needed = bytes.div_ceil(PACKET);
        let spare = if guarded {
            ((needed as f64 * self.parity) as usize).max(LEAST_PARITY)
        } else {
            0
        };
        let cargo = Cargo {
            lane,
            bytes,
            unsent: needed + spare,
            needed,
            came: 0,
            spare,
            latest: Duration::ZERO,
        };
        if lane == Lane::Bulk {
            self.unsent_bulk += (cargo.unsent * cargo.packet()) as f64;
        }
        self.cargo.insert(id, cargo);
        self.queues[lane as usize].push_back(id);
    }

    /// When there is something to send.
    pub fn next(&self) -> Option<Duration> {
        let waiting = self.queues.iter().any(|queue| !queue.is_empty());
        let again = self.again.peek().map(|Reverse((at, _))| *at);
        let at = if waiting { Some(Duration::ZERO) } else { again };
        at.map(|at| at.max(self.free))
    }

    /// Sends a packet. What is complete with it, and when that arrives.
    pub fn step(&mut self, now: Duration) -> Option<(Duration, u64)> {
        let (id, first) = self.choose(now)?;
        let cargo = self.cargo.get_mut(&id)?;
        let contents = cargo.packet();
        if first {
            cargo.unsent -= 1;
            if cargo.lane == Lane::Bulk {
                self.unsent_bulk -= contents as f64;
                self.opened.get_or_insert(now);
            }
        }
        self.sent += contents as u64;
        let fate = self.path.admit(now, contents + HEADERS, 0);
        let mut complete = None;
        if let Ok(fate) = fate {
            cargo.came += 1;
            if cargo.came <= cargo.needed {
                cargo.latest = cargo.latest.max(fate.due);
            }
            complete = (cargo.came == cargo.needed).then_some((cargo.latest, cargo.lane));
        } else if cargo.spare > 0 {
            cargo.spare -= 1;
        } else if cargo.lane == Lane::Control && cargo.came < cargo.needed {
            // It comes again in its turn: what is sent after it on the same stream waits for it.
            cargo.came += 1;
            cargo.latest = cargo.latest.max(now + self.rtt.mul_f64(NOTICED + 0.5));
            complete = (cargo.came == cargo.needed).then_some((cargo.latest, cargo.lane));
        } else if cargo.came < cargo.needed {
            let known = now + self.rtt.mul_f64(NOTICED);
            self.again.push(Reverse((known, id)));
        }
        let done = cargo.came >= cargo.needed && cargo.unsent == 0;
        let waiting = self.path.backlog_bytes(now) as f64 / self.wire;
        let packet = seconds((contents + HEADERS) as f64 / self.wire);
        let gap = self.opened.map_or(0.0, |opened| {
            let trips = now.saturating_sub(opened).as_secs_f64() / self.rtt.as_secs_f64();
            contents as f64 * self.rtt.as_secs_f64() / (FIRST_WINDOW * trips.min(40.0).exp2())
        });
        let paced = now + seconds(gap);
        self.free = (now + seconds(waiting)).saturating_sub(QUEUE.max(packet));
        self.free = self.free.max(now).max(paced);
        if done {
            self.cargo.remove(&id);
        }
        complete.map(|(at, lane)| (self.in_order(at, lane), id))
    }

    /// Whose packet goes next; whether it is a new one.
    fn choose(&mut self, now: Duration) -> Option<(u64, bool)> {
        if let Some(Reverse((at, id))) = self.again.peek().copied()
            && at <= now
        {
            self.again.pop();
            return Some((id, false));
        }
        let queue = self.queues.iter_mut().find(|queue| !queue.is_empty())?;
        let id = *queue.front()?;
        if self.cargo.get(&id).is_some_and(|cargo| cargo.unsent == 1) {
            queue.pop_front();
        }
        Some((id, true))
    }

    /// Control messages are one stream.
    fn in_order(&mut self, at: Duration, lane: Lane) -> Duration {
        if lane != Lane::Control {
            return at;
        }
        self.last_control = at.max(self.last_control + Duration::from_nanos(1));
        self.last_control
    }
}

/// What packets that do not wait for each other show of a path.
struct Probed {
    /// Mean time on the way.
    way: Duration,
    /// The shortest.
    least: Duration,
    /// Packets that are lost together.
    burst: f64,
}

fn probe(spec: &DirectionSpec, wire: f64, seed: u64) -> Probed {
    let mut path = Path::new(spec, seed ^ 0x9e37);
    let bytes = PACKET + HEADERS;
    let gap = seconds(bytes as f64 / wire);
    let (mut now, mut sum, mut count, mut least) =
        (Duration::ZERO, Duration::ZERO, 0, Duration::MAX);
    let (mut lost, mut bursts, mut lost_before) = (0u32, 0, false);
    for _ in 0..PROBES {
        now += gap;
        if let Ok(fate) = path.admit(now, bytes, 0) {
            let took = fate.due.saturating_sub(now);
            (sum, count, least) = (sum + took, count + 1, least.min(took));
            lost_before = false;
        } else {
            lost += 1;
            bursts += u32::from(!lost_before);
            lost_before = true;
        }
    }
    let burst = f64::from(lost) / f64::from(bursts.max(1));
    let (way, least) = if count == 0 {
        (spec.delay, spec.delay)
    } else {
        (sum / count, least)
    };
    Probed { way, least, burst }
}
