//! The link between two namespaces, with the sockets of this kernel at both ends. Takes root (or
//! `unshare --user --map-root-user --net --mount`); bounds on time are one-sided, so that a busy machine
//! fails no test.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use hybridmig_netem::tun::{FAR_ADDRESS_V6, NEAR_ADDRESS_V6};
use hybridmig_netem::{LinkSpec, Namespace, TunConfig, TunHandle, TunLink};
use nix::sys::socket::{setsockopt, sockopt};

const MS: Duration = Duration::from_millis(1);

/// No single step of a test takes longer on any machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn start(link: &str) -> TunHandle {
    start_with(link, |_| {})
}

fn start_with(link: &str, change: impl FnOnce(&mut TunConfig)) -> TunHandle {
    let link: LinkSpec = link.parse().expect("the link of a test is a link");
    let mut config = TunConfig::new(link, 7);
    change(&mut config);
    match TunLink::start(config) {
        Ok(handle) => handle,
        Err(error) => panic!("these tests take root: {}", chain(&error)),
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn udp(namespace: &Namespace, address: impl Into<IpAddr>) -> UdpSocket {
    let address = SocketAddr::new(address.into(), 0);
    let socket = namespace.run(|| UdpSocket::bind(address)).unwrap().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    // All that a test sends at once: the kernel counts 2 KiB and more for the smallest datagram. Root of a
    // user namespace has to stay within the machine's limit.
    setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20))
        .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &(16 << 20)))
        .unwrap();
    socket
}

/// A near and a far socket, connected to each other.
fn udp_pair(link: &TunHandle) -> (UdpSocket, UdpSocket) {
    let near = udp(link.near(), link.near_address());
    let far = udp(link.far(), link.far_address());
    near.connect(far.local_addr().unwrap()).unwrap();
    far.connect(near.local_addr().unwrap()).unwrap();
    (near, far)
}

/// Bytes that anybody can make again, and that differ everywhere.
fn stream(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Sends `bytes` from near to far by TCP while `bytes` come back; both ends compare. The time it took.
fn exchange(link: &TunHandle, bytes: &[u8]) -> Duration {
    exchange_with(link, link.far_address().into(), bytes)
}

fn exchange_with(link: &TunHandle, far: IpAddr, bytes: &[u8]) -> Duration {
    let address = SocketAddr::new(far, 0);
    let listener = link
        .far()
        .run(|| TcpListener::bind(address))
        .unwrap()
        .unwrap();
    let address = listener.local_addr().unwrap();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let far = scope.spawn(|| {
            let (stream, _) = listener.accept().unwrap();
            both_ways(&stream, bytes);
        });
        let connect = || TcpStream::connect_timeout(&address, PATIENCE);
        let near = link.near().run(connect).unwrap().unwrap();
        both_ways(&near, bytes);
        far.join().unwrap();
    });
    begin.elapsed()
}

fn both_ways(stream: &TcpStream, bytes: &[u8]) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            writer.write_all(bytes).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut received = Vec::with_capacity(bytes.len());
        let mut reader = stream;
        reader.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), bytes.len());
        let wrong = received.iter().zip(bytes).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "first wrong byte");
    });
}

/// A counter of `/proc/net/snmp` or `netstat` in a namespace.
fn kernel_counter(namespace: &Namespace, protocol: &str, name: &str) -> u64 {
    let read = || std::fs::read_to_string("/proc/thread-self/net/snmp");
    let text = namespace.run(read).unwrap().unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol));
    let names = lines.next().unwrap().split_whitespace();
    let values = lines.next().unwrap().split_whitespace();
    let value = names.zip(values).find(|(n, _)| *n == name).unwrap().1;
    value.parse().unwrap()
}

#[test]
fn datagrams_arrive_intact_and_in_order_after_the_delay() {
    let link = start("delay 10ms");
    let (near, far) = udp_pair(&link);
    let bytes = stream(1400);
    let begin = Instant::now();
    for i in 0..200u8 {
        near.send(&[&[i], &bytes[..usize::from(i) * 7]].concat())
            .unwrap();
    }
    let mut buffer = [0; 2048];
    for i in 0..200u8 {
        let length = far.recv(&mut buffer).unwrap();
        assert!(begin.elapsed() >= 10 * MS);
        assert_eq!(buffer[0], i);
        assert_eq!(buffer[1..length], bytes[..usize::from(i) * 7]);
    }
    for _ in 0..5 {
        let begin = Instant::now();
        near.send(b"question").unwrap();
        far.recv(&mut buffer).unwrap();
        far.send(b"answer").unwrap();
        near.recv(&mut buffer).unwrap();
        assert!(begin.elapsed() >= 20 * MS, "{:?}", begin.elapsed());
    }
    let stats = link.stop();
    assert_eq!(stats.forward.packets, 205);
    assert_eq!(stats.forward.delivered_packets, 205);
    let payload: u64 = (0..200).map(|i| 1 + i * 7).sum::<u64>() + 5 * 8;
    assert_eq!(stats.forward.bytes, payload + 205 * 28);
    assert_eq!(stats.back.delivered_packets, 5);
    assert_eq!(stats.forward.dropped_relay + stats.back.dropped_relay, 0);
}

