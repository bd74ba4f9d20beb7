//! The disks of a real Linux guest under QEMU (TCG): read and tracked at the source, switched at the
//! destination. No session, no network. What decides is the guest's own disk checker, and
//! the image files.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hybridmig_engine::guest::qemu::disk::{
    BLOCK_SIZE, DestinationDisks, DiskChoice, DiskOption, SourceDisks, WantedDisk,
};
use hybridmig_engine::guest::qemu::process::QemuProcess;
use hybridmig_engine::guest::qemu::qmp::Qmp;
use hybridmig_tests::disk::{image, make_qcow2, operations, serve, wait_sweeps, words};
use hybridmig_tests::keeper::Kept;
use hybridmig_tests::{Vm, VmConfig, console};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// The user without any rights, on Debian.
const NOBODY: u32 = 65534;

/// A small guest with these disks, each of which `disks` is checked.
fn guest(name: &str, disks: &str, arguments: &[String]) -> VmConfig {
    VmConfig {
        name: name.to_owned(),
        memory_mib: 128,
        checked_mib: 4,
        dirty_rate: 1.0,
        kernel_arguments: format!("diskcheck.dev={disks} diskcheck.mb=2 diskcheck.rate=1"),
        qemu_arguments: arguments.to_vec(),
        ..VmConfig::default()
    }
}

/// Whether the QEMU that the tests run survives exports of disks that an iothread uses.
fn iothreads_are_safe(qmp: &Qmp) -> bool {
    qmp.version().major >= 10
}

fn connect(vm: &Vm) -> Result<Arc<Qmp>> {
    Ok(Arc::new(Qmp::connect(vm.qmp_socket())?))
}

fn choose(text: &str) -> DiskChoice {
    text.parse::<DiskOption>().into_iter().collect()
}

/// Copies made of blocks alone, as a destination makes them.
struct Copies(Vec<File>);

impl Copies {
    fn new(disks: &SourceDisks) -> Result<Self> {
        let files = disks.disks().iter().map(|disk| {
            let file = tempfile::tempfile()?;
            file.set_len(u64::from(disk.blocks()) * u64::from(BLOCK_SIZE))?;
            Ok(file)
        });
        files.collect::<Result<_>>().map(Self)
    }

    /// Reads from several threads at once, as the engine does.
    fn take(
        &self,
        source: &SourceDisks,
        sets: &[hybridmig_engine::blocks::BlockSet],
    ) -> Result<u64> {
        let blocks: Vec<(usize, u32)> = sets
            .iter()
            .enumerate()
            .flat_map(|(disk, set)| set.iter().map(move |block| (disk, block)))
            .collect();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|thread| {
                    let mine = blocks.iter().skip(thread).step_by(3);
                    scope.spawn(move || -> Result<()> {
                        let mut buf = vec![0; BLOCK_SIZE as usize];
                        for (disk, block) in mine {
                            source.read(*disk, *block, &mut buf)?;
                            let at = u64::from(*block) * u64::from(BLOCK_SIZE);
                            self.0[*disk].write_all_at(&buf, at)?;
                        }
                        Ok(())
                    })
                })
                .collect();
            for thread in threads {
                thread.join().expect("reading does not panic")?;
            }
            Ok(blocks.len() as u64)
        })
    }

    /// Bytes of a disk's copy.
    fn bytes(&self, disk: usize, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.0[disk].read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}

/// Numbers of the blocks that differ.
fn differing(a: &[u8], b: &[u8]) -> Vec<usize> {
    let size = BLOCK_SIZE as usize;
    let blocks = a.chunks(size).zip(b.chunks(size)).enumerate();
    blocks
        .filter(|(_, (a, b))| a != b)
        .map(|(index, _)| index)
        .collect()
}

/// What of ours is in a QEMU.
fn ours(vm: &mut Vm) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for command in [
        "query-block-exports",
        "query-block",
        "query-named-block-nodes",
    ] {
        let answer = vm.control().execute(command, json!({}))?.to_string();
        if answer.contains("hybridmig-") {
            found.push(answer);
        }
    }
    Ok(found)
}

