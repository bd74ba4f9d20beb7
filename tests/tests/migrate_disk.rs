//! Storage moves with the guest: a Linux guest in an unmodified QEMU, whose checker writes and verifies a
//! disk all the time, moves over a relayed link of 50 ms RTT, in every mode. It must see no I/O error
//! and no wrong block, and run on an ordinary local image in the end, with nothing of ours under it.

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hybridmig_engine::report::Report;
use hybridmig_tests::disk::{image, operations, ticks, wait_sweeps};
use hybridmig_tests::migration::{Host, PATIENCE, Recv, Send, TEST_LINK, relay};
use hybridmig_tests::{Vm, VmConfig, console};
use serde_json::json;
use tempfile::TempDir;

/// How long a migration of some hundred MiB may take; a starved machine takes its time.
const MOVE: Duration = Duration::from_secs(240);

const MIB: u64 = 1 << 20;
/// Length of the disk that is checked: sparse, what the checker uses is spread over all of it.
const ROOT: u64 = 2048 * MIB;
/// Length of a disk that nobody writes, and of what is in it.
const DATA: u64 = 256 * MIB;
const DATA_HELD: u64 = 24 * MIB;

/// Which disks the guest writes and verifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checks {
    Root,
    Nothing,
}

/// The images of one side.
struct Images {
    folder: TempDir,
}

impl Images {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir().context("no folder for images")?;
        image(folder.path(), "root.img", ROOT)?;
        image(folder.path(), "data.img", DATA)?;
        Ok(Self { folder })
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root.img")
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data.img")
    }

    /// Contents that do not compress, in pieces that lie apart.
    fn fill_data(&self) -> Result<()> {
        let file = File::options().write(true).open(self.data())?;
        let mut word = 0x9e37_79b9_7f4a_7c15_u64;
        let mut piece = vec![0; MIB as usize];
        for index in 0..DATA_HELD / MIB {
            for chunk in piece.chunks_exact_mut(8) {
                // xorshift64*
                word ^= word >> 12;
                word ^= word << 25;
                word ^= word >> 27;
                chunk.copy_from_slice(&word.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
            }
            file.write_all_at(&piece, index * (DATA / (DATA_HELD / MIB)))?;
        }
        Ok(())
    }

    fn guest(&self, name: &str, checks: Checks) -> VmConfig {
        let drive = |id: &str, path: &Path| {
            [
                "-drive".to_owned(),
                format!(
                    "if=none,id={id},format=raw,file={},discard=unmap",
                    path.display()
                ),
                "-device".to_owned(),
                format!("virtio-blk-pci,id={id},drive={id}"),
            ]
        };
        VmConfig {
            name: name.to_owned(),
            memory_mib: 160,
            checked_mib: 16,
            dirty_rate: 4.0,
            kernel_arguments: match checks {
                Checks::Root => "diskcheck.dev=vda diskcheck.mb=8 diskcheck.rate=2".to_owned(),
                Checks::Nothing => String::new(),
            },
            qemu_arguments: [drive("root", &self.root()), drive("data", &self.data())].concat(),
            ..VmConfig::default()
        }
    }
}

/// Both sides of a migration, the guest at the source.
struct Scene {
    hosts: (Host, Host),
    images: (Images, Images),
    source: Vm,
    destination: Vm,
}

impl Scene {
    fn new(checks: Checks) -> Result<Self> {
        let hosts = (Host::new()?, Host::new()?);
        let images = (Images::new()?, Images::new()?);
        images.0.fill_data()?;
        let source = Vm::boot(&images.0.guest("source", checks))?;
        if checks == Checks::Root {
            wait_sweeps(source.console(), &["vda"])?;
        }
        let destination = images.1.guest("destination", checks);
        let destination = Vm::start(&destination.incoming("destination"))?;
        Ok(Self {
            hosts,
            images,
            source,
            destination,
        })
    }

    fn recv(&self, arguments: &[&str]) -> Result<Recv> {
        let qmp = self.destination.qmp_socket().display().to_string();
        let mut words = vec!["--qmp", &qmp];
        words.extend(arguments);
        self.hosts.1.recv(&self.hosts.0, words)
    }

    /// Moves the guest and returns the source's report.
    fn migrate(&self, arguments: &[&str]) -> Result<Report> {
        self.migrate_to(self.recv(&[])?, arguments)
    }

    fn migrate_to(&self, mut recv: Recv, arguments: &[&str]) -> Result<Report> {
        let relay = relay(recv.address, TEST_LINK, 7)?;
        let qmp = self.source.qmp_socket().display().to_string();
        let mut words = vec!["--qmp", &qmp];
        words.extend(arguments);
        let mut send = self
            .hosts
            .0
            .send(&self.hosts.1, relay.local_addr(), words)?;
        let ended = send.ends_with(0, MOVE);
        println!("{}", send.process.stdout().tail(40));
        if let Err(error) = ended {
            return Err(error.context(recv.process.stderr().tail(30)));
        }
        recv.process.succeed(PATIENCE)?;
        println!("{}", recv.process.stdout().tail(40));
        relay.stop();
        send.report()
    }

