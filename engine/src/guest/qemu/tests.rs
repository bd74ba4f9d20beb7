//! Tests against dialogues recorded from QEMU 7.2.22 and 10.0.2, and against things that are not QEMU.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use qapi::Any;
use serde_json::json;

use super::commands::{QueryStatus, Stop};
use super::compare::compare;
use super::facts::QemuFacts;
use super::qmp::{Qmp, QmpError};

/// A server at a socket of its own; the socket goes with it.
struct Server {
    folder: tempfile::TempDir,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(serve: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
        let thread = thread::spawn(move || serve(listener.accept().unwrap().0));
        Self {
            folder,
            thread: Some(thread),
        }
    }

    /// Says something and then keeps the connection open until the client leaves.
    fn saying(text: &'static [u8]) -> Self {
        Self::start(move |mut stream| {
            stream.write_all(text).unwrap();
            let _ = BufReader::new(stream).lines().count();
        })
    }

    /// Answers what a real QEMU answered, with an event before every answer.
    fn replaying(recording: &'static str) -> Self {
        Self::start(move |mut stream| {
            let lines: Vec<Any> = recording
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect();
            writeln!(stream, "{}", lines[0]["greeting"]).unwrap();
            let reader = BufReader::new(stream.try_clone().unwrap());
            for line in reader.lines() {
                let Ok(line) = line else { return };
                let command: Any = serde_json::from_str(&line).unwrap();
                let reply = lines
                    .iter()
                    .find(|entry| entry["command"] == command)
                    .map_or_else(
                        || json!({"error": {"class": "GenericError", "desc": "not recorded"}}),
                        |entry| entry["reply"].clone(),
                    );
                writeln!(
                    stream,
                    r#"{{"timestamp": {{"seconds": 1, "microseconds": 2}}, "event": "NO_SUCH_EVENT_YET"}}"#
                )
                .unwrap();
                writeln!(stream, "{reply}").unwrap();
            }
        })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

const QEMU_7: &str = include_str!("fixtures/qmp-7.2.jsonl");
const QEMU_10: &str = include_str!("fixtures/qmp-10.0.jsonl");
const GREETING: &[u8] =
    b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \"package\": \"\"}, \
      \"capabilities\": []}}\n";

fn facts(recording: &'static str) -> QemuFacts {
    let server = Server::replaying(recording);
    let qmp = Qmp::connect(&server.socket()).unwrap();
    QemuFacts::read(&qmp).unwrap()
}

#[test]
fn facts_of_two_versions() {
    for (recording, version) in [(QEMU_7, "7.2.22"), (QEMU_10, "10.0.2")] {
        let facts = facts(recording);
        assert_eq!(facts.version.to_string(), version);
        assert_eq!(facts.name.as_deref(), Some("web1"));
        assert_eq!(
            (facts.arch.as_str(), facts.cpu.as_str()),
            ("x86_64", "qemu64")
        );
        assert_eq!(facts.machine, "pc-q35-7.2");
        assert_eq!((facts.vcpus.len(), facts.ram), (2, 64 << 20));
        assert_eq!((facts.status.as_str(), facts.kvm), ("running", false));
        let backend = &facts.backends[0];
        assert_eq!(
            (backend.id.as_str(), backend.kind.as_str()),
            ("ram", "memory-backend-file")
        );
        assert_eq!(backend.block_name(), "ram");
        assert_eq!(backend.mem_path.as_deref(), Some("/dev/shm"));
        assert!(backend.share && backend.size == 64 << 20);
        let kinds: Vec<&str> = facts
            .devices
            .iter()
            .map(|device| device.1.as_str())
            .collect();
        assert_eq!(
            kinds,
            ["virtio-balloon-pci", "virtio-net-pci", "virtio-blk-pci"]
        );
        assert_eq!(facts.disks[0].device, "virtio0");
        assert!(facts.network.contains("type=user"));
    }
}

#[test]
fn the_same_guest_in_two_versions_may_move() {
    let (old, new) = (facts(QEMU_7).describe("x"), facts(QEMU_10).describe("x"));
    let notes = compare(&old, &new).unwrap();
    assert!(
        notes.iter().any(|note| note.contains("10.0.2")),
        "{notes:?}"
    );
}

#[test]
fn another_machine_or_size_is_refused_with_the_option_to_change() {
    let here = facts(QEMU_7).describe("x");
    for (name, option) in [
        ("machine", "-machine"),
        ("ram", "-m"),
        ("cpu", "-cpu"),
        ("vcpus", "-smp"),
    ] {
        let mut offered = here.clone();
        offered.facts.insert(name.to_owned(), "other".to_owned());
        let refusal = compare(&offered, &here).unwrap_err();
        assert_eq!(refusal.reasons.len(), 1);
        assert!(refusal.reasons[0].contains(option), "{refusal}");
    }
    let mut offered = here.clone();
    offered
        .facts
        .insert("cpu-features".to_owned(), "0".to_owned());
    assert!(
        compare(&offered, &here)
            .unwrap_err()
            .to_string()
            .contains("enforce")
    );
    offered.kind = "workload".to_owned();
    assert!(compare(&offered, &here).is_err());
}

#[test]
fn events_are_kept_apart_even_unknown_ones() {
    let server = Server::replaying(QEMU_7);
    let qmp = Qmp::connect(&server.socket()).unwrap();
    assert_eq!(qmp.execute(&QueryStatus {}).unwrap().status, "running");
    let events = qmp.take_events();
    assert!(!events.is_empty() && events.iter().all(|e| e.event == "NO_SUCH_EVENT_YET"));
    assert!(qmp.take_events().is_empty());
}

#[test]
fn a_refusal_carries_qemus_words_and_leaves_the_dialogue_intact() {
    let server = Server::replaying(QEMU_7);
    let qmp = Qmp::connect(&server.socket()).unwrap();
    let error = qmp.execute(&Stop {}).unwrap_err();
    assert!(
        error.is_refusal() && error.to_string().contains("not recorded"),
        "{error}"
    );
    assert!(qmp.execute(&QueryStatus {}).is_ok());
}

#[test]
fn what_is_no_monitor_is_named() {
    for (said, expected) in [
        (&b"220 mail.example ESMTP\r\n"[..], "220 mail.example"),
        (
            b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ",
            "-qmp socket",
        ),
        (b"{\"hello\": 1}\n", "speaks JSON"),
        (b"SSH-2.0", "SSH-2.0"),
        (b"\xff\xfe\x00\n", "in place of a QMP greeting"),
    ] {
        let server = Server::saying(said);
        let error = Qmp::connect(&server.socket()).map(drop).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, QmpError::NotQmp { .. }), "{text}");
        assert!(text.contains(expected), "{text}");
        assert!(
            text.contains(&server.socket().display().to_string()),
            "{text}"
        );
    }
}