/// Saves the guest's state to nowhere; the source has then let go of its images.
fn migrate_to(vm: &mut Vm, uri: &str) -> Result<()> {
    vm.control().execute("migrate", json!({ "uri": uri }))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = vm.control().execute("query-migrate", json!({}))?;
        match answer["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => anyhow::bail!("the migration failed: {answer}"),
            _ => ensure!(Instant::now() < deadline, "the migration is slow: {answer}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn rounds_find_every_write_and_nothing_of_ours_stays() -> Result<()> {
    let folder = tempfile::tempdir()?;
    // One whose last block is short, one in qcow2, one that can only be read, and an empty drive.
    let odd = 64 * MIB + 24 * 512;
    let raw = image(folder.path(), "raw", odd)?;
    let qcow = make_qcow2(folder.path(), "qcow2", 96 * MIB)?;
    let fixed = image(folder.path(), "fixed", 8 * MIB)?;
    let arguments = words(&format!(
        "-drive if=none,id=first,format=raw,cache=none,file={} -device virtio-blk-pci,drive=first,id=root \
         -blockdev driver=file,node-name=f,filename={} -blockdev driver=qcow2,node-name=second,file=f \
         -device virtio-blk-pci,drive=second \
         -drive if=none,id=third,format=raw,readonly=on,file={} -device virtio-blk-pci,drive=third \
         -drive if=none,id=cd,media=cdrom -device ide-cd,drive=cd",
        raw.display(),
        qcow.display(),
        fixed.display()
    ));
    let mut vm = Vm::boot(&guest("source", "vda,vdb", &arguments))?;
    wait_sweeps(vm.console(), &["vda", "vdb"])?;
    let qmp = connect(&vm)?;
    let source = SourceDisks::open(&qmp, &DiskChoice::default())?;
    let facts: Vec<(&str, u64, &str)> = source
        .disks()
        .iter()
        .map(|disk| (disk.name.as_str(), disk.bytes, disk.format.as_str()))
        .collect();
    ensure!(
        facts == [("root", odd, "raw"), ("second", 96 * MIB, "qcow2")],
        "{facts:?}"
    );
    let found = format!("{:?}", source.findings());
    ensure!(
        found.contains("'third'") && found.contains("read-only"),
        "{found}"
    );
    ensure!(found.contains("'cd' is empty"), "{found}");

    let copies = Copies::new(&source)?;
    let content = source.start()?;
    // 2 MiB of each disk have been written, in 512 places that are 128 or 192 KiB apart.
    for set in &content {
        ensure!(
            (512..600).contains(&set.len()),
            "{} blocks with content",
            set.len()
        );
    }
    copies
        .take(&source, &content)
        .with_context(|| format!("QEMU says: {:?}", vm.stderr()))?;
    ensure!(source.accessed()[0].is_empty(), "cache=none has a cache");
    let mut rounds = 0;
    while rounds < 5 {
        let before = operations(vm.console());
        vm.console()
            .wait_after(vm.console().transcript().end(), "DISK ", PATIENCE)?;
        if operations(vm.console()) == before {
            continue;
        }
        rounds += 1;
        let began = Instant::now();
        let dirty = source.take_dirty()?;
        let took = began.elapsed();
        let blocks = copies.take(&source, &dirty)?;
        eprintln!("round {rounds}: {blocks} blocks, found in {took:?}");
    }
    let began = Instant::now();
    vm.control().execute("stop", json!({}))?;
    let stopped = began.elapsed();
    let dirty = source.take_dirty()?;
    eprintln!(
        "stop {stopped:?}, last round {:?}",
        began.elapsed().saturating_sub(stopped)
    );
    copies.take(&source, &dirty)?;
    // On a stopped guest that was final.
    let began = Instant::now();
    ensure!(
        source.take_dirty()?.iter().all(|set| set.is_empty()),
        "a stopped guest writes"
    );
    eprintln!("a round without writes {:?}", began.elapsed());

    // The raw image behind QEMU's back; qcow2 block by block.
    let wrong = differing(&copies.bytes(0, odd)?, &std::fs::read(&raw)?);
    ensure!(wrong.is_empty(), "raw blocks {wrong:?} differ");
    let whole = Copies::new(&source)?;
    let all: Vec<_> = source
        .disks()
        .iter()
        .map(|disk| (0..disk.blocks()).collect())
        .collect();
    let began = Instant::now();
    let blocks = whole.take(&source, &all)?;
    eprintln!("{blocks} blocks read in {:?}", began.elapsed());
    let wrong = differing(&copies.bytes(1, 96 * MIB)?, &whole.bytes(1, 96 * MIB)?);
    ensure!(wrong.is_empty(), "qcow2 blocks {wrong:?} differ");

    // Reading goes on when QEMU has let go of the images.
    migrate_to(&mut vm, "exec:cat >/dev/null")?;
    source.after_state_saved()?;
    ensure!(
        source.take_dirty()?.iter().all(|set| set.is_empty()),
        "saving writes"
    );
    let late = Copies::new(&source)?;
    late.take(&source, &all)?;
    for (index, disk) in source.disks().iter().enumerate() {
        let wrong = differing(
            &late.bytes(index, disk.bytes)?,
            &copies.bytes(index, disk.bytes)?,
        );
        ensure!(wrong.is_empty(), "blocks {wrong:?} of disk {index} differ");
    }
    ensure!(vm.control().status()? == "postmigrate");

    // The guest stays after all.
    vm.control().execute("cont", json!({}))?;
    source.stop();
    source.stop();
    ensure!(
        source
            .read(0, 0, &mut vec![0; BLOCK_SIZE as usize])
            .is_err()
    );
    let left = ours(&mut vm)?;
    ensure!(left.is_empty(), "{left:?}");
    wait_sweeps(vm.console(), &["vda", "vdb"])?;
    // The server is gone as well, and a second migration may try.
    source.start()?;
    drop(source);
    let address = json!({ "type": "unix", "data": { "path": folder.path().join("free") } });
    vm.control()
        .execute("nbd-server-start", json!({ "addr": address }))?;
    Ok(())
}

#[test]
fn holes_cost_nothing_and_the_page_cache_tells_what_was_used() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), "large", 4096 * MIB)?;
    let file = File::options().read(true).write(true).open(&path)?;
    file.write_all_at(&[7; 10_000], 1024 * MIB)?;
    // What is on the disk can leave the cache, and does so when the watch begins.
    file.sync_all()?;
    let arguments = words(&format!(
        "-drive if=virtio,format=raw,file={}",
        path.display()
    ));
    let vm = Vm::boot(&guest("source", "", &arguments))?;
    let source = SourceDisks::open(&connect(&vm)?, &DiskChoice::default())?;
    ensure!(source.disks()[0].name == "virtio0", "{:?}", source.disks());
    let began = Instant::now();
    let content = source.start()?;
    eprintln!("start of a 4 GiB disk {:?}", began.elapsed());
    let first = (1024 * MIB / u64::from(BLOCK_SIZE)) as u32;
    ensure!(content[0].iter().eq([first]), "{content:?}");
    // The guest's own way to its disk: QEMU reads the file.
    file.read_exact_at(&mut [0; 4096], 1024 * MIB)?;
    let cached = &source.accessed()[0];
    ensure!(
        cached.contains(first) && cached.len() < 1000,
        "{} blocks cached",
        cached.len()
    );
    ensure!(source.take_dirty()?[0].is_empty());
    Ok(())
}

