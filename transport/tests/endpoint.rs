//! Links over loopback: who is let in, who is told what, and that every lane carries what it should.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hybridmig_netem::{Relay, RelayConfig, RelayHandle};
use hybridmig_transport::codec::MAX_BATCH;
use hybridmig_transport::message::{BlockSet, Message, RegionId};
use hybridmig_transport::{
    CloseCode, Congestion, Endpoint, Fingerprint, Identity, Incoming, Lane, Link, LinkError,
    TransportConfig, TransportError, Trust,
};

const LOCALHOST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// For what should take milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("still waiting")
}

fn config() -> TransportConfig {
    TransportConfig {
        idle_timeout: Duration::from_secs(20),
        ..TransportConfig::default()
    }
}

fn trusting(fingerprint: Fingerprint) -> Trust {
    Trust::new().with_peer(fingerprint)
}

/// Connects; what becomes of it at the client, and at the server.
async fn meet(
    client: &Endpoint,
    server: &Endpoint,
) -> (Result<Link, TransportError>, Result<Link, TransportError>) {
    let addr = server.local_addr().unwrap();
    soon(async { tokio::join!(client.connect(addr), server.accept()) }).await
}

struct Pair {
    client: Link,
    server: Link,
    endpoints: (Endpoint, Endpoint),
}

async fn pair_with(config: &TransportConfig) -> Pair {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let server = Endpoint::server(LOCALHOST, &bob, trusting(alice.fingerprint()), config).unwrap();
    let client = Endpoint::client(&alice, trusting(bob.fingerprint()), config).unwrap();
    let (at_client, at_server) = meet(&client, &server).await;
    let pair = Pair {
        client: at_client.unwrap(),
        server: at_server.unwrap(),
        endpoints: (client, server),
    };
    assert_eq!(pair.client.peer().fingerprint, bob.fingerprint());
    assert_eq!(pair.server.peer().fingerprint, alice.fingerprint());
    pair
}

async fn pair() -> Pair {
    pair_with(&config()).await
}

fn cancel(reason: &str) -> Message {
    Message::Cancel {
        reason: reason.to_owned(),
    }
}

#[tokio::test]
async fn messages_pass_both_ways_on_the_control_lane() {
    let pair = pair().await;
    let (mut send, mut receive) = soon(pair.client.open_control()).await.unwrap();
    let set: BlockSet = (0..2_000_000).step_by(3).collect();
    let large = Message::Behind {
        region: RegionId(3),
        blocks: set,
    };
    soon(send.send(&cancel("first"))).await.unwrap();
    soon(send.send(&large)).await.unwrap();
    let (mut back, mut at_server) = soon(pair.server.accept_control()).await.unwrap();
    assert_eq!(soon(at_server.recv()).await, Ok(cancel("first")));
    assert_eq!(soon(at_server.recv()).await, Ok(large));
    soon(back.send(&Message::Released)).await.unwrap();
    assert_eq!(soon(receive.recv()).await, Ok(Message::Released));
    soon(send.finish()).await.unwrap();
    let end = soon(at_server.recv()).await.unwrap_err();
    assert!(
        matches!(end, LinkError::PeerClosed { code: 0, .. }),
        "{end}"
    );
}

/// A server that is killed says nothing. Who follows it on the same port with the same identity does.
#[tokio::test]
async fn who_follows_a_killed_server_ends_its_links() {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let serve =
        |addr| Endpoint::server(addr, &bob, trusting(alice.fingerprint()), &config()).unwrap();
    let client = Endpoint::client(&alice, trusting(bob.fingerprint()), &config()).unwrap();
    // With its runtime goes all that would send another packet.
    let killed = tokio::runtime::Runtime::new().unwrap();
    let server = {
        let _entered = killed.enter();
        serve(LOCALHOST)
    };
    let addr = server.local_addr().unwrap();
    let (link, at_server) = meet(&client, &server).await;
    let (link, at_server) = (link.unwrap(), at_server.unwrap());
    std::thread::spawn(move || killed.shutdown_timeout(PATIENCE))
        .join()
        .unwrap();
    drop((server, at_server));
    let follower = serve(addr);
    let end = soon(link.closed()).await;
    assert!(
        matches!(&end, LinkError::Lost { what, .. } if what.contains("reset")),
        "{end}"
    );
    let (again, _) = meet(&client, &follower).await;
    again.unwrap();
}

