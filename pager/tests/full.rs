//! A destination without room left: an error that says so, before and after the guest runs, and
//! no signal.

mod common;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::{Fixture, PAGE};
use hybridmig_pager::{
    FaultAnswer, FaultSink, Features, MissingMap, PagerError, Placer, PlacerConfig, Region,
    RegionMemory, attach,
};

/// A tmpfs of its own, unmounted at the end.
struct Tmpfs {
    dir: tempfile::TempDir,
}

impl Tmpfs {
    fn mount(pages: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={}", pages * PAGE);
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(mounted.success());
        Self { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("ram")
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.dir.path())
            .status();
    }
}

struct Nobody;

impl FaultSink for Nobody {
    fn fault(&self, _region: u16, _block: u32) -> FaultAnswer {
        FaultAnswer::Requested
    }

    fn removed(&self, _region: u16, _first: u32, _count: u32) {}

    fn failed(&self, _error: PagerError) {}
}

fn open(path: &Path, pages: usize) -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap();
    file.set_len((pages * PAGE) as u64).unwrap();
    file
}

#[test]
fn no_room_is_an_error_with_the_block() {
    let tmpfs = Tmpfs::mount(64);
    let file = open(&tmpfs.path(), 256);
    // Not close-on-exec: the guest inherits it under the same number.
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file).to_string();
    let memory = Arc::new(RegionMemory::open(file, 0, 0, (256 * PAGE) as u64).unwrap());
    let error = memory.write(0, &vec![1; 256 * PAGE]).unwrap_err();
    let PagerError::OutOfMemory { region: 0, block } = error else {
        panic!("{error:?}");
    };
    assert!((1..=64).contains(&block), "{block}");
    memory.zero(0, 256).unwrap();

    let guest = Fixture::spawn(&["guest", &fd, "256", "0"]);
    assert_eq!(guest.line(), "ready");
    let uffd = attach::attach(guest.pid(), attach::Method::Syscall)
        .unwrap()
        .uffd;
    uffd.handshake(Features::PLACING).unwrap();
    let missing = MissingMap::in_memory(&[256]).unwrap();
    missing.insert(0, &(0..256).collect()).unwrap();
    let region = Region::find(guest.pid(), memory).unwrap();
    let placer = Placer::arm(
        uffd,
        guest.pid(),
        vec![region],
        Arc::new(missing),
        &[],
        Arc::new(Nobody),
        PlacerConfig::default(),
    )
    .unwrap();
    let error = placer.place(0, 0, &vec![1; 256 * PAGE]).unwrap_err();
    let PagerError::OutOfMemory { region: 0, block } = error else {
        panic!("{error:?}");
    };
    // Everything before is in place, the rest is still missing.
    assert!(!placer.missing().contains(0, block - 1) && placer.missing().contains(0, block));
    drop(placer);
}