#[test]
fn what_stands_in_the_way_is_said_and_a_killed_send_is_cleaned_up_after() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), "disk", 16 * MIB)?;
    let arguments = words(&format!(
        "-blockdev driver=file,node-name=disk,filename={} -device virtio-blk-pci,drive=disk",
        path.display()
    ));
    let mut vm = Vm::boot(&guest("source", "", &arguments))?;
    let qmp = connect(&vm)?;
    let error = SourceDisks::open(&qmp, &choose("root=skip"))
        .map(drop)
        .unwrap_err();
    ensure!(
        error.to_string().contains("'root'") && error.to_string().contains("disk"),
        "{error}"
    );
    let skipped = SourceDisks::open(&qmp, &choose("disk=skip"))?;
    ensure!(skipped.disks().is_empty() && skipped.start()?.is_empty());
    ensure!(format!("{:?}", skipped.findings()).contains("same storage"));

    let address = json!({ "type": "unix", "data": { "path": folder.path().join("nbd") } });
    vm.control()
        .execute("nbd-server-start", json!({ "addr": address }))?;
    let source = SourceDisks::open(&qmp, &DiskChoice::default())?;
    let error = source.start().map(drop).unwrap_err();
    ensure!(error.to_string().contains("nbd-server-stop"), "{error}");
    ensure!(ours(&mut vm)?.is_empty());
    vm.control().execute("nbd-server-stop", json!({}))?;

    source.start()?;
    ensure!(!ours(&mut vm)?.is_empty());
    // As if killed: nothing is tidied up, until the next one starts.
    std::mem::forget(source);
    let left = listening_folder(&vm)?;
    ensure!(left.exists());
    let source = SourceDisks::open(&qmp, &DiskChoice::default())?;
    source.start()?;
    ensure!(!left.exists() && listening_folder(&vm)?.exists());
    // A snapshot would take the writes elsewhere.
    let overlay = make_qcow2(folder.path(), "overlay", 16 * MIB)?;
    vm.control().execute(
        "blockdev-snapshot-sync",
        json!({
            "node-name": "disk",
            "snapshot-file": overlay,
            "snapshot-node-name": "over",
            "mode": "existing",
        }),
    )?;
    let error = source.take_dirty().map(drop).unwrap_err();
    ensure!(error.to_string().contains("'disk' was changed"), "{error}");
    source.stop();
    Ok(())
}

