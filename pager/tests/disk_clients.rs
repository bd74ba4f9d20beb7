//! The NBD server and the clients that people use, while blocks are missing.

#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/network.rs"]
mod network;
#[path = "common/pattern.rs"]
mod pattern;
#[path = "common/served.rs"]
mod served;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use hybridmig_pager::disk::NbdServer;
use nbd::Client;
use roaring::RoaringBitmap;
use served::{BLOCK, BYTES, DELAY, MIB, SEED, Served, request, run};

#[test]
fn qemu_io_writes_and_trims_what_is_missing() {
    let mut served = Served::missing();
    let mut expected = network::whole(SEED, BYTES, BLOCK);
    // Nobody is connected: none of these may need a block of the source.
    let end = BYTES - 512;
    let commands = [
        "write -P 1 64k 4k".to_owned(),
        "write -P 2 1M 3M".into(),
        "write -z 5M 128k".into(),
        "write -z -u 6M 128k".into(),
        "discard 7M 1M".into(),
        format!("write -P 3 {end} 512"),
        "read -P 1 64k 4k".into(),
        "read -P 2 1M 3M".into(),
        "read -P 0 5M 128k".into(),
        "read -P 0 7M 1M".into(),
        "write -f -P 4 9M 256k".into(),
        "flush".into(),
    ];
    let uri = served.uri();
    let mut line = vec!["qemu-io", "-f", "raw"];
    for command in &commands {
        line.extend(["-c", command]);
    }
    line.push(&uri);
    run(&line);
    assert_eq!(served.asked(), 0);
    for (at, len, value) in [
        (64 << 10, 4 << 10, 1),
        (1 << 20, 3 << 20, 2),
        (5 << 20, 128 << 10, 0),
        (6 << 20, 128 << 10, 0),
        (7 << 20, 1 << 20, 0),
        (end as usize, 512, 3),
        (9 << 20, 256 << 10, 4),
    ] {
        expected[at..at + len].fill(value);
    }
    // What the guest has made complete need not come any more.
    let removed: RoaringBitmap = served
        .network
        .sink
        .removed
        .lock()
        .unwrap()
        .iter()
        .copied()
        .collect();
    let complete = [16..64, 80..82, 96..98, 112..128, 144..148];
    assert_eq!(removed, complete.into_iter().flatten().collect());

    // Parts of granules need theirs.
    served.connect();
    let commands = [
        "write -P 5 10000001 7",
        "write -P 6 11000000 300000",
        "write -z 12000000 5000",
        "read -P 5 10000001 7",
        "read -P 6 11000000 300000",
        "read -P 0 12000000 5000",
        "read 13000000 1",
        "read 0 4M",
    ];
    let mut line = vec!["qemu-io", "-f", "raw"];
    for command in commands {
        line.extend(["-c", command]);
    }
    line.push(&uri);
    run(&line);
    expected[10_000_001..10_000_008].fill(5);
    expected[11_000_000..11_300_000].fill(6);
    expected[12_000_000..12_005_000].fill(0);
    let mut asked = served.network.sink.asked.lock().unwrap().clone();
    let times = asked.len();
    asked.sort_unstable();
    asked.dedup();
    assert_eq!(asked.len(), times, "a block is asked for once");
    assert!(served.finish() == expected);
    let stats = served.disk.stats();
    assert_eq!(stats.faults, times as u64);
    assert!(stats.waited > 0 && stats.waited_time >= DELAY && stats.errors == 0);
}

