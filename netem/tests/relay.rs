//! The relay on loopback: what comes through, when, and what does not. Bounds are one-sided
//! where the machine's load could move them.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use hybridmig_netem::relay::MAX_CLIENTS;
use hybridmig_netem::{LinkSpec, LinkStats, Relay, RelayConfig, RelayHandle};

const PATIENCE: Duration = Duration::from_secs(20);

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    socket
}

fn relay(target: &UdpSocket, link: &str) -> RelayHandle {
    Relay::start(RelayConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        target: target.local_addr().unwrap(),
        link: link.parse().unwrap(),
        seed: 11,
    })
    .unwrap()
}

/// The next datagram, or `None` when none has come although `idle` says that none will.
fn receive(socket: &UdpSocket, idle: impl Fn() -> bool) -> Option<(Vec<u8>, SocketAddr)> {
    let mut buffer = [0; 2048];
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let was_idle = idle();
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => return Some((buffer[..length].to_vec(), from)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if was_idle {
                    return None;
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("nothing came, and the link is not idle either");
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn keeps_order_and_delay_both_ways() {
    let target = socket();
    let client = socket();
    let relay = relay(&target, "delay 20ms");
    client.connect(relay.local_addr()).unwrap();
    let start = Instant::now();
    for i in 0..100u32 {
        client.send(&i.to_be_bytes()).unwrap();
    }
    let mut answer_to = None;
    for i in 0..100u32 {
        let (payload, from) = receive(&target, || false).unwrap();
        assert_eq!(payload, i.to_be_bytes());
        answer_to = Some(from);
    }
    assert!(start.elapsed() >= Duration::from_millis(20));
    target.send_to(b"answer", answer_to.unwrap()).unwrap();
    let (payload, _) = receive(&client, || false).unwrap();
    assert_eq!(payload, b"answer");
    assert!(start.elapsed() >= Duration::from_millis(40));

    let stats = relay.stop();
    assert_eq!(stats.forward.packets, 100);
    assert_eq!(stats.forward.delivered_packets, 100);
    assert_eq!(stats.forward.delivered_bytes, 100 * (4 + 28));
    assert_eq!(stats.back.delivered_packets, 1);
}

#[test]
fn loses_the_share_asked_for() {
    let target = socket();
    let client = socket();
    let relay = relay(&target, "loss 10%");
    client.connect(relay.local_addr()).unwrap();
    let total = 20_000u64;
    let mut arrived = 0u64;
    for sent in 1..=total {
        client.send(&sent.to_be_bytes()).unwrap();
        // Never more than a few under way, so that no socket buffer adds losses of its own.
        if sent % 50 == 0 {
            until("everything sent has come to the link", || {
                relay.stats().forward.packets == sent
            });
            let passed = |stats: LinkStats| stats.forward.packets - stats.forward.dropped_loss;
            while arrived < passed(relay.stats()) {
                receive(&target, || false).unwrap();
                arrived += 1;
            }
        }
    }
    let stats = relay.stop().forward;
    assert_eq!(stats.dropped_loss + arrived, total);
    assert_eq!(stats.delivered_packets, arrived);
    // Binomial: mean 2000, σ = √(20 000 · 0.1 · 0.9) = 42.4.
    let lost = stats.dropped_loss as f64;
    assert!((lost - 2000.0).abs() < 4.0 * 42.4, "{lost}");
}

#[test]
fn rate_holds_back_what_is_too_much() {
    let target = socket();
    let client = socket();
    let relay = relay(&target, "rate 8mbit limit 100ms");
    client.connect(relay.local_addr()).unwrap();
    // 1000 bytes with headers: 1 ms each, 300 at once, of which the queue holds 100.
    let start = Instant::now();
    for _ in 0..300 {
        client.send(&[7; 972]).unwrap();
    }
    until("all have come to the link", || {
        relay.stats().forward.packets == 300
    });
    let done = || {
        let stats = relay.stats().forward;
        stats.delivered_packets + stats.dropped_queue == 300
    };
    let mut arrived = 0;
    while receive(&target, done).is_some() {
        arrived += 1;
    }
    let took = start.elapsed();
    let stats = relay.stop().forward;
    assert_eq!(stats.delivered_packets, arrived);
    assert_eq!(stats.dropped_queue, 300 - arrived);
    assert!((100..300).contains(&arrived), "{arrived}");
    assert!(
        took >= Duration::from_millis(arrived - 1),
        "{arrived} in {took:?}"
    );
}

#[test]
fn cut_loses_everything_and_heals() {
    let target = socket();
    let client = socket();
    let relay = relay(&target, "delay 1ms");
    client.connect(relay.local_addr()).unwrap();
    client.send(b"before").unwrap();
    assert_eq!(receive(&target, || false).unwrap().0, b"before");
    relay.set_down(true);
    client.send(b"during").unwrap();
    until("the cut has taken it", || {
        relay.stats().forward.dropped_down == 1
    });
    relay.set_down(false);
    // The thread has seen the join once something comes through; until then it is lost as well.
    until("the link carries again", || {
        client.send(b"after").unwrap();
        receive(&target, || true).is_some_and(|(payload, _)| payload == b"after")
    });
}

#[test]
fn clients_are_kept_apart() {
    let target = socket();
    let clients: Vec<_> = (0..5).map(|_| socket()).collect();
    let relay = relay(&target, "delay 1ms");
    for (i, client) in clients.iter().enumerate() {
        client.send_to(&[i as u8], relay.local_addr()).unwrap();
    }
    let mut seen = BTreeMap::new();
    for _ in &clients {
        let (payload, from) = receive(&target, || false).unwrap();
        seen.insert(payload[0], from);
        target.send_to(&payload, from).unwrap();
    }
    assert_eq!(seen.len(), clients.len());
    for (i, client) in clients.iter().enumerate() {
        assert_eq!(receive(client, || false).unwrap().0, [i as u8]);
    }
}

#[test]
fn one_client_too_many_takes_the_place_of_the_most_silent() {
    let target = socket();
    let relay = relay(&target, "");
    let clients: Vec<_> = (0..=MAX_CLIENTS).map(|_| socket()).collect();
    let mut peers = Vec::new();
    for client in &clients {
        client.send_to(b"hello", relay.local_addr()).unwrap();
        peers.push(receive(&target, || false).unwrap().1);
    }
    // Whoever had to go is a new peer to the target when it speaks again; the last one is not.
    let last = clients.last().unwrap();
    last.send_to(b"again", relay.local_addr()).unwrap();
    assert_eq!(Some(&receive(&target, || false).unwrap().1), peers.last());
    let mut renewed = 0;
    for client in &clients[..MAX_CLIENTS] {
        client.send_to(b"again", relay.local_addr()).unwrap();
        let (_, from) = receive(&target, || false).unwrap();
        renewed += usize::from(!peers.contains(&from));
        target.send_to(b"answer", from).unwrap();
        assert_eq!(receive(client, || false).unwrap().0, b"answer");
    }
    assert!(renewed > 0);
}

#[test]
fn refuses_an_address_of_another_machine() {
    let config = RelayConfig {
        listen: "192.0.2.1:0".parse().unwrap(),
        target: "127.0.0.1:1".parse().unwrap(),
        link: LinkSpec::default(),
        seed: 0,
    };
    let error = Relay::start(config).unwrap_err().to_string();
    assert!(error.contains("cannot listen on 192.0.2.1:0"), "{error}");
}

#[test]
fn survives_a_target_that_is_not_there_yet() {
    let target = socket();
    let address = target.local_addr().unwrap();
    let relay = relay(&target, "delay 1ms");
    drop(target);
    let client = socket();
    client.connect(relay.local_addr()).unwrap();
    for _ in 0..10 {
        client.send(b"too early").unwrap();
    }
    until("the early ones are gone", || {
        relay.stats().forward.packets == 10
    });
    let target = UdpSocket::bind(address).unwrap();
    target
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    until("the target hears the client", || {
        client.send(b"now").unwrap();
        receive(&target, || true).is_some_and(|(payload, _)| payload == b"now")
    });
}
