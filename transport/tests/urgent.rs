//! The urgent lane's machines over the emulated WAN's model in virtual time: page faults under a
//! saturating bulk stream, no sockets, no clock, one seed.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use hybridmig_netem::LinkSpec;
use hybridmig_netem::model::Link;
use hybridmig_transport::link::urgent::observe::Network;
use hybridmig_transport::link::urgent::receiver::Receiver;
use hybridmig_transport::link::urgent::sender::{Backlog, Fallback, Sender};
use hybridmig_transport::link::urgent::wire::{Datagram, decode};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// Kinds of contents: a message and a batch of the urgent lane.
const REQUEST: u8 = 9;
const REPLY: u8 = 17;
/// A page that does not compress, as a batch.
const PAGE: usize = 4126;
/// QUIC's, UDP's and IP's bytes around a datagram.
const AROUND: usize = 28 + 32;
const BULK: usize = 1480;
const FAULTS_PER_SECOND: f64 = 50.0;

/// What travels.
#[derive(Clone)]
enum Packet {
    Urgent(Bytes),
    /// Anything else, sent at a time.
    Other(Duration),
}

/// One side: what it sends and receives, and the link away from it.
struct Side {
    sender: Sender,
    receiver: Receiver,
    out: Link<Packet>,
    sent: u64,
    lost: u64,
    datagram_bytes: u64,
}

impl Side {
    fn new(out: Link<Packet>) -> Self {
        Self {
            sender: Sender::default(),
            receiver: Receiver::default(),
            out,
            sent: 0,
            lost: 0,
            datagram_bytes: 0,
        }
    }

    fn push(&mut self, now: Duration, bytes: usize, packet: Packet) {
        self.sent += 1;
        self.lost += u64::from(self.out.push(now, bytes, packet).is_err());
    }

    fn flush(&mut self, now: Duration) {
        loop {
            let due = self.sender.next_due().is_some_and(|(at, _)| at <= now);
            let datagram = match self.receiver.pop_ack(now) {
                Some(ack) => ack,
                None if due => self.sender.pop(0).unwrap(),
                None => return,
            };
            self.datagram_bytes += datagram.len() as u64;
            self.push(now, datagram.len() + AROUND, Packet::Urgent(datagram));
        }
    }
}

/// Faults at one end, pages at the other, bulk on the way that the pages take.
struct World {
    now: Duration,
    rtt: Duration,
    srtt: Duration,
    rng: SmallRng,
    /// 0 faults, 1 has the pages.
    sides: [Side; 2],
    next_bulk: Duration,
    /// Bulk over the rate of the link.
    load: f64,
    bulk_packets: u64,
    next_fault: Duration,
    began: Vec<Duration>,
    ended: Vec<Option<Duration>>,
    /// Contents on streams: when they arrive, at which side.
    streams: BTreeMap<(Duration, usize, u64), Fallback>,
}

impl World {
    fn new(text: &str, load: f64, seed: u64) -> Self {
        let spec: LinkSpec = text.parse().unwrap();
        let rtt = spec.rtt();
        Self {
            now: Duration::ZERO,
            rtt,
            srtt: rtt,
            rng: SmallRng::seed_from_u64(seed),
            sides: [
                Side::new(Link::new(&spec.back, 2 * seed)),
                Side::new(Link::new(&spec.forward, 2 * seed + 1)),
            ],
            next_bulk: Duration::ZERO,
            load,
            bulk_packets: 0,
            // Before the first fault there is pre-copy: the loss of the link is known by then.
            next_fault: Duration::from_secs(2),
            began: Vec::new(),
            ended: Vec::new(),
            streams: BTreeMap::new(),
        }
    }

    fn network(&self, side: usize) -> Network {
        Network {
            srtt: self.srtt,
            min_rtt: self.rtt,
            sent_packets: self.sides[side].sent,
            lost_packets: self.sides[side].lost,
            burst: None,
        }
    }

    fn run_until(&mut self, end: Duration) {
        loop {
            let mut next = self.next_bulk.min(self.next_fault);
            for side in &mut self.sides {
                let due = side.sender.next_due().map(|(at, _)| at);
                let ack = side.receiver.next_ack();
                let times = [due, ack, side.sender.next_timeout(), side.out.next_due()];
                next = times.into_iter().flatten().fold(next, Duration::min);
            }
            if let Some(((at, ..), _)) = self.streams.first_key_value() {
                next = next.min(*at);
            }
            if next >= end {
                self.now = end;
                return;
            }
            self.now = self.now.max(next);
            self.step();
        }
    }