#[tokio::test]
async fn a_stranger_is_refused_and_both_sides_say_why() {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let friend = Identity::generate().unwrap();
    let trust = trusting(friend.fingerprint());
    let server = Endpoint::server(LOCALHOST, &bob, trust, &config()).unwrap();
    let addr = server.local_addr().unwrap();
    let client = Endpoint::client(&alice, trusting(bob.fingerprint()), &config()).unwrap();
    let (at_client, at_server) = meet(&client, &server).await;

    let hers = alice.fingerprint();
    match at_server.unwrap_err() {
        TransportError::Stranger {
            peer,
            fingerprint,
            reason,
        } => {
            assert_eq!(peer.port(), client.local_addr().unwrap().port());
            assert_eq!(fingerprint, Some(hers));
            assert!(reason.contains("not trusted"), "{reason}");
        }
        other => panic!("{other}"),
    }
    match at_client.unwrap_err() {
        TransportError::Refused { peer, reason } => {
            assert_eq!(peer, addr);
            let wanted = format!("your certificate {hers} is not trusted here");
            assert!(reason.starts_with(&wanted), "{reason}");
            assert!(reason.contains(&format!("--peer {hers}")), "{reason}");
        }
        other => panic!("{other}"),
    }

    // The server goes on: a friend gets in after the stranger.
    let client = Endpoint::client(&friend, trusting(bob.fingerprint()), &config()).unwrap();
    let (at_client, at_server) = meet(&client, &server).await;
    at_client.unwrap();
    at_server.unwrap();
}

#[tokio::test]
async fn a_server_with_the_wrong_certificate_is_refused_and_learns_why() {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let trust = trusting(alice.fingerprint());
    let server = Endpoint::server(LOCALHOST, &bob, trust, &config()).unwrap();
    for (trust, words) in [
        (trusting(alice.fingerprint()), "is not trusted here"),
        (Trust::new(), "no peer is"),
    ] {
        let client = Endpoint::client(&alice, trust, &config()).unwrap();
        let (at_client, at_server) = meet(&client, &server).await;
        match at_client.unwrap_err() {
            TransportError::Stranger {
                fingerprint,
                reason,
                ..
            } => {
                assert_eq!(fingerprint, Some(bob.fingerprint()));
                assert!(reason.contains(words), "{reason}");
            }
            other => panic!("{other}"),
        }
        match at_server.unwrap_err() {
            TransportError::Refused { reason, .. } => {
                let wanted = format!("your certificate {} is not trusted", bob.fingerprint());
                assert!(reason.starts_with(&wanted), "{reason}");
            }
            other => panic!("{other}"),
        }
    }
}

/// An identity that an authority signed, as files: (identity, authority's certificate).
fn signed(
    dir: &Path,
    usages: Vec<rcgen::ExtendedKeyUsagePurpose>,
) -> (Identity, std::path::PathBuf) {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec![]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_pem = params.self_signed(&ca_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(params, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["host-7.example".to_owned()]).unwrap();
    params.extended_key_usages = usages;
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let ca_path = dir.join("ca.pem");
    std::fs::write(&ca_path, ca_pem).unwrap();
    let path = dir.join("host.pem");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .unwrap();
    // Certificate first and key last is as good as the other way round.
    write!(file, "{}{}", certificate.pem(), key.serialize_pem()).unwrap();
    (Identity::load(&path).unwrap(), ca_path)
}

#[tokio::test]
async fn a_peer_signed_by_the_authority_is_accepted_in_either_role() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (alice, alices_ca) = signed(one.path(), vec![]);
    let (bob, bobs_ca) = signed(two.path(), vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth]);
    let trust = |path: &Path| {
        let mut trust = Trust::new();
        trust.add_authorities(path).unwrap();
        trust
    };
    let server = Endpoint::server(LOCALHOST, &bob, trust(&alices_ca), &config()).unwrap();
    let addr = server.local_addr().unwrap();
    let client = Endpoint::client(&alice, trust(&bobs_ca), &config()).unwrap();
    let (at_client, at_server) = meet(&client, &server).await;
    assert!(at_client.unwrap().peer().by_authority);
    assert!(at_server.unwrap().peer().by_authority);

    // Signed by somebody else's authority is not enough.
    let client = Endpoint::client(&alice, trust(&alices_ca), &config()).unwrap();
    let error = soon(client.connect(addr)).await.unwrap_err();
    assert!(matches!(error, TransportError::Stranger { .. }), "{error}");
}