    /// The guest lives on, right in memory and on its disk, without any help.
    fn alive_and_right(&mut self) -> Result<()> {
        wait_sweeps(self.destination.console(), &["vda"])?;
        let consoles = [self.source.console(), self.destination.console()];
        println!("longest gap {:?}", console::longest_gap(&consoles));
        console::one_life(&consoles)?;
        let verified = self.destination.verify()?;
        ensure!(verified.bad == 0, "{} pages are wrong", verified.bad);
        for tick in ticks(self.destination.console()).values() {
            ensure!(tick.bad == 0 && tick.errors == 0, "{tick:?}");
        }
        self.runs_on_local_images()?;
        same_contents(&self.images.0.data(), &self.images.1.data())
    }

    /// Nothing of ours is left in QEMU, and its devices use the operator's images.
    fn runs_on_local_images(&mut self) -> Result<()> {
        let control = self.destination.control();
        let nodes = control.execute("query-named-block-nodes", json!({}))?;
        ensure!(
            !nodes.to_string().contains("hybridmig"),
            "a node of ours is left: {nodes}"
        );
        let devices = control.execute("query-block", json!({}))?.to_string();
        for path in [self.images.1.root(), self.images.1.data()] {
            ensure!(
                devices.contains(&path.display().to_string()),
                "{} is not used: {devices}",
                path.display()
            );
        }
        Ok(())
    }
}

/// The two images are equal, block by block.
fn same_contents(one: &Path, other: &Path) -> Result<()> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    let bytes = one.metadata()?.len();
    ensure!(bytes == other.metadata()?.len(), "of different length");
    let (mut here, mut there) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for offset in (0..bytes).step_by(MIB as usize) {
        one.read_exact_at(&mut here, offset)?;
        other.read_exact_at(&mut there, offset)?;
        ensure!(here == there, "the images differ at {offset}");
    }
    Ok(())
}

fn one_way(arguments: &[&str]) -> Result<Report> {
    let mut scene = Scene::new(Checks::Root)?;
    let report = scene.migrate(arguments)?;
    scene.alive_and_right()?;
    Ok(report)
}

#[test]
fn storage_follows_in_hybrid_mode() -> Result<()> {
    let report = one_way(&["--mode", "hybrid"])?;
    let kinds = report.kinds.context("memory and storage apart")?;
    ensure!(
        kinds.storage.content_blocks > 0 && kinds.storage.bytes() > DATA_HELD,
        "{kinds:?}"
    );
    Ok(())
}

#[test]
fn storage_is_there_before_the_guest_in_precopy_mode() -> Result<()> {
    let report = one_way(&["--mode", "precopy", "--max-downtime", "20s"])?;
    let kinds = report.kinds.context("memory and storage apart")?;
    ensure!(kinds.storage.behind_blocks == 0, "{kinds:?}");
    Ok(())
}

#[test]
fn storage_follows_in_postcopy_mode() -> Result<()> {
    let report = one_way(&["--mode", "postcopy"])?;
    let kinds = report.kinds.context("memory and storage apart")?;
    ensure!(
        kinds.storage.behind_blocks == kinds.storage.content_blocks
            && kinds.storage.pre_copy_bytes == 0,
        "{kinds:?}"
    );
    Ok(())
}

/// Every disk by its own word: one all before the resume, the other not at all.
#[test]
fn disks_move_as_the_operator_says() -> Result<()> {
    let report = one_way(&["--disk", "data=copy", "--disk", "root=0"])?;
    let kinds = report.kinds.context("memory and storage apart")?;
    ensure!(
        kinds.storage.pre_copy_bytes >= DATA_HELD && kinds.storage.behind_blocks > 0,
        "{kinds:?}"
    );
    Ok(())
}

/// The receiver is killed while storage is missing: the guest's I/O waits, and goes on when another
/// receiver has taken over, with nothing lost that it had been answered.
#[test]
fn a_killed_receiver_is_followed_by_another() -> Result<()> {
    let mut scene = Scene::new(Checks::Root)?;
    let mut recv = scene.recv(&[])?;
    let address = recv.address;
    // Slow enough for storage to be missing when the receiver dies.
    let relay = relay(address, "delay 25ms rate 40mbit loss 0.5% limit 50ms", 7)?;
    let qmp = scene.source.qmp_socket().display().to_string();
    let words = ["--qmp", &qmp, "--mode", "postcopy"];
    let (a, b) = &scene.hosts;
    let mut send = a.send(b, relay.local_addr(), words)?;
    recv.process.wait_for_stderr("post-copy: ", PATIENCE)?;
    // It serves for a while first: what was answered then must hold.
    wait_ops(&scene.destination, 10)?;
    recv.process.kill()?;
    follow_a_killed_receiver(&scene, address, &mut send)?;
    let report = send.report()?;
    let kinds = report.kinds.context("memory and storage apart")?;
    ensure!(kinds.storage.post_copy_bytes > 0, "{kinds:?}");
    relay.stop();
    scene.alive_and_right()
}

