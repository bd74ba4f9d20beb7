//! The adaptive controller over the emulated WAN's model in virtual time: no sockets, no clock, one seed.

use std::collections::BTreeMap;
use std::time::Duration;

use hybridmig_netem::LinkSpec;
use hybridmig_netem::model::Link;
use hybridmig_transport::congestion::adaptive::{Adaptive, Hints};

const PACKET: u64 = 1452;
/// IP and UDP headers, which the link carries too.
const HEADERS: u64 = 28;
/// Bytes of a packet that acknowledges.
const ACK: usize = 80;
/// Packets after which, and time within which, the receiver acknowledges.
const ACK_EVERY: usize = 10;
const ACK_DELAY: Duration = Duration::from_millis(5);

/// A sender with something to send at all times, paced as quinn paces; a link in both directions; a
/// receiver that acknowledges every tenth packet or after 5 ms all that it has received so far.
struct Model {
    controller: Adaptive,
    now: Duration,
    next_number: u64,
    /// Number → when it was sent.
    in_flight: BTreeMap<u64, Duration>,
    next_send: Duration,
    srtt: f64,
    forward: Link<u64>,
    /// What travels back: how many packets had been received.
    back: Link<usize>,
    /// Numbers in the order of their arrival.
    received: Vec<u64>,
    /// How many of these the sender has heard of.
    heard: usize,
    announced: usize,
    ack_timer: Option<Duration>,
    dropped: u64,
    /// The longest queue since it was last set to zero.
    queue_peak: Duration,
}

fn link(text: &str) -> LinkSpec {
    text.parse().unwrap()
}

impl Model {
    fn new(text: &str, hints: Hints, seed: u64) -> Self {
        let spec = link(text);
        Self {
            controller: Adaptive::new(hints, PACKET as u16),
            now: Duration::ZERO,
            next_number: 0,
            in_flight: BTreeMap::new(),
            next_send: Duration::ZERO,
            srtt: spec.rtt().as_secs_f64().max(1e-4),
            forward: Link::new(&spec.forward, 2 * seed),
            back: Link::new(&spec.back, 2 * seed + 1),
            received: Vec::new(),
            heard: 0,
            announced: 0,
            ack_timer: None,
            dropped: 0,
            queue_peak: Duration::ZERO,
        }
    }

    /// Bytes a second of the bottleneck.
    fn rate(&self) -> f64 {
        self.forward.spec().rate.unwrap() as f64 / 8.0
    }

    /// Changes the link from now on.
    fn set_link(&mut self, text: &str) {
        let spec = link(text);
        self.forward.set_spec(self.now, &spec.forward);
        self.back.set_spec(self.now, &spec.back);
    }

    fn queue(&self) -> Duration {
        let bytes = self.forward.backlog_bytes(self.now) as f64;
        Duration::from_secs_f64(bytes / self.rate())
    }

    fn run_until(&mut self, end: Duration) {
        loop {
            let can_send = (self.in_flight.len() as u64 + 1) * PACKET <= self.controller.window();
            let send = can_send.then(|| self.next_send.max(self.now));
            let events = [
                self.back.next_due(),
                self.forward.next_due(),
                self.ack_timer,
                send,
            ];
            // All in flight was lost and nothing will ever come back: a timeout, as QUIC has.
            let stalled = events.iter().all(Option::is_none);
            let next = events.into_iter().flatten().min();
            let next = next.unwrap_or(self.now + Duration::from_secs_f64(3.0 * self.srtt));
            if next >= end {
                self.now = end;
                return;
            }
            self.now = self.now.max(next);
            if stalled {
                let bytes = self.in_flight.len() as u64 * PACKET;
                self.in_flight.clear();
                self.controller.on_loss(bytes);
            } else if let Some(ack) = self.back.pop_due(self.now) {
                self.take_ack(ack.packet);
            } else if let Some(arrival) = self.forward.pop_due(self.now) {
                self.arrive(arrival.packet);
            } else if self.ack_timer.is_some_and(|timer| timer <= self.now) {
                self.acknowledge();
            } else {
                self.send();
            }
        }
    }

    fn send(&mut self) {
        let number = self.next_number;
        self.next_number += 1;
        self.controller.on_sent(self.now);
        self.in_flight.insert(number, self.now);
        // quinn: 1.25 windows per smoothed round trip.
        let pace = 1.25 * self.controller.window() as f64 / self.srtt;
        self.next_send = self.now + Duration::from_secs_f64(PACKET as f64 / pace);
        self.queue_peak = self.queue_peak.max(self.queue());
        let bytes = (PACKET + HEADERS) as usize;
        let fate = self.forward.push(self.now, bytes, number);
        self.dropped += u64::from(fate.is_err());
    }

    fn arrive(&mut self, number: u64) {
        self.received.push(number);
        if self.received.len() - self.announced >= ACK_EVERY {
            self.acknowledge();
        } else if self.ack_timer.is_none() {
            self.ack_timer = Some(self.now + ACK_DELAY);
        }
    }

    fn acknowledge(&mut self) {
        self.ack_timer = None;
        self.announced = self.received.len();
        // One that is lost is made up for by the next.
        let _ = self.back.push(self.now, ACK, self.announced);
    }

