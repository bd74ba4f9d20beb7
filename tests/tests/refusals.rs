//! Bad input, each with a clear error and nothing lost: the embedded guest runs on at the source,
//! and says so with its own count of work.

use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixListener;
use std::process::Command;

use anyhow::{Result, bail, ensure};
use hybridmig_engine::guest::workload::control::Control;
use hybridmig_tests::migration::{Guest, Host, PATIENCE, Recv, relay};
use hybridmig_tests::{Vm, VmConfig, free_udp_address, hybridmig_binary};
use hybridmig_transport::identity::Identity;
use hybridmig_transport::message::{Message, RefusalCode, SessionId};
use hybridmig_transport::trust::Trust;
use hybridmig_transport::{Endpoint, TransportConfig};
use nix::sys::signal::Signal;

/// Slow enough that a migration of 64 MiB is still in pre-copy when the test acts.
const SLOW_LINK: &str = "delay 10ms rate 20mbit limit 50ms";

/// `hybridmig recv` for an embedded guest.
fn recv(at: &Host, from: &Host) -> Result<Recv> {
    at.recv(
        from,
        [
            "--workload".into(),
            at.path("arrived.sock").into_os_string(),
        ],
    )
}

fn send_words(guest: &Guest) -> [String; 2] {
    ["--workload".to_owned(), guest.socket()]
}

#[test]
fn a_stranger_is_refused_and_both_sides_say_why() -> Result<()> {
    let (a, b, other) = (Host::new()?, Host::new()?, Host::new()?);
    let guest = Guest::start(&a, 16)?;
    let recv = recv(&b, &other)?;
    let mut send = a.send(&b, recv.address, send_words(&guest))?;
    send.ends_with(1, PATIENCE)?;
    send.process
        .wait_for_stderr(&a.fingerprint().to_string(), PATIENCE)?;
    recv.process
        .wait_for_stderr(&a.fingerprint().to_string(), PATIENCE)?;
    guest.runs_here()
}

#[test]
fn a_destination_with_another_fingerprint_is_refused() -> Result<()> {
    let (a, b, other) = (Host::new()?, Host::new()?, Host::new()?);
    let guest = Guest::start(&a, 16)?;
    let recv = recv(&b, &a)?;
    let mut send = a.send(&other, recv.address, send_words(&guest))?;
    send.ends_with(1, PATIENCE)?;
    send.process
        .wait_for_stderr(&b.fingerprint().to_string(), PATIENCE)?;
    guest.runs_here()
}

#[test]
fn a_seed_that_cannot_be_read_is_refused_before_anyone_is_waited_for() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    for (seed, why) in [
        (b.path("missing.img"), "missing.img"),
        (b.path("."), "neither a file nor a block device"),
    ] {
        let mut command = b.command("recv", &a)?;
        command
            .args(["--listen", "127.0.0.1:0", "--workload"])
            .arg(b.path("never.sock"))
            .arg("--seed")
            .arg(seed);
        let output = command.output()?;
        ensure!(output.status.code() == Some(1), "{}", output.status);
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(said.contains(why) && !said.contains("listening"), "{said}");
    }
    Ok(())
}

#[test]
fn without_a_peer_nothing_begins() -> Result<()> {
    let a = Host::new()?;
    let guest = Guest::start(&a, 16)?;
    let mut command = Command::new(hybridmig_binary()?);
    command
        .args(["send", "--to", "127.0.0.1:9", "--workload", &guest.socket()])
        .arg("--identity")
        .arg(a.path("identity.pem"));
    let output = command.output()?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        said.contains("nobody is trusted") && said.contains("--peer"),
        "{said}"
    );
    guest.runs_here()
}

#[test]
fn an_unreachable_destination_is_named() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let guest = Guest::start(&a, 16)?;
    let nobody = free_udp_address()?;
    let mut send = a.send(&b, nobody, send_words(&guest))?;
    send.ends_with(1, PATIENCE)?;
    send.process
        .wait_for_stderr(&nobody.to_string(), PATIENCE)?;
    guest.runs_here()
}

#[test]
fn garbage_on_the_port_does_no_harm() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let guest = Guest::start(&a, 16)?;
    let mut recv = recv(&b, &a)?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    for seed in 0..200_u32 {
        let mut junk = vec![0_u8; 1 + (seed as usize * 7) % 1400];
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        for byte in &mut junk {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            *byte = state as u8;
        }
        socket.send_to(&junk, recv.address)?;
    }
    let mut send = a.send(&b, recv.address, send_words(&guest))?;
    send.ends_with(0, PATIENCE)?;
    recv.process.succeed(PATIENCE)?;
    Control::connect(&b.path("arrived.sock"))?.stop()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_another_version_is_told_both_versions() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let recv = tokio::task::block_in_place(|| recv(&b, &a))?;
    let identity = Identity::load(&a.path("identity.pem"))?;
    let trust = Trust::new().with_peer(b.fingerprint());
    let endpoint = Endpoint::client(&identity, trust, &TransportConfig::default())?;
    let link = endpoint.connect(recv.address).await?;
    let (mut sender, mut receiver) = link.open_control().await?;
    let hello = Message::Hello {
        versions: vec![4242],
        features: 0,
        software: "a later hybridmig".to_owned(),
        session: SessionId([1; 8]),
        resume: false,
    };
    sender.send(&hello).await?;
    let Message::Refuse(refusal) = receiver.recv().await? else {
        bail!("no refusal came")
    };
    ensure!(refusal.code == RefusalCode::Version, "{refusal:?}");
    let text = refusal.to_string();
    ensure!(text.contains("4242") && text.contains('1'), "{text}");
    Ok(())
}

