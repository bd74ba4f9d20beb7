//! The disk pager is killed in the middle of writes, again and again: nothing that was answered is
//! lost, nothing stale is served.

#[path = "common/mod.rs"]
mod common;
#[path = "common/nbd.rs"]
mod nbd;
#[path = "common/network.rs"]
mod network;
use common::pattern;

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use common::Fixture;
use hybridmig_pager::disk::DiskOptions;
use nbd::{Client, Request};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const SLOT: u64 = 4096;
const BYTES: u64 = 16 << 20;
const SLOTS: u64 = BYTES / SLOT;
const SEED: u64 = 3;
const ROUNDS: u64 = 12;
/// Requests that are under way at a time.
const WINDOW: usize = 12;
const PROGRAM: &str = env!("CARGO_BIN_EXE_disk-fixture");

/// What a write puts into a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// All of it.
    Stamp(u32),
    /// Its first half.
    Half(u32),
    /// Zeroes, by a trim or a write of zeroes.
    Zero(u16),
}

/// Contents of the disk as far as they were answered.
struct Guest {
    bytes: Vec<u8>,
    /// By cookie: writes that were not answered.
    open: HashMap<u64, (u64, What)>,
    random: SmallRng,
    next: u32,
    answered: usize,
}

impl Guest {
    fn pick(&mut self) -> (u64, What) {
        let slot = loop {
            let slot = self.random.random_range(0..SLOTS);
            // One at a time per slot: the order of others is not known.
            if self.open.values().all(|(other, _)| *other != slot) {
                break slot;
            }
        };
        self.next += 1;
        let what = match self.random.random_range(0..10) {
            0 => What::Zero(nbd::TRIM),
            1 => What::Zero(nbd::WRITE_ZEROES),
            2 | 3 => What::Half(self.next),
            _ => What::Stamp(self.next),
        };
        (slot, what)
    }

    /// Writes until the server is gone or `until`, then sees it killed.
    fn write(&mut self, client: &mut Client, until: Instant, kill: impl FnOnce()) {
        let mut kill = Some(kill);
        loop {
            while self.open.len() < WINDOW {
                let (slot, what) = self.pick();
                let cookie = u64::from(self.next);
                let (command, len, payload) = match what {
                    What::Stamp(_) => (nbd::WRITE, SLOT, true),
                    What::Half(_) => (nbd::WRITE, SLOT / 2, true),
                    What::Zero(command) => (command, SLOT, false),
                };
                let request = Request {
                    flags: if cookie.is_multiple_of(40) {
                        nbd::FUA
                    } else {
                        0
                    },
                    command,
                    cookie,
                    offset: slot * SLOT,
                    len: len as u32,
                };
                let data = after(what, slot, &[0; SLOT as usize]);
                let data = if payload { &data[..len as usize] } else { &[] };
                self.open.insert(cookie, (slot, what));
                if client.send(request, data).is_err() {
                    return;
                }
            }
            if Instant::now() >= until
                && let Some(kill) = kill.take()
            {
                kill();
            }
            // What was answered before the kill still comes.
            let Ok(reply) = client.receive() else {
                assert!(kill.is_none(), "the server has hung up by itself");
                return;
            };
            assert_eq!(reply.error, 0);
            let (slot, what) = self.open.remove(&reply.cookie).unwrap();
            let bytes = &mut self.bytes[(slot * SLOT) as usize..][..SLOT as usize];
            let new = after(what, slot, bytes);
            bytes.copy_from_slice(&new);
            self.answered += 1;
        }
    }