/// The receiver is killed when everything is here and memory has been let go of, but the source has not been told and
/// the guest's disks are still ours in part: another one brings that to its end.
#[test]
fn a_receiver_killed_while_it_finishes_is_followed_by_another() -> Result<()> {
    let mut scene = Scene::new(Checks::Root)?;
    let mut recv = scene.recv(&[])?;
    let address = recv.address;
    let relay = relay(address, TEST_LINK, 7)?;
    let qmp = scene.source.qmp_socket().display().to_string();
    let (a, b) = &scene.hosts;
    let mut send = a.send(b, relay.local_addr(), ["--qmp", &qmp, "--mode", "postcopy"])?;
    recv.process.wait_for_stderr("post-copy: ", PATIENCE)?;
    // Whoever else uses a node of ours keeps it from being removed.
    let control = scene.destination.control();
    control.execute(
        "blockdev-add",
        json!({ "driver": "raw", "node-name": "another-user", "file": "hybridmig-disk-1", "read-only": true }),
    )?;
    recv.process.wait_for_stderr("trying again", MOVE)?;
    recv.process.kill()?;
    control.execute("blockdev-del", json!({ "node-name": "another-user" }))?;
    follow_a_killed_receiver(&scene, address, &mut send)?;
    relay.stop();
    scene.alive_and_right()
}

/// Does what `resolve` says after a receiver at this address was killed, until both sides have ended well.
fn follow_a_killed_receiver(scene: &Scene, address: SocketAddr, send: &mut Send) -> Result<()> {
    let (a, b) = &scene.hosts;
    let (_, said) = b.resolve(&[])?;
    let folder = said
        .split("--take-over ")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .with_context(|| format!("resolve names no folder: {said}"))?;
    let mut second = b.recv_at(a, address, ["--take-over", folder])?;
    send.ends_with(0, MOVE)
        .with_context(|| second.process.stderr().tail(30))?;
    second.process.succeed(PATIENCE)?;
    ensure!(!Path::new(folder).exists(), "{folder} is left");
    Ok(())
}

/// Waits until the guest here has done so many more operations on its disk.
fn wait_ops(vm: &Vm, more: u64) -> Result<()> {
    let wanted = operations(vm.console()) + more;
    let console = vm.console();
    while operations(console) < wanted {
        console.wait_after(console.transcript().end(), "DISK ", PATIENCE)?;
    }
    Ok(())
}

/// The guest goes back to where it came from, where its old images lie: of its storage only what has
/// changed meanwhile travels.
#[test]
fn the_way_back_costs_the_changes_only() -> Result<()> {
    let mut scene = Scene::new(Checks::Nothing)?;
    let there = scene.migrate(&[])?;
    let there = there.kinds.context("memory and storage apart")?;
    ensure!(there.storage.bytes() >= DATA_HELD, "{there:?}");
    // One in a hundred of the blocks that have content.
    for index in 0..=DATA_HELD / 65_536 / 100 {
        let at = index * 4 * (DATA / (DATA_HELD / MIB)) + 128 * 1024;
        let write = format!("qemu-io data \"write -P {} {at} 64k\"", index + 1);
        scene
            .destination
            .control()
            .execute("human-monitor-command", json!({ "command-line": write }))?;
        let mut byte = [0];
        File::open(scene.images.1.data())?.read_exact_at(&mut byte, at)?;
        ensure!(u64::from(byte[0]) == index + 1, "QEMU has not written");
    }
    let home = Images::new()?;
    let old = [scene.images.0.root(), scene.images.0.data()];
    let back = home.guest("home", Checks::Nothing).incoming("home");
    let mut scene = Scene {
        source: scene.destination,
        destination: Vm::start(&back)?,
        hosts: (scene.hosts.1, scene.hosts.0),
        images: (scene.images.1, home),
    };
    let [root, data] = old.map(|path| path.display().to_string());
    let recv = scene.recv(&["--seed", &root, "--seed", &data])?;
    let report = scene.migrate_to(recv, &[])?;
    let kinds = report.kinds.context("memory and storage apart")?;
    println!(
        "storage there {:?}, back {:?}",
        there.storage, kinds.storage
    );
    ensure!(
        kinds.storage.bytes() * 20 < there.storage.bytes(),
        "{kinds:?}"
    );
    scene.runs_on_local_images()?;
    same_contents(&scene.images.0.data(), &scene.images.1.data())?;
    let verified = scene.destination.verify()?;
    ensure!(verified.bad == 0, "{} pages are wrong", verified.bad);
    Ok(())
}