    fn step(&mut self) {
        let now = self.now;
        if self.next_bulk <= now {
            self.sides[1].push(now, BULK, Packet::Other(now));
            self.bulk_packets += 1;
            if self.bulk_packets.is_multiple_of(10) {
                self.sides[0].push(now, 80, Packet::Other(now));
            }
            let rate = self.sides[1].out.spec().rate.unwrap() as f64 / 8.0;
            self.next_bulk = now + Duration::from_secs_f64(BULK as f64 / rate / self.load);
            if self.bulk_packets.is_multiple_of(1000) {
                for side in 0..2 {
                    let network = self.network(side);
                    self.sides[side].sender.network(now, &network);
                }
            }
        }
        if self.next_fault <= now {
            let number = self.began.len() as u32;
            self.began.push(now);
            self.ended.push(None);
            self.send(0, REQUEST, number, 32);
            let wait = -self.rng.random::<f64>().max(1e-9).ln() / FAULTS_PER_SECOND;
            self.next_fault = now + Duration::from_secs_f64(wait);
        }
        while let Some(entry) = self.streams.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let ((_, to, id), fallback) = entry.remove_entry();
            if self.sides[to].receiver.streamed(id).unwrap().fresh {
                self.take(to, fallback.kind, &fallback.contents);
            }
            self.sides[1 - to].sender.streamed(id);
        }
        for from in 0..2 {
            while let Some(arrival) = self.sides[from].out.pop_due(now) {
                match arrival.packet {
                    Packet::Other(sent) if from == 1 => {
                        let sample = now.saturating_sub(sent) + self.rtt / 2;
                        self.srtt = self.srtt * 99 / 100 + sample / 100;
                    }
                    Packet::Other(_) => {}
                    Packet::Urgent(datagram) => self.arrive(1 - from, &datagram),
                }
            }
            for fallback in self.sides[from].sender.timeout(now, Backlog::None) {
                // A stream in QUIC: comes again until it is there.
                let mut at = now + self.rtt * 6 / 10;
                while self.rng.random_bool(0.05)
                    || self.sides[from].out.is_down() && at < now + self.rtt * 20
                {
                    at += self.rtt * 5 / 4;
                }
                self.streams.insert((at, 1 - from, fallback.id), fallback);
            }
            self.sides[from].flush(now);
        }
    }

    fn arrive(&mut self, at: usize, datagram: &Bytes) {
        match decode(datagram).unwrap() {
            Datagram::Ack(acked) => {
                self.sides[at]
                    .sender
                    .acknowledged(self.now, &acked)
                    .unwrap();
            }
            Datagram::Parity(parity) => panic!("parity of stream {}", parity.stream),
            Datagram::Piece(piece) => {
                let progress = self.sides[at].receiver.piece(piece).unwrap();
                if let Some((kind, contents)) = progress.complete {
                    self.take(at, kind, &contents);
                }
            }
        }
        self.sides[at].flush(self.now);
    }

    fn take(&mut self, at: usize, kind: u8, contents: &Bytes) {
        let number = u32::from_le_bytes(contents[..4].try_into().unwrap());
        assert_eq!(contents.len(), if at == 1 { 32 } else { PAGE });
        if at == 1 {
            assert_eq!(kind, REQUEST);
            self.send(1, REPLY, number, PAGE);
        } else {
            assert_eq!(kind, REPLY);
            let ended = &mut self.ended[number as usize];
            assert_eq!(*ended, None, "page {number} came twice");
            *ended = Some(self.now);
        }
    }

    fn send(&mut self, from: usize, kind: u8, number: u32, len: usize) {
        let mut contents = vec![number as u8; len];
        contents[..4].copy_from_slice(&number.to_le_bytes());
        let network = self.network(from);
        let sender = &mut self.sides[from].sender;
        let id = sender.send(self.now, kind, contents.into(), &network);
        assert!(id.is_some());
        self.sides[from].flush(self.now);
    }

    /// Latency of faults in round trips, sorted; every one has been answered.
    fn latencies(&self) -> Vec<f64> {
        let mut latencies: Vec<f64> = self
            .began
            .iter()
            .zip(&self.ended)
            .map(|(began, ended)| {
                let ended = ended.expect("a fault was never answered");
                ended.saturating_sub(*began).as_secs_f64() / self.rtt.as_secs_f64()
            })
            .collect();
        latencies.sort_by(f64::total_cmp);
        latencies
    }

    /// No more faults, until all are answered.
    fn finish(&mut self) {
        self.next_fault = Duration::MAX;
        self.run_until(self.now + self.rtt * 100);
    }
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).ceil() as usize]
}