#[test]
fn an_idle_link_carries_nothing() {
    let link = start("delay 1ms");
    // What the kernel would say of its own accord, it says within the first second.
    let (near, _far) = udp_pair(&link);
    near.set_read_timeout(Some(1500 * MS)).unwrap();
    near.recv(&mut [0; 16]).unwrap_err();
    let stats = link.stop();
    assert_eq!((stats.forward.packets, stats.back.packets), (0, 0));
}

#[test]
fn tcp_arrives_intact_at_no_more_than_the_rate() {
    let link = start("delay 5ms rate 200mbit limit 50ms");
    let bytes = stream(4 << 20);
    let took = exchange(&link, &bytes);
    // 4 MiB of payload and 52 bytes of headers for each 1448.
    let ideal = Duration::from_secs_f64(f64::from(4 << 20) * 8.0 * 1500.0 / 1448.0 / 200e6);
    assert!(took >= ideal, "{took:?} for what takes {ideal:?}");
    let stats = link.stop();
    for direction in [stats.forward, stats.back] {
        assert!(direction.bytes >= 4 << 20);
        // Packets of the link are counted, not the pieces that the kernel hands over.
        assert!(direction.packets >= (4 << 20) / 1448, "{direction:?}");
        assert_eq!(direction.dropped_relay, 0);
    }
}

#[test]
fn tcp_without_offload_is_the_same() {
    let link = start_with("delay 1ms loss 0.1%", |config| config.offload = false);
    exchange(&link, &stream(1 << 20));
    let stats = link.stop();
    assert!(stats.forward.packets >= (1 << 20) / 1448);
    assert_eq!(stats.forward.dropped_relay + stats.back.dropped_relay, 0);
}

#[test]
fn no_wrong_byte_comes_through_a_link_that_damages_packets() {
    let link = start("delay 1ms loss 0.5% corrupt 0.5% duplicate 0.5% rate 2gbit");
    exchange(&link, &stream(12 << 20));
    let errors: u64 = [link.near(), link.far()]
        .map(|end| kernel_counter(end, "Tcp:", "InCsumErrors"))
        .iter()
        .sum();
    let stats = link.stop();
    for direction in [stats.forward, stats.back] {
        assert!(direction.corrupted > 0, "{direction:?}");
        assert!(direction.duplicated > 0, "{direction:?}");
        assert!(direction.dropped_loss > 0, "{direction:?}");
        assert_eq!(direction.dropped_relay, 0, "{direction:?}");
    }
    // Nearly all flipped bits are found by TCP's own checksum.
    let corrupted = stats.forward.corrupted + stats.back.corrupted;
    assert!(errors > 0 && errors <= corrupted, "{errors} of {corrupted}");
}

#[test]
fn ipv6_is_carried_as_well() {
    let link = start("delay 1ms loss 0.5% corrupt 0.5% rate 2gbit");
    exchange_with(&link, FAR_ADDRESS_V6.into(), &stream(4 << 20));
    let stats = link.stop();
    for direction in [stats.forward, stats.back] {
        // 1428 bytes of payload fit a packet.
        assert!(direction.packets >= (4 << 20) / 1428, "{direction:?}");
        assert!(direction.dropped_loss > 0, "{direction:?}");
        assert_eq!(direction.dropped_relay, 0, "{direction:?}");
    }
}

#[test]
fn segmented_datagrams_meet_their_fates_one_by_one() {
    let link = start("delay 1ms loss 30%");
    let (near, far) = udp_pair(&link);
    segmented_datagrams(link, &near, &far);
    let link = start("delay 1ms loss 30%");
    let near = udp(link.near(), NEAR_ADDRESS_V6);
    let far = udp(link.far(), FAR_ADDRESS_V6);
    near.connect(far.local_addr().unwrap()).unwrap();
    segmented_datagrams(link, &near, &far);
}

fn segmented_datagrams(link: TunHandle, near: &UdpSocket, far: &UdpSocket) {
    setsockopt(near, sockopt::UdpGsoSegment, &1200).unwrap();
    // 41 datagrams at a time, the last one shorter; each begins with its number.
    let mut bytes = stream(40 * 1200 + 100);
    let mut buffer = [0; 2048];
    let (mut last, mut received) = (None, 0);
    for round in 0..20u8 {
        for (i, datagram) in bytes.chunks_mut(1200).enumerate() {
            datagram[..2].copy_from_slice(&[round, i as u8]);
        }
        near.send(&bytes).unwrap();
        wait_until("all have met their fates", || {
            let stats = link.stats().forward;
            stats.delivered_packets + stats.dropped_loss == (u64::from(round) + 1) * 41
        });
        // Each round by itself: the kernel's queue in front of sockets is short, and everybody's.
        while received < link.stats().forward.delivered_packets {
            let length = far.recv(&mut buffer).unwrap();
            received += 1;
            let number = (buffer[0], buffer[1]);
            assert!(last < Some(number), "{last:?} before {number:?}");
            last = Some(number);
            let i = usize::from(number.1);
            assert_eq!(length, if i == 40 { 100 } else { 1200 });
            assert_eq!(buffer[2..length], bytes[i * 1200 + 2..i * 1200 + length]);
        }
    }
    let stats = link.stats().forward;
    assert_eq!(stats.packets, 20 * 41);
    // Binomial: mean 246, σ = √(820 · 0.3 · 0.7) = 13.
    assert!((180..=312).contains(&stats.dropped_loss), "{stats:?}");
}