#[test]
fn copies_of_a_disk_that_is_still_arriving_are_the_sources() {
    let mut served = Served::missing();
    let whole = network::whole(SEED, BYTES, BLOCK);
    let uri = served.uri();
    let original = served.path("original");
    std::fs::write(&original, &whole).unwrap();
    let original = original.to_str().unwrap();

    // What is missing is no hole, although the image has nothing there.
    // (Nobody is connected yet: none of these may look at contents.)
    let map = run(&["nbdinfo", "--map", &uri]);
    let words: Vec<&str> = map.split_whitespace().collect();
    assert_eq!(words, ["0", &BYTES.to_string(), "0", "data"]);
    let json = run(&["nbdinfo", "--no-content", "--json", &uri]);
    for wanted in [
        format!("\"export-size\": {BYTES}"),
        "\"can_multi_conn\": true".into(),
        "\"can_df\": true".into(),
        "\"can_fua\": true".into(),
        "\"block_size_maximum\": 33554432".into(),
    ] {
        assert!(json.contains(&wanted), "{wanted} is not in {json}");
    }
    let info = run(&["qemu-img", "info", "-f", "raw", "--output=json", &uri]);
    assert!(
        info.contains(&format!("\"virtual-size\": {BYTES}")),
        "{info}"
    );

    served.connect();
    run(&[
        "qemu-img", "compare", "-f", "raw", "-F", "raw", &uri, original,
    ]);
    let copy = served.path("copy");
    run(&["nbdcopy", &uri, copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == whole);
    run(&[
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "raw",
        &uri,
        copy.to_str().unwrap(),
    ]);
    assert!(std::fs::read(&copy).unwrap() == whole);
    // Now there are holes, where the source has zeroes.
    let map = run(&["qemu-img", "map", "--output=json", "-f", "raw", &uri]);
    assert!(map.contains("\"zero\": true"), "{map}");
    assert!(served.finish() == whole);
    run(&[
        "qemu-img", "compare", "-f", "raw", "-F", "raw", &uri, original,
    ]);
}

#[test]
fn a_disk_is_filled_by_clients_of_several_connections() {
    let served = Served::missing();
    let whole = network::whole(99, BYTES, BLOCK);
    let other = served.path("other");
    std::fs::write(&other, &whole).unwrap();
    // Overwritten completely: not a single block has to come.
    let command = ["nbdcopy", "--flush", other.to_str().unwrap(), &served.uri()];
    run(&command);
    assert_eq!(served.asked(), 0);
    assert!(served.finish() == whole);
}

#[test]
fn a_read_that_waits_holds_up_nobody() {
    for structured in [false, true] {
        let mut served = Served::missing();
        let mut client = Client::open(&served.options.socket, structured);
        let here = 2 * MIB;
        let written = client.ask(request(nbd::WRITE, here, BLOCK), &vec![8; BLOCK as usize]);
        assert_eq!(written.unwrap(), 0);
        // A read and two writes of parts that wait, of the same block and of another.
        let waiting = [
            request(nbd::READ, 5 * MIB, 4096),
            request(nbd::WRITE, 5 * MIB + 4096 + 100, 100),
            request(nbd::WRITE, 6 * MIB + 4000, 4096 + 200),
        ];
        for wait in waiting {
            let payload = vec![
                7;
                if wait.command == nbd::WRITE {
                    wait.len as usize
                } else {
                    0
                }
            ];
            client.send(wait, &payload).unwrap();
        }
        let mut other = Client::open(&served.options.socket, false);
        for client in [&mut client, &mut other] {
            assert_eq!(client.ask(request(nbd::FLUSH, 0, 0), &[]).unwrap(), 0);
            assert_eq!(
                client.ask(request(nbd::TRIM, 8 * MIB, 4096), &[]).unwrap(),
                0
            );
        }
        let mut data = vec![0; BLOCK as usize];
        other.read(here, &mut data);
        assert_eq!(data, vec![8; BLOCK as usize]);
        assert_eq!(served.disk.stats().waiting, 3);
        assert_eq!(*served.network.sink.asked.lock().unwrap(), [80, 96]);

        served.connect();
        served.network.sink.push([80, 96]);
        let mut answered = Vec::new();
        while answered.len() < 3 {
            let reply = client.receive().unwrap();
            assert_eq!(reply.error, 0);
            if !structured && reply.cookie == waiting[0].cookie {
                client.stream.read_exact(&mut [0; 4096]).unwrap();
            }
            answered.push(reply.cookie);
        }
        let mut expected = network::whole(SEED, BYTES, BLOCK);
        for wait in &waiting[1..] {
            let at = wait.offset as usize;
            expected[at..at + wait.len as usize].fill(7);
        }
        let at = 5 * MIB as usize;
        other.read(at as u64, &mut data);
        assert!(data == expected[at..at + data.len()]);
        let at = 6 * MIB as usize;
        other.read(at as u64, &mut data);
        assert!(data == expected[at..at + data.len()]);
    }
}

#[test]
fn waits_end_with_their_client_and_requests_come_again() {
    let mut served = Served::missing();
    for _ in 0..3 {
        let mut client = Client::open(&served.options.socket, true);
        for block in 0..100 {
            let offset = u64::from(block * BLOCK);
            client.send(request(nbd::READ, offset, 4096), &[]).unwrap();
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while served.disk.stats().waiting < 100 {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        drop(client);
        while served.disk.stats().waiting > 0 {
            assert!(
                Instant::now() < deadline,
                "waits that nobody is interested in"
            );
            std::thread::yield_now();
        }
    }
    // The source has been asked already, and is not again.
    assert_eq!(served.asked(), 100);

    // A server that stops hangs up on who waits; the next one answers.
    let mut client = Client::open(&served.options.socket, false);
    client.send(request(nbd::READ, 0, 4096), &[]).unwrap();
    while served.disk.stats().waiting == 0 {
        std::thread::yield_now();
    }
    served.server.take().unwrap().stop();
    assert!(client.receive().is_err());
    assert!(!served.options.socket.exists());
    assert_eq!(served.disk.stats().waiting, 0);
    served.server = Some(NbdServer::start(&served.options, served.disk.clone()).unwrap());
    served.connect();
    let mut client = Client::open(&served.options.socket, false);
    client.read(MIB, &mut [0; 4096]);
}

#[test]
fn more_requests_than_may_be_in_flight_are_answered_in_the_end() {
    let mut served = Served::missing();
    let mut client = Client::open(&served.options.socket, true);
    let mut sender = client.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        let mut client = Client {
            stream: sender.try_clone().unwrap(),
        };
        for index in 0..2000_u64 {
            let mut wanted = request(nbd::READ, index * 8192, 4096);
            wanted.cookie = index;
            client.send(wanted, &[]).unwrap();
        }
        sender.flush().unwrap();
    });
    served.connect();
    let all: Vec<u32> = served.disk.missing().iter().collect();
    served.network.sink.push(all);
    let mut seen = RoaringBitmap::new();
    while seen.len() < 2000 {
        let reply = client.receive().unwrap();
        assert!(reply.error == 0 && reply.last);
        assert!(seen.insert(reply.cookie as u32), "answered twice");
    }
    sending.join().unwrap();
}

#[test]
fn long_requests_go_in_pieces() {
    let mut served = Served::missing();
    served.connect();
    served.network.sink.push(0..served.disk.blocks());
    let mut expected = network::whole(SEED, BYTES, BLOCK);
    let mut data: Vec<u8> = (0..20 * MIB as usize + 123)
        .map(|at| (at % 251) as u8)
        .collect();
    let at = MIB + 77;
    let mut write = request(nbd::WRITE, at, data.len() as u32);
    write.flags = nbd::FUA;
    let mut client = Client::open(&served.options.socket, false);
    assert_eq!(client.ask(write, &data).unwrap(), 0);
    expected[at as usize..at as usize + data.len()].copy_from_slice(&data);
    client.read(at, &mut data);
    assert!(data == expected[at as usize..at as usize + data.len()]);

    let mut client = Client::open(&served.options.socket, true);
    for flags in [0, nbd::DF] {
        let mut read = request(nbd::READ, 0, BYTES as u32);
        read.flags = flags;
        client.send(read, &[]).unwrap();
        let mut got = vec![1; BYTES as usize];
        let mut chunks = 0;
        loop {
            let reply = client.receive().unwrap();
            let at = u64::from_be_bytes(reply.data[..8].try_into().unwrap()) as usize;
            match reply.kind {
                1 => got[at..at + reply.data.len() - 8].copy_from_slice(&reply.data[8..]),
                2 => {
                    let len = u32::from_be_bytes(reply.data[8..].try_into().unwrap()) as usize;
                    got[at..at + len].fill(0);
                }
                other => panic!("a chunk of kind {other}"),
            }
            chunks += 1;
            if reply.last {
                break;
            }
        }
        assert_eq!(chunks == 1, flags == nbd::DF);
        assert!(got == expected);
    }
    assert!(served.finish() == expected);
}

#[test]
fn before_arming_there_are_reads_only() {
    let mut served = Served::filling();
    let mut client = Client::open(&served.options.socket, false);
    let mut data = vec![0; 8192];
    client.read(MIB, &mut data);
    let whole = network::whole(SEED, BYTES, BLOCK);
    assert!(data == whole[MIB as usize..MIB as usize + 8192]);
    for command in [nbd::WRITE, nbd::TRIM, nbd::WRITE_ZEROES] {
        let payload = vec![1; if command == nbd::WRITE { 4096 } else { 0 }];
        let error = client.ask(request(command, 0, 4096), &payload).unwrap();
        assert_eq!(error, nbd::EPERM);
    }
    served
        .disk
        .arm(&RoaringBitmap::new(), served.network.sink.clone())
        .unwrap();
    let error = client
        .ask(request(nbd::WRITE, 0, 4096), &[1; 4096])
        .unwrap();
    assert_eq!(error, 0);

    served.server.take().unwrap().stop();
    served.options.read_only = true;
    served.server = Some(NbdServer::start(&served.options, served.disk.clone()).unwrap());
    let mut client = Client::open(&served.options.socket, false);
    let error = client
        .ask(request(nbd::WRITE, 0, 4096), &[2; 4096])
        .unwrap();
    assert_eq!(error, nbd::EPERM);
    client.read(0, &mut data);
    assert_eq!(data[..4096], [1; 4096]);
}
