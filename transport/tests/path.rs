//! Links over paths that are not loopback: narrow ones and lossy ones, as a relay makes them.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hybridmig_netem::{Relay, RelayConfig, RelayHandle};
use hybridmig_transport::message::{Message, RegionId};
use hybridmig_transport::{Endpoint, Identity, Incoming, Lane, TransportConfig, Trust};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::net::UdpSocket;

const LOCALHOST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A relay between one client and `server`; ends with its runtime. Returns its address and the
/// number of datagrams that it dropped.
async fn relay(server: SocketAddr, largest: usize, loss: f64) -> (SocketAddr, Arc<AtomicU64>) {
    let front = UdpSocket::bind(LOCALHOST).await.unwrap();
    let back = UdpSocket::bind(LOCALHOST).await.unwrap();
    let addr = front.local_addr().unwrap();
    let dropped = Arc::new(AtomicU64::new(0));
    let count = dropped.clone();
    tokio::spawn(async move {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut client = None;
        let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
        loop {
            let (datagram, socket, to) = tokio::select! {
                received = front.recv_from(&mut up) => {
                    let (len, from) = received.unwrap();
                    client = Some(from);
                    (&up[..len], &back, server)
                }
                received = back.recv_from(&mut down) => {
                    let (len, _) = received.unwrap();
                    let Some(client) = client else { continue };
                    (&down[..len], &front, client)
                }
            };
            if datagram.len() > largest || rng.random_bool(loss) {
                count.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            socket.send_to(datagram, to).await.unwrap();
        }
    });
    (addr, dropped)
}

async fn carries(largest: usize, loss: f64, bytes: usize) -> hybridmig_transport::LinkStats {
    let config = TransportConfig {
        connect_timeout: Duration::from_secs(30),
        rtt_hint: Some(Duration::from_millis(5)),
        ..TransportConfig::default()
    };
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let trust = |identity: &Identity| Trust::new().with_peer(identity.fingerprint());
    let server = Endpoint::server(LOCALHOST, &bob, trust(&alice), &config).unwrap();
    let client = Endpoint::client(&alice, trust(&bob), &config).unwrap();
    let (addr, dropped) = relay(server.local_addr().unwrap(), largest, loss).await;
    let (at_client, at_server) = tokio::join!(client.connect(addr), server.accept());
    let (at_client, at_server) = (at_client.unwrap(), at_server.unwrap());
    let sender = at_client.clone();
    let sending = tokio::spawn(async move {
        for number in 0..bytes / 100_000 {
            let batch = vec![number as u8; 100_000];
            sender.send_batch(Lane::Bulk, batch.into()).await.unwrap();
        }
    });
    for _ in 0..bytes / 100_000 {
        match at_server.next_incoming().await.unwrap() {
            Incoming::Batch { bytes, .. } => {
                assert_eq!(bytes.len(), 100_000);
                assert!(bytes.iter().all(|byte| *byte == bytes[0]));
            }
            Incoming::Message(other) => panic!("{other:?}"),
        }
    }
    sending.await.unwrap();
    assert!(dropped.load(Ordering::Relaxed) > 0);
    at_client.stats()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_narrower_than_ethernet_works() {
    // 1300 bytes: a tunnel in a tunnel. Full packets vanish without a word.
    let stats = tokio::time::timeout(Duration::from_secs(60), carries(1300, 0.0, 5_000_000))
        .await
        .expect("full packets vanish, and so does the link");
    assert!(stats.mtu <= 1300, "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lossy_path_works() {
    let stats = tokio::time::timeout(Duration::from_secs(60), carries(2000, 0.03, 10_000_000))
        .await
        .expect("still waiting");
    assert!(stats.lost_packets > 0, "{stats:?}");
}

/// Bulk one way and messages the other while the addresses of the client change.
async fn moves(change: impl Fn(&Endpoint, &RelayHandle)) {
    const BATCHES: u32 = 120;
    let config = TransportConfig::default();
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let trust = |identity: &Identity| Trust::new().with_peer(identity.fingerprint());
    let server = Endpoint::server(LOCALHOST, &bob, trust(&alice), &config).unwrap();
    let client = Endpoint::client(&alice, trust(&bob), &config).unwrap();
    let relay = Relay::start(RelayConfig {
        listen: LOCALHOST,
        target: server.local_addr().unwrap(),
        link: "delay 10ms rate 200mbit limit 50ms".parse().unwrap(),
        seed: 1,
    })
    .unwrap();
    let (source, destination) = tokio::join!(client.connect(relay.local_addr()), server.accept());
    let (source, destination) = (source.unwrap(), destination.unwrap());
    let first = destination.peer_addr();
    let sender = source.clone();
    let sending = tokio::spawn(async move {
        for number in 0..BATCHES {
            let mut batch = vec![7; 100_000];
            batch[..4].copy_from_slice(&number.to_le_bytes());
            sender.send_batch(Lane::Bulk, batch.into()).await.unwrap();
        }
    });
    let mut arrived = std::collections::BTreeSet::new();
    while arrived.len() < BATCHES as usize {
        let incoming = tokio::time::timeout(Duration::from_secs(20), destination.next_incoming());
        let Incoming::Batch { bytes, .. } = incoming.await.unwrap().unwrap() else {
            panic!("a batch was sent");
        };
        let number = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        assert!(arrived.insert(number), "{number} came twice");
        // At a third, at two thirds, and when nearly all is there.
        if [40, 80, 110].contains(&arrived.len()) {
            change(&client, &relay);
            // The other way finds the client at its new address as soon as that has sent anything.
            let fetch = Message::Fetch {
                region: RegionId(0),
                blocks: vec![arrived.len() as u32],
            };
            destination
                .send_message(Lane::Urgent, &fetch)
                .await
                .unwrap();
            let answer = tokio::time::timeout(Duration::from_secs(20), source.next_incoming());
            assert_eq!(answer.await.unwrap(), Ok(Incoming::Message(fetch)));
        }
    }
    sending.await.unwrap();
    assert_ne!(
        destination.peer_addr(),
        first,
        "the address has not changed"
    );
    let stats = source.stats();
    assert!(stats.cwnd > 0 && stats.bandwidth > 0.0, "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_follows_a_client_that_moves_to_another_socket() {
    moves(|client, _| client.rebind().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_follows_a_client_whose_nat_forgets_it() {
    moves(|_, relay| relay.rebind()).await;
}

/// Page faults across a lossy link with bulk beside them: latencies in seconds, sorted.
async fn page_faults(link: &str, faults: u32) -> (Vec<f64>, hybridmig_transport::UrgentStats) {
    let config = TransportConfig::default();
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let trust = |identity: &Identity| Trust::new().with_peer(identity.fingerprint());
    let server = Endpoint::server(LOCALHOST, &bob, trust(&alice), &config).unwrap();
    let client = Endpoint::client(&alice, trust(&bob), &config).unwrap();
    let relay = hybridmig_netem::Relay::start(hybridmig_netem::RelayConfig {
        listen: LOCALHOST,
        target: server.local_addr().unwrap(),
        link: link.parse().unwrap(),
        seed: 5,
    })
    .unwrap();
    let (source, destination) = tokio::join!(client.connect(relay.local_addr()), server.accept());
    let (source, destination) = (source.unwrap(), destination.unwrap());
    let bulk = source.clone();
    let bulk = tokio::spawn(async move {
        let batch = bytes::Bytes::from(vec![1; 100_000]);
        while bulk.send_batch(Lane::Bulk, batch.clone()).await.is_ok() {}
    });
    let answering = source.clone();
    let answers = tokio::spawn(async move {
        while let Ok(Incoming::Message(_)) = answering.next_incoming().await {
            let page = vec![7; 4126].into();
            answering.send_batch(Lane::Urgent, page).await.unwrap();
        }
    });
    let mut latencies = Vec::new();
    for number in 0..faults {
        let began = std::time::Instant::now();
        let fetch = hybridmig_transport::message::Message::Fetch {
            region: hybridmig_transport::message::RegionId(0),
            blocks: vec![number],
        };
        destination
            .send_message(Lane::Urgent, &fetch)
            .await
            .unwrap();
        while let Incoming::Batch { lane, bytes } = destination.next_incoming().await.unwrap() {
            if lane == Lane::Urgent {
                assert_eq!(bytes.len(), 4126);
                break;
            }
        }
        latencies.push(began.elapsed().as_secs_f64());
    }
    latencies.sort_by(f64::total_cmp);
    // Both ends: requests and replies have their repairs counted where they arrive.
    let (at_source, at_destination) = (source.stats().urgent, destination.stats().urgent);
    assert_eq!(at_destination.received, u64::from(faults));
    println!("{at_source:?}\n{at_destination:?}");
    source.close(hybridmig_transport::CloseCode::DONE, "done");
    bulk.await.unwrap();
    answers.await.unwrap();
    relay.stop();
    (latencies, at_destination)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_fault_on_a_lossy_path_takes_one_round_trip() {
    let work = page_faults("delay 10ms rate 50mbit loss 5% limit 50ms", 150);
    let (latencies, stats) = tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .expect("still waiting");
    let (p50, p90) = (latencies[75], latencies[135]);
    println!("p50 {:.1} ms, p90 {:.1} ms", p50 * 1e3, p90 * 1e3);
    // A fifth of the pages lack a piece; on a stream those would take 45 ms and more. (The start of
    // congestion control has a queue of its own, and the machine may be busy.)
    assert!(stats.repaired > 0, "{stats:?}");
    assert!(p50 < 0.25, "{p50}");
}
