//! The adaptive controller on a modelled link in virtual time: no sockets, no clock, one seed.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use hybridmig_transport::congestion::adaptive::{Adaptive, Hints};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

const PACKET: u64 = 1452;
/// IP and UDP headers, which the link carries too.
const HEADERS: u64 = 28;

#[derive(Clone, Copy)]
struct Path {
    /// Bytes/s at the IP level.
    rate: f64,
    /// Both ways together.
    rtt: f64,
    /// Drop-tail buffer, in seconds of the rate.
    buffer: f64,
    loss: f64,
}

impl Path {
    fn mbit(mbit: f64) -> Self {
        Self {
            rate: mbit * 125_000.0,
            rtt: 0.1,
            buffer: 0.05,
            loss: 0.0,
        }
    }
}

#[derive(Clone, Copy)]
struct InFlight {
    sent: f64,
}

/// A sender with something to send at all times, paced as quinn paces; a bottleneck with a queue;
/// a receiver that acknowledges every tenth packet or after 5 ms.
struct Model {
    controller: Adaptive,
    path: Path,
    rng: SmallRng,
    now: f64,
    next_number: u64,
    in_flight: BTreeMap<u64, InFlight>,
    busy_until: f64,
    next_send: f64,
    srtt: f64,
    /// Packets on the way to the receiver: (arrival, number).
    arriving: VecDeque<(f64, u64)>,
    unacknowledged: Vec<u64>,
    ack_timer: Option<f64>,
    /// Acknowledgements on the way back.
    acks: VecDeque<(f64, Vec<u64>)>,
    received: u64,
    dropped: u64,
    queue_peak: f64,
}

