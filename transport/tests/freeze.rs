//! A freeze set over the emulated WAN's model in virtual time: how long it takes as streams that QUIC
//! repairs, and as the same streams with parity beside them. And the same machinery over a real
//! connection that loses packets.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use hybridmig_netem::model::Link;
use hybridmig_netem::{LinkSpec, Relay, RelayConfig};
use hybridmig_transport::link::repair::assembly::Assembly;
use hybridmig_transport::link::repair::plan::parity;
use hybridmig_transport::link::repair::wire::{Parity, parity_of};
use hybridmig_transport::link::urgent::plan::Path;
use hybridmig_transport::message::{Message, RegionId};
use hybridmig_transport::{Endpoint, Identity, Incoming, Lane, TransportConfig, Trust};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

const RATE: f64 = 200e6 / 8.0;
const DELAY: Duration = Duration::from_millis(50);
/// What a batch of 64 blocks takes.
const BATCH: usize = 262_400;
/// A stream's bytes in a packet, and what is around them.
const PACKET: usize = 1407;
const AROUND: usize = 28 + 45;
const LARGEST_DATAGRAM: usize = 1412;
/// The receiver's wait before parity takes the place of what may still come.
const QUIET: Duration = Duration::from_millis(3);
/// QUIC takes a packet for lost when one was acknowledged that was sent so many later.
const REORDERED: u32 = 64;

#[derive(Clone, Debug)]
enum Packet {
    Stream { batch: usize, start: usize },
    Parity(Parity),
}

/// A freeze set of `bytes` at this loss, in percent: when all of it was there, and the share of parity in it.
fn freeze(bytes: usize, loss: f64, with_parity: bool, seed: u64) -> (Duration, f64) {
    let text = format!("delay 50ms rate 200mbit loss {loss}% limit 50ms");
    let spec: LinkSpec = text.parse().unwrap();
    let mut link: Link<Packet> = Link::new(&spec.forward, seed);
    let gap = packet_time();
    // As the observer has it: on the safe side.
    let path = Path {
        srtt: 2 * DELAY,
        loss: 1.25 * loss / 100.0 + 0.002,
        burst: 1.0,
        packet_gap: gap,
    };
    let contents = vec![9_u8; BATCH];
    let batches = (0..bytes).step_by(BATCH);
    let lengths: Vec<usize> = batches.map(|at| BATCH.min(bytes - at)).collect();
    // Parity jumps over the streams.
    let mut queue = Vec::new();
    let mut parity_bytes = 0;
    for (batch, len) in lengths.iter().enumerate().filter(|_| with_parity) {
        let pieces = parity(*len, PACKET, &path);
        let contents = &contents[..*len];
        for parity in parity_of(batch as u64, &[contents], pieces, LARGEST_DATAGRAM).unwrap() {
            parity_bytes += parity.pieces.len();
            queue.push(Packet::Parity(parity));
        }
    }
    for (batch, len) in lengths.iter().enumerate() {
        let starts = (0..*len).step_by(PACKET);
        queue.extend(starts.map(|start| Packet::Stream { batch, start }));
    }
    // What is sent when: the set at the rate of the link, later what is found lost.
    let mut due: BTreeMap<(Duration, usize), Packet> = BTreeMap::new();
    for (order, packet) in queue.into_iter().enumerate() {
        due.insert((gap * order as u32, order), packet);
    }
    let mut arriving: Vec<(Assembly, usize, Duration)> = lengths
        .iter()
        .map(|_| (Assembly::default(), 0, Duration::ZERO))
        .collect();
    let mut now = Duration::ZERO;
    while arriving.iter().any(|(assembly, ..)| !assembly.is_taken()) {
        let quiet = arriving
            .iter()
            .filter(|(assembly, ..)| assembly.has_parity())
            .map(|(.., seen)| *seen + QUIET)
            .filter(|at| *at > now);
        let send = due.first_key_value().map(|((at, _), _)| *at);
        now = quiet.chain(send).chain(link.next_due()).min().unwrap();
        while let Some(entry) = due.first_entry().filter(|entry| entry.key().0 <= now) {
            let order = entry.key().1;
            let packet = entry.remove();
            let lost = link.push(now, PACKET + AROUND, packet.clone()).is_err();
            if lost && matches!(packet, Packet::Stream { .. }) {
                // A later packet is acknowledged after a round trip; bulk follows the set.
                due.insert((now + gap * REORDERED + 2 * DELAY, order), packet);
            }
        }
        while let Some(arrival) = link.pop_due(now) {
            match arrival.packet {
                Packet::Stream { batch, start } => {
                    let len = lengths[batch];
                    let end = (start + PACKET).min(len);
                    let (assembly, got, seen) = &mut arriving[batch];
                    assembly.put(start, &contents[start..end], BATCH);
                    *got += end - start;
                    *seen = now;
                    if *got == len && !assembly.is_taken() {
                        assert_eq!(assembly.take(), contents[..len]);
                    }
                }
                Packet::Parity(parity) => {
                    let (assembly, _, seen) = &mut arriving[parity.stream as usize];
                    assembly.parity(&parity).unwrap();
                    *seen = now;
                }
            }
        }
        for (batch, (assembly, _, seen)) in arriving.iter_mut().enumerate() {
            if assembly.restorable(now >= *seen + QUIET) {
                assert_eq!(assembly.restore().unwrap(), contents[..lengths[batch]]);
            }
        }
    }
    let share = parity_bytes as f64 / (bytes + parity_bytes) as f64;
    (now, share)
}