    fn take_ack(&mut self, count: usize) {
        let fresh = self.heard..count.max(self.heard);
        self.heard = fresh.end;
        let Some(largest) = self.received[fresh.clone()].iter().max().copied() else {
            return;
        };
        for number in &self.received[fresh] {
            let Some(sent) = self.in_flight.remove(number) else {
                continue;
            };
            let sample = self.now.saturating_sub(sent).as_secs_f64();
            self.srtt += (sample - self.srtt) / 8.0;
            self.controller.on_ack(self.now, sent, PACKET, false);
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

    fn run_for(&mut self, seconds: u64) {
        self.run_until(self.now + Duration::from_secs(seconds));
    }

    /// Share of the link used by payload over `seconds` from now on.
    fn utilisation(&mut self, seconds: u64) -> f64 {
        let before = self.received.len();
        self.run_for(seconds);
        let bytes = (self.received.len() - before) as f64 * PACKET as f64;
        bytes / (seconds as f64 * self.rate())
    }
}

#[test]
fn fills_a_long_link_whatever_is_lost_at_random() {
    for loss in ["0%", "0.1%", "1%", "3%", "gemodel 0.2525% 25%"] {
        let text = format!("delay 50ms rate 200mbit loss {loss} limit 50ms");
        let mean = link(&text).forward.loss.mean();
        let mut model = Model::new(&text, Hints::default(), 1);
        let whole = model.utilisation(20);
        assert!(whole >= 0.9, "loss {loss}: {whole:.3} with the start");
        let steady = model.utilisation(60);
        assert!(steady >= 0.96 * (1.0 - mean), "loss {loss}: {steady:.3}");
        println!("loss {loss}: {whole:.3} over the first 20 s, {steady:.3} after");
    }
}

#[test]
fn fills_links_of_other_shapes() {
    for shape in [
        "delay 50ms rate 1gbit",
        "delay 150ms rate 1gbit",
        "delay 10ms rate 100mbit",
        "delay 125ms rate 20mbit",
    ] {
        let text = format!("{shape} loss 0.5% limit 50ms");
        let mut model = Model::new(&text, Hints::default(), 2);
        model.run_for(10);
        let steady = model.utilisation(20);
        println!("{shape}: {steady:.3}");
        assert!(steady >= 0.9, "{shape}: {steady:.3}");
    }
}

#[test]
fn keeps_the_queue_short_once_it_knows_the_rate() {
    let link = "delay 50ms rate 200mbit limit 50ms";
    let mut model = Model::new(link, Hints::default(), 3);
    model.run_for(5);
    model.queue_peak = Duration::ZERO;
    let dropped = model.dropped;
    model.run_for(55);
    // A fifth of the round trip is where it would yield; its own excess is a fraction of that.
    assert!(
        model.queue_peak < Duration::from_millis(20),
        "{:?}",
        model.queue_peak
    );
    assert_eq!(model.dropped, dropped);
}

#[test]
fn follows_a_link_that_becomes_slower_and_faster() {
    let mut model = Model::new("delay 50ms rate 200mbit limit 50ms", Hints::default(), 4);
    model.run_for(5);
    model.set_link("delay 50ms rate 50mbit limit 50ms");
    model.run_for(5);
    let slower = model.utilisation(10);
    assert!(slower >= 0.9, "{slower:.3}");
    let queue = model.queue();
    assert!(
        queue < Duration::from_millis(30),
        "the queue stands at {queue:?}"
    );
    model.set_link("delay 50ms rate 200mbit limit 50ms");
    model.run_for(8);
    let faster = model.utilisation(10);
    assert!(faster >= 0.9, "{faster:.3}");
}

#[test]
fn follows_a_path_that_becomes_longer() {
    let mut model = Model::new("delay 50ms rate 100mbit limit 50ms", Hints::default(), 5);
    model.run_for(5);
    model.set_link("delay 100ms rate 100mbit limit 50ms");
    model.run_for(55);
    let longer = model.utilisation(20);
    assert!(longer >= 0.85, "{longer:.3}");
}

#[test]
fn never_passes_the_operators_cap() {
    let hints = Hints {
        rate_limit: Some(5e6),
        ..Hints::default()
    };
    let mut model = Model::new("delay 50ms rate 200mbit loss 1% limit 50ms", hints, 6);
    let mut before = 0;
    for second in 1..20 {
        model.run_for(1);
        let sent = model.next_number * PACKET;
        assert!((sent - before) as f64 <= 5e6 * 1.1, "second {second}");
        before = sent;
    }
    let used = model.utilisation(10) * model.rate() / 5e6;
    assert!(used > 0.9, "{used:.3} of the cap");
}

#[test]
fn a_wrong_hint_is_overcome() {
    for factor in [0.1, 10.0] {
        let hints = Hints {
            bandwidth: Some(12.5e6 * factor),
            rtt: Some(0.1),
            rate_limit: None,
        };
        let mut model = Model::new("delay 50ms rate 100mbit limit 50ms", hints, 7);
        model.run_for(5);
        let steady = model.utilisation(10);
        assert!(steady >= 0.92, "hint × {factor}: {steady:.3}");
    }
}

#[test]
fn wastes_less_than_a_fifth_on_a_policer() {
    // A policer: no queue to see, everything above the rate is dropped.
    let mut model = Model::new("delay 50ms rate 100mbit limit 2ms", Hints::default(), 8);
    model.run_for(10);
    let (dropped, sent) = (model.dropped, model.next_number);
    let used = model.utilisation(20);
    let share = (model.dropped - dropped) as f64 / (model.next_number - sent) as f64;
    assert!(share < 0.2, "{share:.3} of what was sent was dropped");
    assert!(used > 0.8, "{used:.3}");
}