fn time(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

impl Model {
    fn new(path: Path, hints: Hints, seed: u64) -> Self {
        Self {
            controller: Adaptive::new(hints, PACKET as u16),
            path,
            rng: SmallRng::seed_from_u64(seed),
            now: 0.0,
            next_number: 0,
            in_flight: BTreeMap::new(),
            busy_until: 0.0,
            next_send: 0.0,
            srtt: path.rtt,
            arriving: VecDeque::new(),
            unacknowledged: Vec::new(),
            ack_timer: None,
            acks: VecDeque::new(),
            received: 0,
            dropped: 0,
            queue_peak: 0.0,
        }
    }

    fn run_until(&mut self, end: f64) {
        loop {
            let can_send = (self.in_flight.len() as u64 + 1) * PACKET <= self.controller.window();
            let send = if can_send {
                self.next_send.max(self.now)
            } else {
                f64::INFINITY
            };
            let arrival = self.arriving.front().map_or(f64::INFINITY, |a| a.0);
            let timer = self.ack_timer.unwrap_or(f64::INFINITY);
            let ack = self.acks.front().map_or(f64::INFINITY, |a| a.0);
            // All in flight was lost and nothing will ever come back: a timeout, as QUIC has.
            let stalled = send.min(arrival).min(timer).min(ack) == f64::INFINITY;
            let next = if stalled {
                self.now + 3.0 * self.srtt
            } else {
                send.min(arrival).min(timer).min(ack)
            };
            if next >= end {
                self.now = end;
                return;
            }
            self.now = next;
            if stalled {
                let bytes = self.in_flight.len() as u64 * PACKET;
                self.in_flight.clear();
                self.controller.on_loss(bytes);
            } else if ack <= next {
                self.take_ack();
            } else if arrival <= next {
                self.arrive();
            } else if timer <= next {
                self.acknowledge();
            } else {
                self.send();
            }
        }
    }

    fn send(&mut self) {
        let number = self.next_number;
        self.next_number += 1;
        self.controller.on_sent(time(self.now));
        self.in_flight.insert(number, InFlight { sent: self.now });
        // quinn: 1.25 windows per smoothed round trip.
        let pace = 1.25 * self.controller.window() as f64 / self.srtt;
        self.next_send = self.now + PACKET as f64 / pace;
        let backlog = (self.busy_until - self.now).max(0.0);
        self.queue_peak = self.queue_peak.max(backlog);
        let lost = self.rng.random_bool(self.path.loss);
        if backlog > self.path.buffer {
            self.dropped += 1;
            return;
        }
        self.busy_until =
            self.busy_until.max(self.now) + (PACKET + HEADERS) as f64 / self.path.rate;
        if lost {
            self.dropped += 1;
        } else {
            let arrival = self.busy_until + self.path.rtt / 2.0;
            self.arriving.push_back((arrival, number));
        }
    }

    fn arrive(&mut self) {
        let (_, number) = self.arriving.pop_front().unwrap();
        self.received += PACKET;
        self.unacknowledged.push(number);
        if self.unacknowledged.len() >= 10 {
            self.acknowledge();
        } else if self.ack_timer.is_none() {
            self.ack_timer = Some(self.now + 0.005);
        }
    }

    fn acknowledge(&mut self) {
        self.ack_timer = None;
        let numbers = std::mem::take(&mut self.unacknowledged);
        self.acks
            .push_back((self.now + self.path.rtt / 2.0, numbers));
    }

    fn take_ack(&mut self) {
        let (_, numbers) = self.acks.pop_front().unwrap();
        let largest = *numbers.iter().max().unwrap();
        for number in numbers {
            let Some(packet) = self.in_flight.remove(&number) else {
                continue;
            };
            let sample = self.now - packet.sent;
            self.srtt += (sample - self.srtt) / 8.0;
            let (now, sent) = (time(self.now), time(packet.sent));
            self.controller.on_ack(now, sent, PACKET, false);
        }
        self.controller.on_acks_done();
        // Three packets later, as RFC 9002 has it.
        let lost: Vec<u64> = self
            .in_flight
            .range(..largest.saturating_sub(2))
            .map(|(number, _)| *number)
            .collect();
        for number in &lost {
            self.in_flight.remove(number);
        }
        if !lost.is_empty() {
            self.controller.on_loss(lost.len() as u64 * PACKET);
        }
    }

    /// Share of the link used by payload over `seconds` from now on.
    fn utilisation(&mut self, seconds: f64) -> f64 {
        let before = self.received;
        self.run_until(self.now + seconds);
        (self.received - before) as f64 / (seconds * self.path.rate)
    }
}

#[test]
fn fills_a_long_link_whatever_is_lost_at_random() {
    for loss in [0.0, 0.001, 0.01, 0.03] {
        let path = Path {
            loss,
            ..Path::mbit(200.0)
        };
        let mut model = Model::new(path, Hints::default(), 1);
        let whole = model.utilisation(20.0);
        assert!(whole >= 0.9, "loss {loss}: {whole:.3} with the start");
        let steady = model.utilisation(60.0);
        assert!(steady >= 0.96 * (1.0 - loss), "loss {loss}: {steady:.3}");
        println!("loss {loss}: {whole:.3} over the first 20 s, {steady:.3} after");
    }
}

#[test]
fn fills_links_of_other_shapes() {
    for (mbit, rtt) in [(1000.0, 0.1), (1000.0, 0.3), (100.0, 0.02), (20.0, 0.25)] {
        let path = Path {
            rtt,
            loss: 0.005,
            ..Path::mbit(mbit)
        };
        let mut model = Model::new(path, Hints::default(), 2);
        model.run_until(10.0);
        let steady = model.utilisation(20.0);
        println!("{mbit} Mbit/s, {rtt} s: {steady:.3}");
        assert!(steady >= 0.9, "{mbit} Mbit/s, {rtt} s: {steady:.3}");
    }
}

#[test]
fn keeps_the_queue_short_once_it_knows_the_rate() {
    let mut model = Model::new(Path::mbit(200.0), Hints::default(), 3);
    model.run_until(5.0);
    model.queue_peak = 0.0;
    let dropped = model.dropped;
    model.run_until(60.0);
    // A fifth of the round trip is where it would yield; its own excess is a fraction of that.
    assert!(model.queue_peak < 0.02, "{:.4} s", model.queue_peak);
    assert_eq!(model.dropped, dropped);
}

#[test]
fn follows_a_link_that_becomes_slower_and_faster() {
    let mut model = Model::new(Path::mbit(200.0), Hints::default(), 4);
    model.run_until(5.0);
    model.path.rate /= 4.0;
    model.run_until(10.0);
    let slower = model.utilisation(10.0);
    assert!(slower >= 0.9, "{slower:.3}");
    assert!(model.busy_until - model.now < 0.03, "the queue stands");
    model.path.rate *= 4.0;
    model.run_until(model.now + 8.0);
    let faster = model.utilisation(10.0);
    assert!(faster >= 0.9, "{faster:.3}");
}

#[test]
fn follows_a_path_that_becomes_longer() {
    let mut model = Model::new(Path::mbit(100.0), Hints::default(), 5);
    model.run_until(5.0);
    model.path.rtt = 0.2;
    model.run_until(60.0);
    let longer = model.utilisation(20.0);
    assert!(longer >= 0.85, "{longer:.3}");
}

#[test]
fn never_passes_the_operators_cap() {
    let hints = Hints {
        rate_limit: Some(5e6),
        ..Hints::default()
    };
    let path = Path {
        loss: 0.01,
        ..Path::mbit(200.0)
    };
    let mut model = Model::new(path, hints, 6);
    let mut before = 0;
    for second in 1..20 {
        model.run_until(f64::from(second));
        let sent = model.next_number * PACKET;
        assert!((sent - before) as f64 <= 5e6 * 1.1, "second {second}");
        before = sent;
    }
    let used = model.utilisation(10.0) * path.rate / 5e6;
    assert!(used > 0.9, "{used:.3} of the cap");
}

#[test]
fn a_wrong_hint_is_overcome() {
    for factor in [0.1, 10.0] {
        let path = Path::mbit(100.0);
        let hints = Hints {
            bandwidth: Some(path.rate * factor),
            rtt: Some(0.1),
            rate_limit: None,
        };
        let mut model = Model::new(path, hints, 7);
        model.run_until(5.0);
        let steady = model.utilisation(10.0);
        assert!(steady >= 0.92, "hint × {factor}: {steady:.3}");
    }
}

#[test]
fn wastes_less_than_a_fifth_on_a_policer() {
    // A policer: no queue to see, everything above the rate is dropped.
    let path = Path {
        buffer: 0.002,
        ..Path::mbit(100.0)
    };
    let mut model = Model::new(path, Hints::default(), 8);
    model.run_until(10.0);
    let (dropped, sent) = (model.dropped, model.next_number);
    let used = model.utilisation(20.0);
    let share = (model.dropped - dropped) as f64 / (model.next_number - sent) as f64;
    assert!(share < 0.2, "{share:.3} of what was sent was dropped");
    assert!(used > 0.8, "{used:.3}");
}