    /// Compares, and learns what became of writes that were not answered.
    fn verify(&mut self, client: &mut Client, round: u64) {
        let mut now = vec![0; BYTES as usize];
        for (index, piece) in (0..).zip(now.chunks_mut(1 << 20)) {
            client.read(index << 20, piece);
        }
        let open: HashMap<u64, What> = self.open.drain().map(|(_, open)| open).collect();
        for slot in 0..SLOTS {
            let range = (slot * SLOT) as usize..((slot + 1) * SLOT) as usize;
            let (found, expected) = (&now[range.clone()], &mut self.bytes[range]);
            if found == expected {
                continue;
            }
            let what = open
                .get(&slot)
                .unwrap_or_else(|| panic!("round {round}: slot {slot} has changed by itself"));
            let new = after(*what, slot, expected);
            assert!(
                found == new,
                "round {round}: slot {slot} is neither before nor after {what:?}"
            );
            expected.copy_from_slice(&new);
        }
    }
}

/// A slot after a write.
fn after(what: What, slot: u64, before: &[u8]) -> Vec<u8> {
    let mut data = before.to_vec();
    match what {
        What::Zero(_) => data.fill(0),
        What::Stamp(stamp) | What::Half(stamp) => {
            let mut new = vec![0; SLOT as usize];
            pattern::fill(u64::from(stamp) << 32, slot as u32, &mut new);
            let len = if let What::Stamp(_) = what {
                SLOT
            } else {
                SLOT / 2
            } as usize;
            data[..len].copy_from_slice(&new[..len]);
        }
    }
    data
}

fn start(how: &str, directory: &Path) -> Fixture {
    let fixture = Fixture::of(
        PROGRAM,
        &[
            how,
            directory.to_str().unwrap(),
            &BYTES.to_string(),
            &SEED.to_string(),
            "3",
        ],
    );
    assert_eq!(fixture.line(), "ready");
    fixture
}

#[test]
fn a_killed_pager_loses_nothing_that_was_answered() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let mut guest = Guest {
        bytes: network::whole(SEED, BYTES, DiskOptions::BLOCK_SIZE),
        open: HashMap::new(),
        random: SmallRng::seed_from_u64(1),
        next: 0,
        answered: 0,
    };
    let mut fixture = start("missing", dir.path());
    for round in 0..ROUNDS {
        let mut client = Client::open(&socket, false);
        let time = Duration::from_micros(guest.random.random_range(500..60_000));
        // In every other round blocks arrive at the same time.
        if round % 2 == 1 {
            fixture.send("push");
        }
        guest.write(&mut client, Instant::now() + time, || fixture.kill());
        fixture = start("adopt", dir.path());
        let missing: u32 = fixture.ask("missing").parse().unwrap();
        println!(
            "round {round}: {} answered, {} open, {missing} blocks missing",
            guest.answered,
            guest.open.len()
        );
        // To look at everything makes everything arrive: only at some of the ends.
        if round % 4 == 3 {
            guest.verify(&mut Client::open(&socket, false), round);
            if round + 1 < ROUNDS {
                fixture.kill();
                std::fs::remove_dir_all(dir.path()).unwrap();
                std::fs::create_dir(dir.path()).unwrap();
                guest.bytes = network::whole(SEED, BYTES, DiskOptions::BLOCK_SIZE);
                fixture = start("missing", dir.path());
            }
        } else {
            guest.forget_open(&mut Client::open(&socket, false));
        }
    }
    assert!(guest.answered > 100, "only {} writes", guest.answered);
    assert_eq!(fixture.ask("finish"), "finished");
    assert!(std::fs::read(dir.path().join("disk.raw")).unwrap() == guest.bytes);
}

impl Guest {
    /// Looks at the slots alone whose writes were not answered.
    fn forget_open(&mut self, client: &mut Client) {
        for (slot, what) in std::mem::take(&mut self.open).into_values() {
            let mut found = vec![0; SLOT as usize];
            client.read(slot * SLOT, &mut found);
            let expected = &mut self.bytes[(slot * SLOT) as usize..][..SLOT as usize];
            let new = after(what, slot, expected);
            assert!(found == *expected || found == new, "slot {slot}: {what:?}");
            expected.copy_from_slice(&found);
        }
    }
}