#[tokio::test]
async fn garbage_on_the_port_is_ignored() {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let trust = trusting(alice.fingerprint());
    let server = Endpoint::server(LOCALHOST, &bob, trust, &config()).unwrap();
    let addr = server.local_addr().unwrap();
    let noise = UdpSocket::bind(LOCALHOST).unwrap();
    for len in [0_usize, 1, 20, 1200, 1452] {
        for first in [0x00, 0x40, 0xc0, 0xff] {
            let mut datagram = vec![0xa5; len];
            if let Some(byte) = datagram.first_mut() {
                *byte = first;
            }
            noise.send_to(&datagram, addr).unwrap();
        }
    }
    let client = Endpoint::client(&alice, trusting(bob.fingerprint()), &config()).unwrap();
    let (at_client, at_server) = meet(&client, &server).await;
    at_client.unwrap();
    at_server.unwrap();
}

#[tokio::test]
async fn nobody_there_is_told_in_time() {
    // Bound but silent: what an address without hybridmig looks like behind a firewall.
    let silent = UdpSocket::bind(LOCALHOST).unwrap();
    let config = TransportConfig {
        connect_timeout: Duration::from_millis(300),
        ..config()
    };
    let client = Endpoint::client(&Identity::generate().unwrap(), Trust::new(), &config).unwrap();
    let error = soon(client.connect(silent.local_addr().unwrap()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, TransportError::Unreachable { .. }),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_batches_arrive_once_each() {
    const COUNT: u32 = 4000;
    for congestion in [Congestion::Adaptive, Congestion::Cubic] {
        let pair = pair_with(&TransportConfig {
            congestion,
            ..config()
        })
        .await;
        let sender = pair.client.clone();
        let sending = tokio::spawn(async move {
            for number in 0..COUNT {
                let len = 4 + (number as usize * 7919) % 40_000;
                let mut bytes = vec![number as u8; len];
                bytes[..4].copy_from_slice(&number.to_le_bytes());
                let lane = [Lane::Urgent, Lane::Freeze, Lane::Bulk][number as usize % 3];
                sender.send_batch(lane, bytes.into()).await.unwrap();
            }
        });
        let mut seen = BlockSet::new();
        while seen.len() < u64::from(COUNT) {
            match soon(pair.server.next_incoming()).await.unwrap() {
                Incoming::Batch { lane, bytes } => {
                    let number = u32::from_le_bytes(bytes[..4].try_into().unwrap());
                    assert_eq!(bytes.len(), 4 + (number as usize * 7919) % 40_000);
                    assert!(bytes[4..].iter().all(|byte| *byte == number as u8));
                    let wanted = [Lane::Urgent, Lane::Freeze, Lane::Bulk][number as usize % 3];
                    assert_eq!(lane, wanted);
                    assert!(seen.insert(number), "batch {number} came twice");
                }
                Incoming::Message(other) => panic!("{other:?}"),
            }
        }
        soon(sending).await.unwrap();
        let stats = pair.client.stats();
        assert!(stats.sent_bytes > 70_000_000, "{stats:?}");
        assert!(stats.cwnd > 0 && stats.rtt > Duration::ZERO, "{stats:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn urgent_passes_though_nobody_takes_bulk() {
    let pair = pair().await;
    let bulk = pair.client.clone();
    let batch = Bytes::from(vec![7; MAX_BATCH]);
    let sent = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = sent.clone();
    let sending = tokio::spawn(async move {
        while bulk.send_batch(Lane::Bulk, batch.clone()).await.is_ok() {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    });
    // Nobody takes bulk: its sender stops when the lane's window is used up.
    let window = 150_000_000 / MAX_BATCH as u64;
    soon(async {
        while sent.load(std::sync::atomic::Ordering::Relaxed) < window / 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let fetch = Message::Fetch {
        region: RegionId(0),
        blocks: vec![1, 2, 3],
    };
    let page = Bytes::from(vec![9; 4096]);
    soon(pair.client.send_message(Lane::Urgent, &fetch))
        .await
        .unwrap();
    soon(pair.client.send_batch(Lane::Urgent, page.clone()))
        .await
        .unwrap();
    let mut urgent = 0;
    let mut taken = 0;
    while urgent < 2 {
        match soon(pair.server.next_incoming()).await.unwrap() {
            Incoming::Batch {
                lane: Lane::Urgent,
                bytes,
            } => {
                assert_eq!(bytes, page);
                urgent += 1;
            }
            Incoming::Message(message) => {
                assert_eq!(message, fetch);
                urgent += 1;
            }
            Incoming::Batch { .. } => taken += 1,
        }
    }
    assert!(taken < window, "urgent waited for all of bulk");
    assert!(!sending.is_finished());
    pair.client.close(CloseCode::DONE, "enough");
    soon(sending).await.unwrap();
    drop(pair.endpoints);
}

/// Sends short, urgent things both ways and takes them; the figures of both sides.
async fn exchange(config: &TransportConfig) -> [hybridmig_transport::UrgentStats; 2] {
    let pair = pair_with(config).await;
    for number in 0..50_u32 {
        let fetch = Message::Fetch {
            region: RegionId(0),
            blocks: vec![number],
        };
        soon(pair.server.send_message(Lane::Urgent, &fetch))
            .await
            .unwrap();
        let asked = soon(pair.client.next_incoming()).await.unwrap();
        assert_eq!(asked, Incoming::Message(fetch));
        // From one piece to more than a parcel takes.
        let page = Bytes::from(vec![number as u8; 1 + 400 * number as usize]);
        soon(pair.client.send_batch(Lane::Urgent, page.clone()))
            .await
            .unwrap();
        let answer = soon(pair.server.next_incoming()).await.unwrap();
        let lane = Lane::Urgent;
        assert_eq!(answer, Incoming::Batch { lane, bytes: page });
    }
    [pair.client.stats().urgent, pair.server.stats().urgent]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_urgent_and_short_travels_in_datagrams() {
    let [client, server] = exchange(&config()).await;
    assert_eq!((client.parcels, client.streams), (41, 9), "{client:?}");
    assert_eq!((server.parcels, server.streams), (50, 0), "{server:?}");
    assert_eq!((client.received, server.received), (50, 41));
    assert!(client.datagram_bytes > client.contents_bytes);
    // How much of it goes depends on how soon the first pieces are acknowledged.
    assert!(client.redundant_bytes < client.datagram_bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_datagrams_everything_goes_by_stream() {
    let stats = exchange(&TransportConfig {
        datagrams: false,
        ..config()
    })
    .await;
    for stats in stats {
        assert_eq!((stats.parcels, stats.received), (0, 0), "{stats:?}");
        assert_eq!((stats.streams, stats.datagrams), (50, 0), "{stats:?}");
    }
}

#[tokio::test]
async fn closing_tells_the_other_side_why() {
    let pair = pair().await;
    pair.client.close(CloseCode::REFUSED, "changed my mind");
    match soon(pair.server.closed()).await {
        LinkError::PeerClosed { code, reason, .. } => {
            assert_eq!((code, &*reason), (CloseCode::REFUSED.0, "changed my mind"));
        }
        other => panic!("{other}"),
    }
    match soon(pair.client.closed()).await {
        LinkError::LocalClosed { reason } => assert_eq!(reason, "changed my mind"),
        other => panic!("{other}"),
    }
    let error = soon(pair.server.next_incoming()).await.unwrap_err();
    assert!(matches!(error, LinkError::PeerClosed { .. }), "{error}");
    let error = soon(pair.client.send_message(Lane::Urgent, &Message::Released)).await;
    assert!(
        matches!(error, Err(LinkError::LocalClosed { .. })),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_a_busy_link_is_heard_too() {
    for congestion in [
        Congestion::Adaptive,
        Congestion::Cubic,
        Congestion::Adaptive,
    ] {
        let pair = pair_with(&TransportConfig {
            congestion,
            ..config()
        })
        .await;
        let sending = saturate(&pair.client);
        soon(pair.server.next_incoming()).await.unwrap();
        pair.endpoints.0.close(CloseCode::SHUTDOWN, "told to end");
        match soon(pair.server.closed()).await {
            LinkError::PeerClosed { code, reason, .. } => {
                assert_eq!((code, &*reason), (CloseCode::SHUTDOWN.0, "told to end"));
            }
            other => panic!("{other}"),
        }
        soon(sending).await.unwrap();
        soon(pair.endpoints.0.wait_idle()).await;
    }
}

fn relay_to(target: SocketAddr, round_trip: Duration) -> RelayHandle {
    let link = format!("delay {}ms", round_trip.as_millis() / 2);
    Relay::start(RelayConfig {
        listen: LOCALHOST,
        target,
        link: link.parse().unwrap(),
        seed: 1,
    })
    .unwrap()
}

/// Sends all that a link takes, until it ends.
fn saturate(link: &Link) -> tokio::task::JoinHandle<()> {
    let link = link.clone();
    tokio::spawn(async move {
        let batch = Bytes::from(vec![7; MAX_BATCH]);
        while link.send_batch(Lane::Freeze, batch.clone()).await.is_ok() {}
    })
}

/// Both ends of a link over a relay with this round trip.
async fn distant_pair(round_trip: Duration) -> (Pair, RelayHandle) {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let server = Endpoint::server(LOCALHOST, &bob, trusting(alice.fingerprint()), &config());
    let server = server.unwrap();
    let relay = relay_to(server.local_addr().unwrap(), round_trip);
    let client = Endpoint::client(&alice, trusting(bob.fingerprint()), &config()).unwrap();
    let (one, two) = tokio::join!(client.connect(relay.local_addr()), server.accept());
    let pair = Pair {
        client: one.unwrap(),
        server: two.unwrap(),
        endpoints: (client, server),
    };
    (pair, relay)
}

#[tokio::test]
async fn the_first_words_need_one_round_trip_and_nothing_else_overtakes_the_peers_acceptance() {
    // So long that a busy machine's stalls do not count.
    let round_trip = Duration::from_millis(1200);
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let server = Endpoint::server(LOCALHOST, &bob, trusting(alice.fingerprint()), &config());
    let server = server.unwrap();
    let relay = relay_to(server.local_addr().unwrap(), round_trip);
    let client = Endpoint::client(&alice, trusting(bob.fingerprint()), &config()).unwrap();
    let answering = tokio::spawn(async move {
        let link = server.accept().await.unwrap();
        let (mut sender, mut receiver) = link.accept_control().await.unwrap();
        let heard = receiver.recv().await.unwrap();
        sender.send(&cancel("heard")).await.unwrap();
        let incoming = link.next_incoming().await;
        (server, link, heard, incoming)
    });
    let began = Instant::now();
    let link = soon(client.dial(relay.local_addr())).await.unwrap();
    assert!(
        began.elapsed() < round_trip * 3 / 2,
        "{:?}",
        began.elapsed()
    );
    let (mut sender, mut receiver) = link.open_control().await.unwrap();
    sender.send(&cancel("first word")).await.unwrap();
    let early = link.send_batch(Lane::Bulk, Bytes::from_static(b"x"));
    assert!(
        tokio::time::timeout(round_trip / 4, early).await.is_err(),
        "a batch went out before the peer had accepted this side"
    );
    assert_eq!(soon(receiver.recv()).await.unwrap(), cancel("heard"));
    // Handshake and answer: with one step after the other it would be three round trips.
    let took = began.elapsed();
    assert!(took < round_trip * 5 / 2, "{took:?}");
    soon(link.accepted()).await.unwrap();
    soon(link.send_batch(Lane::Bulk, Bytes::from_static(b"x")))
        .await
        .unwrap();
    let (_server, _link, heard, incoming) = soon(answering).await.unwrap();
    assert_eq!(heard, cancel("first word"));
    assert!(incoming.is_ok());
}

#[tokio::test]
async fn first_words_to_a_peer_that_refuses_are_never_read() {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let server = Endpoint::server(LOCALHOST, &bob, trusting(bob.fingerprint()), &config());
    let server = server.unwrap();
    let client = Endpoint::client(&alice, trusting(bob.fingerprint()), &config()).unwrap();
    let link = soon(client.dial(server.local_addr().unwrap()))
        .await
        .unwrap();
    if let Ok((mut sender, _receiver)) = link.open_control().await {
        // Whether it still goes out depends on how soon the refusal comes.
        let _sent = sender.send(&cancel("first word")).await;
    }
    let refused = soon(link.accepted()).await;
    assert!(
        matches!(&refused, Err(TransportError::Refused { reason, .. })
            if reason.contains(&alice.fingerprint().to_string())),
        "{refused:?}"
    );
    assert!(matches!(
        soon(server.accept()).await,
        Err(TransportError::Stranger { .. })
    ));
}

#[tokio::test]
async fn an_end_that_both_sides_know_of_costs_no_round_trip_and_is_told_all_the_same() {
    // So long that a busy machine's stalls do not count.
    let round_trip = Duration::from_secs(1);
    let (pair, _relay) = distant_pair(round_trip).await;
    // Until acknowledgements of the handshake are through, so that nothing else is under way.
    tokio::time::sleep(2 * round_trip).await;
    let began = Instant::now();
    pair.client.close(CloseCode::DONE, "done");
    pair.endpoints.0.close(CloseCode::DONE, "the process ends");
    soon(pair.endpoints.0.wait_sent()).await;
    let took = began.elapsed();
    assert!(took < round_trip / 2, "{took:?}");
    // Whatever of the packet is still to be sent would be lost with the process.
    drop(pair.client);
    drop(pair.endpoints.0);
    match soon(pair.server.closed()).await {
        LinkError::PeerClosed { code, .. } => assert_eq!(code, CloseCode::DONE.0),
        other => panic!("{other}"),
    }
    let told = began.elapsed();
    assert!(told < round_trip, "{told:?}");
    // Here nothing has to be said any more.
    pair.endpoints.1.close(CloseCode::DONE, "the process ends");
    soon(pair.endpoints.1.wait_sent()).await;
    assert!(began.elapsed() < told + round_trip / 2);
}

#[tokio::test]
async fn an_end_in_heavy_traffic_is_sent_before_the_process_may_go() {
    let pair = pair().await;
    let sending = saturate(&pair.client);
    soon(pair.server.next_incoming()).await.unwrap();
    pair.endpoints.0.close(CloseCode::SHUTDOWN, "told to end");
    soon(pair.endpoints.0.wait_sent()).await;
    drop(pair.endpoints.0);
    assert!(matches!(
        soon(pair.server.closed()).await,
        LinkError::PeerClosed { .. }
    ));
    soon(sending).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_falls_silent_is_a_lost_link() {
    let config = TransportConfig {
        idle_timeout: Duration::from_millis(600),
        ..config()
    };
    // A runtime that is dropped takes everything of the peer with it, without a word: as SIGKILL.
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let client = Endpoint::client(&alice, trusting(bob.fingerprint()), &config).unwrap();
    let victim = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let trust = trusting(alice.fingerprint());
    let (server, addr) = {
        let _inside = victim.enter();
        let server = Endpoint::server(LOCALHOST, &bob, trust, &config).unwrap();
        let addr = server.local_addr().unwrap();
        (server, addr)
    };
    let accepting = victim.spawn(async move {
        let link = server.accept().await.unwrap();
        (server, link)
    });
    let link = soon(client.connect(addr)).await.unwrap();
    std::mem::forget(soon(accepting).await.unwrap());
    victim.shutdown_background();
    match soon(link.closed()).await {
        LinkError::TimedOut { after, .. } => assert_eq!(after, config.idle_timeout),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn what_cannot_be_sent_harms_nothing() {
    let pair = pair().await;
    let too_large = Bytes::from(vec![0; MAX_BATCH + 1]);
    for result in [
        pair.client.send_batch(Lane::Bulk, too_large).await,
        pair.client.send_batch(Lane::Bulk, Bytes::new()).await,
        pair.client
            .send_batch(Lane::Control, Bytes::from_static(b"x"))
            .await,
        pair.client
            .send_message(Lane::Control, &Message::Released)
            .await,
    ] {
        assert!(
            matches!(result, Err(LinkError::Unsendable(_))),
            "{result:?}"
        );
    }
    soon(pair.client.send_batch(Lane::Bulk, Bytes::from_static(b"x")))
        .await
        .unwrap();
    let incoming = soon(pair.server.next_incoming()).await;
    assert_eq!(
        incoming,
        Ok(Incoming::Batch {
            lane: Lane::Bulk,
            bytes: Bytes::from_static(b"x"),
        })
    );
}
