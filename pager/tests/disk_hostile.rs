//! The NBD server and clients that mean no good, or do not know better.

#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/network.rs"]
mod network;
#[path = "common/pattern.rs"]
mod pattern;
#[path = "common/served.rs"]
mod served;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use hybridmig_pager::disk::{DiskError, NbdServer};
use nbd::{Client, Request};
use proptest::prelude::*;
use roaring::RoaringBitmap;
use served::{BYTES, MIB, Served, request};

#[test]
fn the_socket_is_private_and_never_taken_from_another() {
    let mut served = Served::missing();
    let socket = served.options.socket.clone();
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mode = std::fs::metadata(served.disk.path())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let start = || NbdServer::start(&served.options, served.disk.clone());
    assert!(matches!(start(), Err(DiskError::Socket { .. })));
    served.server.take().unwrap().stop();
    // Left by a process that was killed.
    drop(UnixListener::bind(&socket).unwrap());
    let server = start().unwrap();
    server.stop();
    std::fs::write(&socket, "a file of somebody's").unwrap();
    assert!(matches!(start(), Err(DiskError::Socket { .. })));
    assert!(socket.exists());
}

#[test]
fn requests_that_make_no_sense_are_errors() {
    let served = Served::missing();
    for structured in [false, true] {
        let mut client = Client::open(&served.options.socket, structured);
        let beyond = BYTES - 100;
        let mut df = request(nbd::READ, 0, 512);
        df.flags = nbd::DF;
        let mut unknown = request(nbd::FLUSH, 0, 0);
        unknown.flags = 1 << 9;
        for (request, expected) in [
            (request(nbd::READ, beyond, 101), nbd::EINVAL),
            (request(nbd::READ, u64::MAX, 1), nbd::EINVAL),
            (request(nbd::READ, 0, u32::MAX), nbd::EINVAL),
            (request(nbd::READ, 0, 0), nbd::EINVAL),
            (request(nbd::TRIM, beyond, 4096), nbd::EINVAL),
            (request(nbd::WRITE_ZEROES, u64::MAX - 5, 4096), nbd::ENOSPC),
            (request(nbd::BLOCK_STATUS, 0, 4096), nbd::EINVAL),
            (request(99, 0, 4096), nbd::EINVAL),
            (unknown, nbd::EINVAL),
        ] {
            let error = client.ask(request, &[]).unwrap();
            assert_eq!(error, expected, "{request:?}");
        }
        // With its payload, which must not be taken for requests.
        let write = request(nbd::WRITE, beyond, 4096);
        assert_eq!(client.ask(write, &[1; 4096]).unwrap(), nbd::ENOSPC);
        let long = request(nbd::WRITE, 0, 33 << 20);
        assert_eq!(client.ask(long, &vec![1; 33 << 20]).unwrap(), nbd::EINVAL);
        if !structured {
            assert_eq!(client.ask(df, &[]).unwrap(), nbd::EINVAL);
        }
        assert_eq!(client.ask(request(nbd::FLUSH, 0, 0), &[]).unwrap(), 0);
        client.stream.write_all(&[0xaa; 28]).unwrap();
        assert!(client.receive().is_err(), "hung up on");
    }
    assert_eq!(served.asked(), 0);
}