#[test]
fn a_second_sender_is_told_that_the_destination_is_busy() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let guest = Guest::start(&a, 64)?;
    let recv = recv(&b, &a)?;
    let relay = relay(recv.address, SLOW_LINK, 1)?;
    let mut first = a.send(&b, relay.local_addr(), send_words(&guest))?;
    first.process.wait_for_stderr("pre-copy", PATIENCE)?;

    let c = Host::new()?;
    std::fs::copy(a.path("identity.pem"), c.path("identity.pem"))?;
    let other = Guest::start(&c, 16)?;
    let mut second = c.send(&b, recv.address, send_words(&other))?;
    second.ends_with(3, PATIENCE)?;
    second.process.wait_for_stdout("busy", PATIENCE)?;
    other.runs_here()?;

    first.process.signal(Signal::SIGINT)?;
    first.ends_with(4, PATIENCE)?;
    guest.runs_here()
}

/// Ends one side in the middle of pre-copy and expects the guest to run on.
fn ended_in_precopy(
    act: impl FnOnce(&mut hybridmig_tests::migration::Send, &mut Recv) -> Result<()>,
) -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let guest = Guest::start(&a, 64)?;
    let mut recv = recv(&b, &a)?;
    let relay = relay(recv.address, SLOW_LINK, 1)?;
    let mut send = a.send(&b, relay.local_addr(), send_words(&guest))?;
    send.process.wait_for_stderr("pre-copy", PATIENCE)?;
    act(&mut send, &mut recv)?;
    guest.runs_here()?;
    ensure!(
        Control::connect(&b.path("arrived.sock")).is_err(),
        "a guest was left at the destination"
    );
    Ok(())
}

#[test]
fn sigterm_of_the_source_cancels() -> Result<()> {
    ended_in_precopy(|send, recv| {
        send.process.signal(Signal::SIGTERM)?;
        send.ends_with(4, PATIENCE)?;
        let status = recv.process.wait(PATIENCE)?;
        ensure!(status.code() == Some(4), "recv ended with {status}");
        Ok(())
    })
}

#[test]
fn sigkill_of_the_source_leaves_its_guest_running() -> Result<()> {
    ended_in_precopy(|send, recv| {
        send.process.kill()?;
        // The destination cannot know. Its operator ends it, and does not wait for a source that
        // might come back to ask.
        recv.process.signal(Signal::SIGTERM)?;
        recv.process.wait_for_stderr("once more", PATIENCE)?;
        recv.process.signal(Signal::SIGTERM)?;
        let status = recv.process.wait(PATIENCE)?;
        ensure!(status.code() == Some(4), "recv ended with {status}");
        Ok(())
    })
}

#[test]
fn sigterm_of_the_destination_cancels() -> Result<()> {
    ended_in_precopy(|send, recv| {
        recv.process.signal(Signal::SIGTERM)?;
        send.ends_with(4, PATIENCE)?;
        recv.process.wait(PATIENCE)?;
        Ok(())
    })
}

#[test]
fn a_qmp_socket_of_something_else_is_named() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let path = a.path("not-qmp.sock");
    let listener = UnixListener::bind(&path)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().take(4).flatten() {
            let _ = std::io::Write::write_all(&mut &stream, b"220 mail.example ESMTP\r\n");
        }
    });
    let socket = path.display().to_string();
    let nobody: SocketAddr = free_udp_address()?;
    let mut send = a.send(&b, nobody, ["--qmp", &socket])?;
    send.ends_with(1, PATIENCE)?;
    send.process.wait_for_stderr(&socket, PATIENCE)?;
    Ok(())
}

#[test]
fn vm_of_another_size_or_machine_is_refused() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let config = VmConfig {
        memory_mib: 192,
        checked_mib: 32,
        ..VmConfig::default()
    };
    let source = Vm::boot(&config)?;
    let smaller = VmConfig {
        memory_mib: 128,
        ..config.clone()
    };
    let other = VmConfig {
        machine: "pc".to_owned(),
        ..config.clone()
    };
    for (unlike, word) in [(smaller, "ram"), (other, "machine")] {
        let destination = Vm::start(&unlike.incoming("unlike"))?;
        let qmp = destination.qmp_socket().display().to_string();
        let recv = b.recv(&a, ["--qmp", &qmp])?;
        let qmp = source.qmp_socket().display().to_string();
        let mut send = a.send(&b, recv.address, ["--qmp", &qmp])?;
        send.ends_with(3, PATIENCE)?;
        let said = send.process.stdout().tail(20);
        ensure!(
            said.to_lowercase().contains(word),
            "no word of '{word}' in: {said}"
        );
        source.console().wait_ticks(10, PATIENCE)?;
    }
    ensure!(source.verify()?.bad == 0, "the guest has wrong pages");
    Ok(())
}