fn packet_time() -> Duration {
    Duration::from_secs_f64((PACKET + AROUND) as f64 / RATE)
}

/// Share of 100 freeze sets of 2 MB that are there when their bytes have passed, with `parity` of
/// them on top, and one delay and 5 ms.
fn in_time(loss: f64, with_parity: bool, parity: f64) -> f64 {
    const BYTES: usize = 2_000_000;
    let packets = (BYTES as f64 * (1.0 + parity) / PACKET as f64).ceil();
    let bound = packet_time().mul_f64(packets) + DELAY + Duration::from_millis(5);
    let trials = 100;
    let mut kept = 0;
    for seed in 0..trials {
        let (took, share) = freeze(BYTES, loss, with_parity, seed);
        kept += u32::from(took <= bound);
        assert!(share <= parity, "{share}");
    }
    f64::from(kept) / f64::from(trials as u32)
}

#[test]
fn a_lost_packet_of_the_freeze_set_costs_no_round_trip() {
    for (loss, parity) in [(1.0, 0.065), (3.0, 0.115)] {
        let with = in_time(loss, true, parity);
        let without = in_time(loss, false, parity);
        println!("{loss} %: {with} in time with parity, {without} without");
        assert!(
            with >= 0.98 && without <= 0.02,
            "{loss} %: {with} {without}"
        );
    }
}

/// Batches with parity and control messages with copies over a path that loses 5 %: everything comes
/// once, and as it was sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_repaired_is_what_was_sent() {
    const BATCHES: usize = 200;
    const MESSAGES: u32 = 300;
    let config = TransportConfig::default();
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let trust = |identity: &Identity| Trust::new().with_peer(identity.fingerprint());
    let local = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
    let server = Endpoint::server(local, &bob, trust(&alice), &config).unwrap();
    let client = Endpoint::client(&alice, trust(&bob), &config).unwrap();
    // So long a way that what is sent again comes after the parity, however busy the machine is.
    let relay = Relay::start(RelayConfig {
        listen: local,
        target: server.local_addr().unwrap(),
        link: "delay 50ms loss 5%".parse().unwrap(),
        seed: 1,
    });
    let relay = relay.unwrap();
    let (source, destination) = tokio::join!(client.connect(relay.local_addr()), server.accept());
    let (source, destination) = (source.unwrap(), destination.unwrap());
    let batch = |number: usize| {
        let mut rng = SmallRng::seed_from_u64(number as u64);
        // Short ones too, which are one packet.
        let len = if number.is_multiple_of(4) {
            20 + number
        } else {
            1000 * number
        };
        let mut bytes = vec![0_u8; len.max(20)];
        rng.fill(&mut bytes[8..]);
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    let message = |number: u32| Message::Fetch {
        region: RegionId(0),
        blocks: (0..=number % 500).map(|n| n + number).collect(),
    };
    let (mut control, _unused) = source.open_control().await.unwrap();
    let sender = source.clone();
    let batches = tokio::spawn(async move {
        for number in 0..BATCHES {
            let bytes = batch(number).into();
            sender
                .send_batch_with_parity(Lane::Freeze, bytes)
                .await
                .unwrap();
        }
    });
    let messages = tokio::spawn(async move {
        for number in 0..MESSAGES {
            if number.is_multiple_of(3) {
                control.send(&message(number)).await.unwrap();
            } else {
                control.send_twice(&message(number)).await.unwrap();
            }
        }
        control.finish().await.unwrap();
    });
    let (_unused, mut control) = destination.accept_control().await.unwrap();
    let receive = async {
        let mut seen = [false; BATCHES];
        for _ in 0..BATCHES {
            let Incoming::Batch { bytes, .. } = destination.next_incoming().await.unwrap() else {
                panic!("a message");
            };
            let number = usize::from_le_bytes(bytes[..8].try_into().unwrap());
            assert_eq!(bytes, batch(number));
            assert!(
                !std::mem::replace(&mut seen[number], true),
                "{number} came twice"
            );
        }
        for number in 0..MESSAGES {
            assert_eq!(control.recv().await.unwrap(), message(number));
        }
    };
    tokio::time::timeout(Duration::from_secs(60), receive)
        .await
        .expect("it does not end");
    batches.await.unwrap();
    messages.await.unwrap();
    let (sent, received) = (source.stats().repair, destination.stats().repair);
    assert_eq!(sent.streams, BATCHES as u64);
    assert!(received.restored > 50, "{received:?}");
    // Nothing more comes.
    let more = tokio::time::timeout(Duration::from_millis(300), destination.next_incoming());
    assert!(more.await.is_err());
}