/// Sends until a packet meets the cut of the forward direction; nothing waits at the far end then.
fn meet_cut(link: &TunHandle, near: &UdpSocket, far: &UdpSocket) {
    let before = link.stats().forward.dropped_down;
    wait_until("a packet meets the cut", || {
        near.send(b"lost").unwrap();
        link.stats().forward.dropped_down > before
    });
    far.set_nonblocking(true).unwrap();
    while far.recv(&mut [0; 16]).is_ok() {}
    far.set_nonblocking(false).unwrap();
}

/// Sends until something arrives.
fn get_through(near: &UdpSocket, far: &UdpSocket) {
    far.set_read_timeout(Some(20 * MS)).unwrap();
    wait_until("a packet gets through", || {
        near.send(b"found").unwrap();
        far.recv(&mut [0; 16]).is_ok()
    });
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "still waiting until {what}");
        std::thread::yield_now();
    }
}

#[test]
fn cut_loses_and_heals() {
    let link = start("delay 1ms");
    let (near, far) = udp_pair(&link);
    get_through(&near, &far);
    link.set_down(true);
    // The cut comes at once, but not by the time when the call returns.
    meet_cut(&link, &near, &far);
    near.send(b"lost").unwrap();
    far.set_read_timeout(Some(50 * MS)).unwrap();
    far.recv(&mut [0; 16]).unwrap_err();
    link.set_down(false);
    get_through(&near, &far);
    assert_eq!(link.stats().forward.dropped_relay, 0);
}

#[test]
fn timeline_starts_again() {
    let link = start("delay 1ms; at 300ms forward down");
    let (near, far) = udp_pair(&link);
    meet_cut(&link, &near, &far);
    link.restart_timeline();
    get_through(&near, &far);
    meet_cut(&link, &near, &far);
    link.set_link("delay 1ms".parse().unwrap());
    get_through(&near, &far);
    assert_eq!(link.stop().back.dropped_down, 0);
}

#[test]
fn interface_that_is_down_is_no_end_of_the_link() {
    let link = start("delay 1ms");
    let (near, far) = udp_pair(&link);
    let mut command = std::process::Command::new("ip");
    command.args(["link", "set", hybridmig_netem::tun::DEVICE, "down"]);
    link.far().enter(&mut command);
    assert!(command.status().expect("iproute2 is needed").success());
    near.send(b"into the void").unwrap();
    wait_until("the packet is missed", || {
        link.stats().forward.dropped_relay > 0
    });
    let mut command = std::process::Command::new("ip");
    command.args(["link", "set", hybridmig_netem::tun::DEVICE, "up"]);
    link.far().enter(&mut command);
    assert!(command.status().unwrap().success());
    near.send(b"hello").unwrap();
    assert_eq!(far.recv(&mut [0; 16]).unwrap(), 5);
    assert!(link.stop().invalid(Duration::ZERO).is_some());
}

#[test]
fn link_whose_device_is_deleted_is_no_valid_measurement() {
    let link = start("delay 1ms");
    let mut command = std::process::Command::new("ip");
    command.args(["link", "delete", hybridmig_netem::tun::DEVICE]);
    link.near().enter(&mut command);
    assert!(command.status().expect("iproute2 is needed").success());
    wait_until("that is noticed", || {
        link.stats().invalid(Duration::ZERO).is_some()
    });
}

#[test]
fn small_and_large_mtu_are_kept() {
    for mtu in [576u16, 9000] {
        let link = start_with("delay 1ms loss 1%", |config| config.mtu = mtu);
        exchange(&link, &stream(1 << 20));
        let stats = link.stop().forward;
        assert!(stats.bytes <= stats.packets * u64::from(mtu), "{stats:?}");
        assert!(stats.packets > (1 << 20) / u64::from(mtu), "{stats:?}");
    }
    let link: LinkSpec = "delay 1ms".parse().unwrap();
    let mut config = TunConfig::new(link, 1);
    config.mtu = 67;
    let error = TunLink::start(config).unwrap_err();
    assert!(error.to_string().contains("67"), "{error}");
}

#[test]
fn commands_run_inside_and_settings_stay_inside() {
    let link = start("delay 1ms");
    let outside = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem").unwrap();
    link.near()
        .set_sysctl("net.ipv4.tcp_rmem", "4096 131072 99999744")
        .unwrap();
    let inside = link.near().sysctl("net.ipv4.tcp_rmem").unwrap();
    assert_eq!(inside.split_whitespace().last(), Some("99999744"));
    let now = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem").unwrap();
    assert_eq!(now, outside);
    let mut command = std::process::Command::new("cat");
    command.arg("/proc/self/net/dev");
    link.far().enter(&mut command);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(hybridmig_netem::tun::DEVICE), "{text}");
}
