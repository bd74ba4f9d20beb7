//! Senders over one emulated link in virtual time: no sockets, no clock, one seed. Every sender has something
//! to send at all times, is paced as quinn paces, and hears of what has arrived as quinn's receiver tells it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use hybridmig_netem::LinkSpec;
use hybridmig_netem::model::Link;
use hybridmig_transport::congestion::adaptive::{Adaptive, Hints};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use crate::bbr::Bbr;
use crate::rivals::{Acks, Cubic};

pub const PACKET: u64 = 1452;
/// Bytes of a packet that acknowledges.
const ACK: usize = 80;
/// Packets after which, and time within which, a receiver acknowledges.
const ACK_EVERY: usize = 10;
const ACK_DELAY: Duration = Duration::from_millis(5);

/// What decides how much a sender has in flight.
pub enum Control {
    Adaptive(Box<Adaptive>),
    Cubic(Cubic),
    Bbr(Bbr),
}

impl Control {
    fn window(&self) -> u64 {
        match self {
            Self::Adaptive(control) => control.window(),
            Self::Cubic(control) => control.window(),
            Self::Bbr(control) => control.window(),
        }
    }

    /// Bytes a second. What only acknowledgements clock goes out at once.
    fn pace(&self, srtt: f64) -> f64 {
        match self {
            Self::Bbr(control) => control.pace(),
            Self::Cubic(_) => f64::INFINITY,
            Self::Adaptive(_) => 1.25 * self.window() as f64 / srtt,
        }
    }
}

/// What a receiver tells: the packets that have come since it told the last time.
type Ack = Vec<(u64, Duration)>;

/// One sender and its receiver.
pub struct Sender {
    pub control: Control,
    starts: Duration,
    next_number: u64,
    /// Number → when it was sent.
    in_flight: BTreeMap<u64, Duration>,
    next_send: Duration,
    srtt: f64,
    /// Packets later than which one counts as lost; three for TCP.
    pub reordering: u64,
    pub sent: u64,
    pub received: u64,
    untold: Ack,
    /// Told, and not heard of, and the number of the first of these groups.
    told: VecDeque<Ack>,
    first_told: u64,
    ack_timer: Option<Duration>,
    last_heard: Duration,
    /// Hears and sends only at these times: a host that is late, in slices of up to …
    stall: Duration,
    asleep_until: Duration,
    rng: SmallRng,
}

pub struct Model {
    pub now: Duration,
    forward: Link<(usize, u64, Duration)>,
    /// What travels back: whose, and the number of the newest group of packets that it tells of.
    back: Link<(usize, u64)>,
    pub senders: Vec<Sender>,
    pub dropped: u64,
    /// The longest queue since it was last set to zero.
    pub queue_peak: Duration,
    /// Queue seen by each packet of the first sender, in seconds, since it was last cleared.
    pub queues: Vec<f64>,
}

pub fn link(text: &str) -> LinkSpec {
    text.parse().unwrap()
}

impl Model {
    pub fn new(text: &str, hints: Hints, seed: u64) -> Self {
        let control = Control::Adaptive(Box::new(Adaptive::new(hints, PACKET as u16)));
        Self::with(text, vec![(Duration::ZERO, control)], seed)
    }

    /// Senders that start at different times.
    pub fn with(text: &str, controls: Vec<(Duration, Control)>, seed: u64) -> Self {
        let spec = link(text);
        let sender = |(index, (starts, control)): (usize, (Duration, Control))| Sender {
            reordering: if matches!(control, Control::Adaptive(_)) {
                64
            } else {
                3
            },
            control,
            starts,
            next_number: 0,
            in_flight: BTreeMap::new(),
            next_send: starts,
            srtt: spec.rtt().as_secs_f64().max(1e-4),
            sent: 0,
            received: 0,
            untold: Vec::new(),
            told: VecDeque::new(),
            first_told: 0,
            ack_timer: None,
            last_heard: starts,
            stall: Duration::ZERO,
            asleep_until: Duration::ZERO,
            rng: SmallRng::seed_from_u64(seed + index as u64),
        };
        Self {
            now: Duration::ZERO,
            forward: Link::new(&spec.forward, 2 * seed),
            back: Link::new(&spec.back, 2 * seed + 1),
            senders: controls.into_iter().enumerate().map(sender).collect(),
            dropped: 0,
            queue_peak: Duration::ZERO,
            queues: Vec::new(),
        }
    }