#[test]
fn handshakes_that_make_no_sense_are_errors() {
    let served = Served::missing();
    let socket = &served.options.socket;
    let go = |name: &str| [&(name.len() as u32).to_be_bytes(), name.as_bytes(), &[0; 2]].concat();
    let mut client = Client::connect(socket);
    // An unknown option, an unknown export, malformed ones, contexts before structured replies.
    for (option, data, expected) in [
        (1234, vec![1; 100], 1 << 31 | 1),
        (5, vec![], 1 << 31 | 1), // STARTTLS
        (7, go("another"), 1 << 31 | 6),
        (7, vec![0xff; 6], 1 << 31 | 3),
        (7, vec![], 1 << 31 | 3),
        (10, [0; 8].to_vec(), 1 << 31 | 3),
        (3, vec![1], 1 << 31 | 3),
    ] {
        client.option(option, &data);
        assert_eq!(
            client.option_reply().unwrap().0,
            expected,
            "option {option}"
        );
    }
    client.option(3, &[]);
    let (kind, data) = client.option_reply().unwrap();
    assert_eq!((kind, &data[4..]), (2, &b"disk0"[..]));
    assert_eq!(client.option_reply().unwrap().0, 1);
    client.option(2, &[]);
    assert_eq!(client.option_reply().unwrap().0, 1);
    assert!(client.option_reply().is_err(), "hung up after ABORT");

    // The old way in, with its 124 zeroes.
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&1_u32.to_be_bytes()).unwrap();
    let mut client = Client { stream };
    client.option(1, b"disk0");
    let mut export = [0; 134];
    client.stream.read_exact(&mut export).unwrap();
    assert_eq!(export[..8], BYTES.to_be_bytes());
    assert_eq!(client.ask(request(nbd::FLUSH, 0, 0), &[]).unwrap(), 0);

    for garbage in [
        vec![0xff; 64],                                // flags that do not exist
        [&3_u32.to_be_bytes()[..], &[7; 64]].concat(), // no option
        [
            &3_u32.to_be_bytes()[..],
            b"IHAVEOPT",
            &[0, 0, 0, 7, 0xff, 0, 0, 0],
        ]
        .concat(),
    ] {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.write_all(&garbage).unwrap();
        let mut answer = Vec::new();
        // It is hung up on, with a reset where it has sent more than was read.
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer.len(), 18);
    }
    for _ in 0..3 {
        let mut client = Client::connect(socket);
        for _ in 0..64 {
            client.option(1234, &[]);
            client.option_reply().unwrap();
        }
        assert!(client.option_reply().is_err(), "no end of options");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Every request is answered once, in or out of order, and the last one as a good one.
    #[test]
    fn any_requests_are_answered(
        structured in any::<bool>(),
        requests in proptest::collection::vec((
            prop_oneof![Just(0_u16), any::<u16>()],
            0..12_u16,
            prop_oneof![0..BYTES + MIB, any::<u64>()],
            prop_oneof![0..20_000_u32, any::<u32>()],
        ), 1..40),
    ) {
        let mut served = Served::missing();
        served.connect();
        let mut client = Client::open(&served.options.socket, structured);
        let mut sender = Client { stream: client.stream.try_clone().unwrap() };
        let mut reads = std::collections::HashMap::new();
        let sent: Vec<(Request, usize)> = requests
            .iter()
            .zip(0_u64..)
            .filter(|((_, command, _, _), _)| *command != nbd::DISC)
            .map(|(&(flags, command, offset, len), cookie)| {
                let len = if command == nbd::WRITE { len % 100_000 } else { len };
                if command == nbd::READ && !structured {
                    reads.insert(cookie, len as usize);
                }
                let payload = if command == nbd::WRITE { len as usize } else { 0 };
                (Request { flags, command, cookie, offset, len }, payload)
            })
            .collect();
        let count = sent.len();
        let sending = std::thread::spawn(move || {
            for (request, payload) in sent {
                sender.send(request, &vec![3; payload]).unwrap();
            }
        });
        let mut seen = RoaringBitmap::new();
        while seen.len() < count as u64 {
            let reply = client.receive().unwrap();
            if reply.error == 0 && let Some(len) = reads.get(&reply.cookie) {
                client.stream.read_exact(&mut vec![0; *len]).unwrap();
            }
            if reply.last {
                prop_assert!(seen.insert(reply.cookie as u32));
            }
        }
        sending.join().unwrap();
        prop_assert_eq!(client.ask(request(nbd::FLUSH, 0, 0), &[]).unwrap(), 0);
    }

    /// Whatever a client says first, the server goes on serving others.
    #[test]
    fn garbage_harms_nobody_else(
        garbage in proptest::collection::vec(
            (0..13_u32, proptest::collection::vec(any::<u8>(), 0..60)), 0..10),
    ) {
        let served = Served::missing();
        let mut client = Client::connect(&served.options.socket);
        for (option, data) in garbage {
            let mut message = b"IHAVEOPT".to_vec();
            message.extend(option.to_be_bytes());
            message.extend((data.len() as u32).to_be_bytes());
            message.extend(data);
            if client.stream.write_all(&message).is_err() {
                break;
            }
        }
        let mut good = Client::open(&served.options.socket, true);
        prop_assert_eq!(good.ask(request(nbd::TRIM, 0, 4096), &[]).unwrap(), 0);
    }
}