/// The folder of the socket of our server in a QEMU.
fn listening_folder(vm: &Vm) -> Result<PathBuf> {
    let mut own = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{}/fd", vm.pid()))? {
        own.push(std::fs::read_link(entry?.path())?.display().to_string());
    }
    let sockets = std::fs::read_to_string(format!("/proc/{}/net/unix", vm.pid()))?;
    let socket = sockets.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let held = own.contains(&format!("socket:[{}]", words.get(6)?));
        words
            .get(7)
            .filter(|path| held && path.ends_with("/nbd"))
            .filter(|path| path.contains("hybridmig-nbd-"))
            .map(|path| PathBuf::from(*path))
    });
    let socket = socket.context("QEMU has no server of ours")?;
    Ok(socket
        .parent()
        .context("a socket is in a folder")?
        .to_owned())
}

#[test]
fn an_unprivileged_qemu_exports_on_a_socket_that_it_cannot_reach() -> Result<()> {
    // Needs root to become someone else.
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = image(folder.path(), "disk", 4 * MIB)?;
    File::options()
        .write(true)
        .open(&path)?
        .write_all_at(b"content", MIB)?;
    for owned in [folder.path(), &path] {
        std::os::unix::fs::chown(owned, Some(NOBODY), Some(NOBODY))?;
    }
    let socket = folder.path().join("qmp");
    let mut command = Command::new("qemu-system-x86_64");
    command.uid(NOBODY).gid(NOBODY).args(words(&format!(
        "-nodefaults -display none -machine q35 -m 64 -sandbox on -qmp unix:{},server=on,wait=off \
         -drive if=virtio,id=disk,format=raw,file={}",
        socket.display(),
        path.display()
    )));
    let _qemu = Kept::start("nobody", command)?;
    console::connect(&socket, PATIENCE)?;
    let source = SourceDisks::open(&Arc::new(Qmp::connect(&socket)?), &DiskChoice::default())?;
    let content = source.start()?;
    let block = (MIB / u64::from(BLOCK_SIZE)) as u32;
    ensure!(content[0].iter().eq([block]), "{content:?}");
    let mut buf = vec![0; BLOCK_SIZE as usize];
    source.read(0, block, &mut buf)?;
    ensure!(buf.starts_with(b"content\0"));
    ensure!(source.take_dirty()?[0].is_empty());
    source.stop();
    // It can be started again, so the server is gone.
    source.start().map(drop).map_err(Into::into)
}