/// Runs faults for 40 s; (p50, p99, share of the link that redundancy takes, tries that failed).
fn faults(delay_ms: u32, loss: &str) -> (f64, f64, f64, f64) {
    let text = format!("delay {delay_ms}ms rate 100mbit loss {loss} limit 50ms");
    let mut world = World::new(&text, 0.94, 7);
    world.run_until(Duration::from_secs(42));
    world.finish();
    let latencies = world.latencies();
    let replies = world.sides[1].sender.stats();
    let requests = world.sides[0].sender.stats();
    let cost = replies.redundant_bytes as f64 / 40.0 / 12.5e6;
    let parcels = (replies.parcels + requests.parcels) as f64;
    let retries = replies.retries + requests.retries;
    let needless = replies.needless_retries + requests.needless_retries;
    let failed = (retries - needless) as f64 / parcels;
    let (p50, p99) = (quantile(&latencies, 0.5), quantile(&latencies, 0.99));
    println!(
        "rtt {} ms, loss {loss}: p50 {p50:.3} p99 {p99:.3} max {:.2}; {:.2} % of the link; {:.3} % tried again, \
         {} needless, {} on streams, {:.0} B a fault sent, {:?}",
        2 * delay_ms,
        latencies.last().unwrap(),
        100.0 * cost,
        100.0 * failed,
        needless,
        replies.stream_fallbacks + requests.stream_fallbacks,
        world.sides[1].datagram_bytes as f64 / latencies.len() as f64,
        world.sides[1].sender.path(),
    );
    (p50, p99, cost, failed)
}

#[test]
fn a_page_takes_one_round_trip_whatever_is_lost() {
    for delay_ms in [10, 50, 100] {
        for (loss, most) in [
            ("0%", 1.15),
            ("1%", 1.2),
            ("3%", 1.3),
            ("gemodel 0.2525% 25%", 1.3),
        ] {
            let (p50, p99, cost, failed) = faults(delay_ms, loss);
            let (p50_most, p99_most) = if delay_ms == 10 {
                (1.15, 1.5)
            } else {
                (1.08, most)
            };
            assert!(p50 <= p50_most, "{p50:.3}");
            assert!(p99 <= p99_most, "{p99:.3}");
            assert!(cost <= 0.03, "{cost:.4}");
            // Requests in one direction, pages in the other.
            let bound = if loss.starts_with("ge") { 0.01 } else { 0.002 };
            assert!(failed <= bound, "{failed:.5}");
        }
    }
}

#[test]
fn a_growing_queue_makes_no_storm() {
    // A fifth more than the link takes: the round trip grows threefold within a second.
    let mut world = World::new("delay 50ms rate 100mbit loss 1% limit 400ms", 0.94, 8);
    world.run_until(Duration::from_secs(10));
    let before = world.sides[1].sender.stats();
    world.load = 1.2;
    world.run_until(Duration::from_millis(11_500));
    assert!(world.srtt > Duration::from_millis(300), "{:?}", world.srtt);
    world.load = 0.8;
    world.run_until(Duration::from_secs(20));
    world.finish();
    let after = world.sides[1].sender.stats();
    let parcels = after.parcels - before.parcels;
    let retries = after.retries - before.retries;
    let streams = after.stream_fallbacks - before.stream_fallbacks;
    println!("{parcels} parcels, {retries} tried again, {streams} on streams");
    assert_eq!(world.latencies().len(), world.began.len());
    assert!(retries <= parcels / 50, "{retries} of {parcels}");
    assert_eq!(streams, 0);
}

#[test]
fn a_cut_is_survived_and_nothing_comes_twice() {
    let mut world = World::new("delay 50ms rate 100mbit loss 3% limit 50ms", 0.9, 9);
    world.run_until(Duration::from_secs(5));
    for side in &mut world.sides {
        side.out.set_down(true);
    }
    world.run_until(Duration::from_secs(6));
    for side in &mut world.sides {
        side.out.set_down(false);
    }
    world.run_until(Duration::from_secs(10));
    world.finish();
    assert_eq!(world.latencies().len(), world.began.len());
    for side in &world.sides {
        let stats = side.sender.stats();
        assert!(stats.stream_fallbacks > 0, "{stats:?}");
        // Two tries and a stream, never more.
        assert!(stats.retries <= stats.parcels / 2, "{stats:?}");
        assert_eq!(side.sender.next_timeout(), None);
    }
}