#[test]
fn silence_is_named_after_a_bounded_time() {
    let server = Server::saying(b"");
    let text = Qmp::connect(&server.socket())
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(text.contains("another client"), "{text}");
}

#[test]
fn nobody_there() {
    let folder = tempfile::tempdir().unwrap();
    let error = Qmp::connect(&folder.path().join("none"))
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }) && error.is_closed());
}

#[test]
fn an_answer_that_does_not_come_is_an_error_that_ends_the_dialogue() {
    // Answers the negotiation, then nothing more.
    let server = Server::start(|mut stream| {
        stream.write_all(GREETING).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        lines.next().unwrap().unwrap();
        stream.write_all(b"{\"return\": {}}\n").unwrap();
        while let Some(Ok(_)) = lines.next() {}
    });
    let qmp = Qmp::connect(&server.socket()).unwrap();
    let error = qmp
        .execute_within(&QueryStatus {}, Duration::from_millis(50))
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
}

#[test]
fn a_qemu_that_dies_is_told_from_one_that_refuses() {
    let server = Server::start(|mut stream| {
        stream.write_all(GREETING).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        lines.next().unwrap().unwrap();
        stream.write_all(b"{\"return\": {}}\n").unwrap();
        lines.next().unwrap().unwrap();
    });
    let qmp = Qmp::connect(&server.socket()).unwrap();
    let error = qmp.execute(&QueryStatus {}).map(drop).unwrap_err();
    assert!(error.is_closed() && !error.is_refusal(), "{error}");
}

#[test]
fn an_endless_line_is_cut_off() {
    let server = Server::start(|mut stream| {
        let chunk = vec![b'x'; 1 << 20];
        while stream.write_all(&chunk).is_ok() {}
    });
    let error = Qmp::connect(&server.socket()).map(drop).unwrap_err();
    assert!(matches!(error, QmpError::NotQmp { .. }), "{error}");
}

#[test]
fn a_descriptor_travels_with_its_command() {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    let server = Server::start(|mut stream| {
        stream.write_all(GREETING).unwrap();
        let mut buffer = [0; 4096];
        let mut received = Vec::new();
        for _ in 0..2 {
            let mut space = nix::cmsg_space!([i32; 1]);
            let mut slices = [std::io::IoSliceMut::new(&mut buffer)];
            let message = recvmsg::<()>(
                stream.as_raw_fd(),
                &mut slices,
                Some(&mut space),
                MsgFlags::empty(),
            )
            .unwrap();
            for control in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    // SAFETY: the kernel has just given us these descriptors.
                    received.extend(fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
                }
            }
            stream.write_all(b"{\"return\": {}}\n").unwrap();
        }
        let mut pipe = std::fs::File::from(received.pop().unwrap());
        pipe.write_all(b"through").unwrap();
    });
    let qmp = Qmp::connect(&server.socket()).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    qmp.send_fd("state", writer.as_fd()).unwrap();
    drop(writer);
    let text = std::io::read_to_string(std::fs::File::from(reader)).unwrap();
    assert_eq!(text, "through");
}