    /// The sender's host sleeps for up to `stall` after each thing it does.
    pub fn stalling(mut self, stall: Duration) -> Self {
        self.senders[0].stall = stall;
        self
    }

    pub fn adaptive(&mut self) -> &mut Adaptive {
        match &mut self.senders[0].control {
            Control::Adaptive(adaptive) => adaptive,
            _ => unreachable!("the first sender of a test is ours"),
        }
    }

    /// Bytes a second of the bottleneck.
    pub fn rate(&self) -> f64 {
        self.forward.spec().rate.unwrap() as f64 / 8.0
    }

    /// Changes the link from now on.
    pub fn set_link(&mut self, text: &str) {
        let spec = link(text);
        self.forward.set_spec(self.now, &spec.forward);
        self.back.set_spec(self.now, &spec.back);
    }

    pub fn queue(&self) -> Duration {
        let bytes = self.forward.backlog_bytes(self.now) as f64;
        Duration::from_secs_f64(bytes / self.rate())
    }

    pub fn run_until(&mut self, end: Duration) {
        loop {
            let mut next = [self.back.next_due(), self.forward.next_due()]
                .into_iter()
                .flatten()
                .min()
                .unwrap_or(Duration::MAX);
            for sender in &self.senders {
                next = next.min(sender.next_event(self.now));
            }
            if next >= end {
                self.now = end;
                return;
            }
            self.now = self.now.max(next);
            if let Some(ack) = self.back.pop_due(self.now) {
                let (index, newest) = ack.packet;
                self.senders[index].hear(self.now, newest);
            } else if let Some(arrival) = self.forward.pop_due(self.now) {
                let (index, number, sent) = arrival.packet;
                self.arrive(index, number, sent);
            } else {
                self.act();
            }
        }
    }

    fn act(&mut self) {
        for index in 0..self.senders.len() {
            let sender = &mut self.senders[index];
            if sender.ack_timer.is_some_and(|timer| timer <= self.now) {
                self.acknowledge(index);
            } else if sender.may_send() && sender.sending_at(self.now) <= self.now {
                self.send(index);
            } else if sender.probe_at().is_some_and(|at| at <= self.now) {
                // A timeout, as QUIC has: probes go out whatever the window says.
                sender.last_heard = self.now;
                self.send(index);
                self.send(index);
            }
        }
    }

    fn send(&mut self, index: usize) {
        let queue = self.queue();
        let sender = &mut self.senders[index];
        let number = sender.send(self.now);
        self.queue_peak = self.queue_peak.max(queue);
        if index == 0 {
            self.queues.push(queue.as_secs_f64());
        }
        // IP and UDP headers are carried by the link too.
        let bytes = (PACKET + 28) as usize;
        let fate = self
            .forward
            .push(self.now, bytes, (index, number, self.now));
        self.dropped += u64::from(fate.is_err());
    }

    fn arrive(&mut self, index: usize, number: u64, sent: Duration) {
        let sender = &mut self.senders[index];
        sender.received += 1;
        sender.untold.push((number, sent));
        if sender.untold.len() >= ACK_EVERY {
            self.acknowledge(index);
        } else if sender.ack_timer.is_none() {
            sender.ack_timer = Some(self.now + ACK_DELAY);
        }
    }

    fn acknowledge(&mut self, index: usize) {
        let sender = &mut self.senders[index];
        sender.ack_timer = None;
        let group = std::mem::take(&mut sender.untold);
        sender.told.push_back(group);
        let newest = sender.first_told + sender.told.len() as u64 - 1;
        // One that is lost is made up for by the next, which tells of the same packets.
        let _ = self.back.push(self.now, ACK, (index, newest));
    }

    pub fn run_for(&mut self, seconds: f64) {
        self.run_until(self.now + Duration::from_secs_f64(seconds));
    }

    /// Share of the link used by the payload of a sender over `seconds` from now on.
    pub fn utilisation_of(&mut self, index: usize, seconds: f64) -> f64 {
        let before = self.senders[index].received;
        self.run_for(seconds);
        let bytes = (self.senders[index].received - before) as f64 * PACKET as f64;
        bytes / (seconds * self.rate())
    }

    pub fn utilisation(&mut self, seconds: f64) -> f64 {
        self.utilisation_of(0, seconds)
    }