/// Modes in which QEMU has a file open: whether one is writable.
fn locks(vm: &Vm, path: &Path) -> Result<Vec<String>> {
    let mut locks = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{}/fd", vm.pid()))? {
        let entry = entry?;
        if std::fs::read_link(entry.path()).is_ok_and(|target| target == path) {
            let info = format!("/proc/{}/fdinfo/{}", vm.pid(), entry.file_name().display());
            let info = std::fs::read_to_string(info)?;
            locks.extend(
                info.lines()
                    .filter(|line| line.starts_with("lock:"))
                    .map(str::to_owned),
            );
        }
    }
    Ok(locks)
}

fn destination_arguments(images: &[PathBuf]) -> Vec<String> {
    words(&format!(
        "-object iothread,id=thread \
         -drive if=none,id=first,format=raw,cache=none,discard=unmap,file={} \
         -device virtio-blk-pci,drive=first,id=root \
         -blockdev driver=file,node-name=f,filename={} -blockdev driver=raw,node-name=second,file=f \
         -device virtio-blk-pci,drive=second,iothread=thread",
        images[0].display(),
        images[1].display()
    ))
}

#[test]
fn disks_are_switched_to_a_server_and_back_under_the_guest() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let images = |kind: &str| -> Result<Vec<PathBuf>> {
        [32 * MIB, 48 * MIB]
            .iter()
            .enumerate()
            .map(|(index, bytes)| image(folder.path(), &format!("{kind}{index}"), *bytes))
            .collect()
    };
    let (there, here) = (images("there")?, images("here")?);
    let config = guest("source", "vda,vdb", &destination_arguments(&there));
    let mut a = Vm::boot(&config)?;
    wait_sweeps(a.console(), &["vda", "vdb"])?;
    let mut b = Vm::start(&VmConfig {
        qemu_arguments: destination_arguments(&here),
        ..config.incoming("destination")
    })?;
    let qmp = connect(&b)?;
    let process = QemuProcess {
        pid: b.pid() as i32,
    };
    let wanted: Vec<WantedDisk> = [("root", 32), ("second", 48)]
        .map(|(name, mib)| WantedDisk {
            name: name.to_owned(),
            bytes: mib * MIB,
        })
        .into();
    let disks = DestinationDisks::find(&qmp, process, &wanted)?;
    for (disk, image) in disks.disks().iter().zip(&here) {
        ensure!(disk.path == image.canonicalize()?, "{disk:?}");
    }
    ensure!(disks.disks()[0].direct && !disks.disks()[1].direct);

    let (mut server, socket) = serve(folder.path(), &here)?;
    let began = Instant::now();
    for disk in 0..2 {
        disks.attach(&qmp, disk, &socket, &format!("disk{disk}"))?;
    }
    eprintln!("attached two disks in {:?}", began.elapsed());
    // Attaching again, for a new server, is as good; and giving back, if the guest does not come.
    disks.attach(&qmp, 1, &socket, "disk1")?;
    disks.detach(&qmp, 0)?;
    ensure!(!disks.is_attached(&qmp, 0)? && disks.is_attached(&qmp, 1)?);
    disks.attach(&qmp, 0, &socket, "disk0")?;
    // Another process finds the same.
    ensure!(DestinationDisks::find(&qmp, process, &wanted)? == disks);

    // The guest comes: its memory by QEMU's own means, its disks by a copy.
    a.control().execute("stop", json!({}))?;
    for (from, to) in there.iter().zip(&here) {
        let bytes = std::fs::read(from)?;
        File::options()
            .write(true)
            .open(to)?
            .write_all_at(&bytes, 0)?;
    }
    let state = format!("unix:{}", folder.path().join("state").display());
    b.control()
        .execute("migrate-incoming", json!({ "uri": state }))?;
    migrate_to(&mut a, &state)?;
    a.kill()?;
    let deadline = Instant::now() + PATIENCE;
    while b.control().status()? == "inmigrate" {
        ensure!(
            Instant::now() < deadline,
            "the guest does not arrive: {}",
            b.stderr()?
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    b.control().execute("cont", json!({}))?;
    wait_sweeps(b.console(), &["vda", "vdb"])?;
    for (disk, image) in here.iter().enumerate() {
        let held = locks(&b, image)?;
        ensure!(
            held.is_empty(),
            "QEMU holds locks on {}: {held:?}",
            image.display()
        );
        ensure!(disks.is_attached(&qmp, disk)?);
    }
    let error = disks.attach(&qmp, 0, &socket, "disk0").unwrap_err();
    ensure!(error.to_string().contains("guest runs"), "{error}");

    // The server dies. The guest's I/O waits and goes on.
    server.daemon.kill()?;
    let quiet = Duration::from_secs(3);
    std::thread::sleep(quiet);
    let stalled = operations(b.console());
    b.console().wait_ticks(5, PATIENCE)?;
    ensure!(
        operations(b.console()) == stalled,
        "I/O went on without a server"
    );
    let (server, _) = serve(folder.path(), &here)?;
    let began = Instant::now();
    wait_sweeps(b.console(), &["vda", "vdb"])?;
    eprintln!("two sweeps after the server was back {:?}", began.elapsed());

    // Everything is here: the guest gets its own images, while it writes. A process that takes over
    // does it.
    let disks = DestinationDisks::find(&qmp, process, &wanted)?;
    for disk in 0..2 {
        let began = Instant::now();
        disks.detach(&qmp, disk)?;
        eprintln!("detached a disk in {:?}", began.elapsed());
        disks.detach(&qmp, disk)?;
    }
    drop(server);
    let left = ours(&mut b)?;
    ensure!(left.is_empty(), "{left:?}");
    wait_sweeps(b.console(), &["vda", "vdb"])?;
    for image in &here {
        ensure!(
            !locks(&b, image)?.is_empty(),
            "QEMU does not lock {}",
            image.display()
        );
    }
    // What the guest writes is in the local images now: it may leave again.
    let opened = SourceDisks::open(&qmp, &DiskChoice::default());
    let source = if iothreads_are_safe(&qmp) {
        opened?
    } else {
        let error = opened.map(drop).unwrap_err().to_string();
        ensure!(
            error.contains("'second'") && error.contains("iothread"),
            "{error}"
        );
        SourceDisks::open(&qmp, &choose("second=skip"))?
    };
    let copies = Copies::new(&source)?;
    copies.take(&source, &source.start()?)?;
    b.control().execute("stop", json!({}))?;
    copies.take(&source, &source.take_dirty()?)?;
    for (disk, image) in here.iter().enumerate().take(source.disks().len()) {
        let bytes = std::fs::read(image)?;
        let wrong = differing(&copies.bytes(disk, bytes.len() as u64)?, &bytes);
        ensure!(
            wrong.is_empty(),
            "blocks {wrong:?} of {} differ",
            image.display()
        );
    }
    Ok(())
}

#[test]
fn a_destination_is_refused_by_name_or_switched_whatever_its_devices() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let small = image(folder.path(), "small", 16 * MIB)?;
    let qcow = make_qcow2(folder.path(), "qcow2", 32 * MIB)?;
    let fixed = image(folder.path(), "fixed", 8 * MIB)?;
    let mut arguments = words("-nodefaults -display none -machine q35 -m 64 -incoming defer -qmp");
    let socket = folder.path().join("qmp");
    arguments.push(format!("unix:{},server=on,wait=off", socket.display()));
    let threaded = image(folder.path(), "threaded", 16 * MIB)?;
    let stick = image(folder.path(), "stick", 16 * MIB)?;
    arguments.extend(words(&format!(
        "-object iothread,id=thread -device virtio-scsi-pci,iothread=thread -device qemu-xhci \
         -drive if=none,id=scsi,format=raw,file={} -device scsi-hd,id=disk,drive=scsi \
         -blockdev driver=file,node-name=f,filename={} -device usb-storage,id=stick,drive=f",
        threaded.display(),
        stick.display()
    )));
    arguments.extend(words(&format!(
        "-drive if=virtio,id=small,format=raw,file={} -drive if=virtio,id=qcow,format=qcow2,file={} \
         -drive if=virtio,id=fixed,format=raw,readonly=on,file={}",
        small.display(),
        qcow.display(),
        fixed.display()
    )));
    let mut command = Command::new("qemu-system-x86_64");
    command.args(arguments);
    let qemu = Kept::start("destination", command)?;
    console::connect(&socket, PATIENCE)?;
    let qmp = Arc::new(Qmp::connect(&socket)?);
    let process = QemuProcess {
        pid: qemu.pid() as i32,
    };
    // The thread of a SCSI disk is its controller's.
    if !iothreads_are_safe(&qmp) {
        let opened = SourceDisks::open(&qmp, &choose("qcow=skip"));
        let error = opened.map(drop).unwrap_err().to_string();
        ensure!(
            error.contains("'disk'") && error.contains("iothread"),
            "{error}"
        );
        ensure!(
            !error.contains("'stick'") && !error.contains("'small'"),
            "{error}"
        );
    }
    let wanted: Vec<WantedDisk> = [("small", 32), ("qcow", 32), ("fixed", 8), ("absent", 1)]
        .map(|(name, mib)| WantedDisk {
            name: name.to_owned(),
            bytes: mib * MIB,
        })
        .into();
    let error = DestinationDisks::find(&qmp, process, &wanted)
        .unwrap_err()
        .to_string();
    for expected in [
        "'small' (33554432 bytes) has 16777216 bytes here",
        "truncate -s 33554432",
        "'qcow' (33554432 bytes) is qcow2 here",
        "'fixed' (8388608 bytes) is read-only here",
        "'absent' (1048576 bytes) is missing here (there are: ",
    ] {
        ensure!(error.contains(expected), "{expected}: {error}");
    }
    // Every kind of device can be switched, in its own thread, and back.
    let wanted = ["small", "disk", "stick"].map(|name| WantedDisk {
        name: name.to_owned(),
        bytes: 16 * MIB,
    });
    let disks = DestinationDisks::find(&qmp, process, &wanted)?;
    let (_server, served) = serve(folder.path(), &[small, threaded, stick])?;
    for disk in 0..3 {
        disks.attach(&qmp, disk, &served, &format!("disk{disk}"))?;
        ensure!(disks.is_attached(&qmp, disk)?);
    }
    ensure!(DestinationDisks::find(&qmp, process, &wanted)? == disks);
    for disk in 0..3 {
        disks.detach(&qmp, disk)?;
        ensure!(!disks.is_attached(&qmp, disk)?);
    }
    // A server that does not answer changes nothing.
    let nowhere = folder.path().join("nowhere");
    let error = disks.attach(&qmp, 0, &nowhere, "disk0").unwrap_err();
    ensure!(format!("{error:?}").contains("nowhere"), "{error:?}");
    // The monitor serves one client at a time.
    drop(qmp);
    let mut control = hybridmig_tests::Qmp::connect(&socket, PATIENCE)?;
    let nodes: Value = control.execute("query-named-block-nodes", json!({}))?;
    ensure!(!nodes.to_string().contains("hybridmig-"), "{nodes}");
    nodes.as_array().context("a list").map(drop)
}