    /// Seconds until the receiver of the first sender got `share` of the link for a tenth of a second.
    pub fn time_to(&mut self, share: f64, limit: f64) -> f64 {
        let from = self.now;
        let step = 0.02;
        let mut marks = VecDeque::from([self.senders[0].received]);
        while self.now.saturating_sub(from).as_secs_f64() < limit {
            self.run_for(step);
            marks.push_back(self.senders[0].received);
            if marks.len() > 6 {
                marks.pop_front();
                let packets = (marks[5] - marks[0]) as f64;
                if packets * PACKET as f64 >= share * self.rate() * 5.0 * step {
                    return self.now.saturating_sub(from).as_secs_f64() - 5.0 * step;
                }
            }
        }
        limit
    }
}

impl Sender {
    /// Has nothing to send any more.
    pub fn leave(&mut self) {
        self.starts = Duration::MAX;
    }

    /// An adaptive one that has heard too little of its packets gets no timer from QUIC but this.
    fn probe_at(&self) -> Option<Duration> {
        (!self.in_flight.is_empty())
            .then(|| self.last_heard + Duration::from_secs_f64(3.0 * self.srtt))
    }

    fn may_send(&self) -> bool {
        (self.in_flight.len() as u64 + 1) * PACKET <= self.control.window()
    }

    fn sending_at(&self, now: Duration) -> Duration {
        self.next_send
            .max(now)
            .max(self.asleep_until)
            .max(self.starts)
    }

    fn next_event(&self, now: Duration) -> Duration {
        let send = self.may_send().then(|| self.sending_at(now));
        [self.ack_timer, send, self.probe_at()]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(Duration::MAX)
    }

    fn send(&mut self, now: Duration) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.sent += 1;
        if let Control::Adaptive(control) = &mut self.control {
            control.on_sent(now, PACKET);
        }
        if let Control::Bbr(control) = &mut self.control {
            control.on_sent(now, number, self.in_flight.len() as u64);
        }
        self.in_flight.insert(number, now);
        let gap = Duration::from_secs_f64(PACKET as f64 / self.control.pace(self.srtt));
        // As quinn's bucket: what a late wake-up did not send within 2 ms is not made up for.
        self.next_send = self.next_send.max(now.saturating_sub(2 * MS)) + gap;
        number
    }

    fn hear(&mut self, now: Duration, newest: u64) {
        self.last_heard = now;
        if self.asleep_until <= now && !self.stall.is_zero() {
            let nap = self.rng.random_range(0.0..1.0_f64).powi(4);
            self.asleep_until = now + self.stall.mul_f64(nap);
        }
        // A host that sleeps hears when it wakes; the model lets it hear then of all at once.
        let heard = now.max(self.asleep_until);
        while self.first_told <= newest {
            let Some(group) = self.told.pop_front() else {
                break;
            };
            self.first_told += 1;
            self.take_ack(heard, &group);
        }
    }

    fn take_ack(&mut self, now: Duration, group: &Ack) {
        let Some(largest) = group.iter().map(|(number, _)| *number).max() else {
            return;
        };
        let mut acked = Vec::new();
        for (number, sent) in group {
            if self.in_flight.remove(number).is_none() {
                continue;
            }
            acked.push((*number, *sent));
            let sample = now.saturating_sub(*sent).as_secs_f64();
            self.srtt += (sample - self.srtt) / 8.0;
            if let Control::Adaptive(control) = &mut self.control {
                control.on_ack(now, *sent, PACKET, false);
            }
        }
        let late = Duration::from_secs_f64(1.125 * self.srtt);
        let lost: Vec<u64> = self
            .in_flight
            .range(..largest)
            .filter(|(number, sent)| {
                largest >= *number + self.reordering || now.saturating_sub(**sent) >= late
            })
            .map(|(number, _)| *number)
            .collect();
        for number in &lost {
            self.in_flight.remove(number);
        }
        let in_flight = self.in_flight.len() as u64 * PACKET;
        let acks = Acks {
            acked: &acked,
            lost: &lost,
            in_flight: self.in_flight.len() as u64,
            next: self.next_number,
        };
        match &mut self.control {
            Control::Adaptive(control) => {
                control.on_acks_done(now, in_flight);
                if !lost.is_empty() {
                    control.on_loss(lost.len() as u64 * PACKET);
                }
            }
            Control::Cubic(control) => control.on_acks(now, &acks),
            Control::Bbr(control) => control.on_acks(now, &acks),
        }
    }
}

const MS: Duration = Duration::from_millis(1);
