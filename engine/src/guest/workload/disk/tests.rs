//! Tests of the way to the disk: what waits for a server, and when the server may go.

use std::sync::mpsc::{RecvTimeoutError, channel};

use hybridmig_pager::disk::{DiskImage, DiskOptions, NbdOptions, NbdServer};
use hybridmig_pager::{FaultAnswer, FaultSink, PagerError};

use super::io::Act;
use super::*;
use crate::blocks::BlockSet;

const BYTES: u64 = MIN_DISK_BYTES;

/// How long something is seen not to happen.
const WHILE: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(30);

struct NoFaults;

impl FaultSink for NoFaults {
    fn fault(&self, _region: u16, _block: u32) -> FaultAnswer {
        FaultAnswer::Requested
    }

    fn removed(&self, _region: u16, _first: u32, _count: u32) {}

    fn failed(&self, error: PagerError) {
        panic!("{error}");
    }
}

fn disk(directory: &Path) -> Arc<Disk> {
    Arc::new(Disk::create(&directory.join("disk"), BYTES, false).unwrap())
}

fn served(directory: &Path) -> Served {
    Served {
        socket: directory.join("nbd"),
        export: "disk".into(),
        map: directory.join("map"),
    }
}

/// The image that a pager makes of the disk's file, with its block 3 missing.
fn image(directory: &Path) -> Arc<DiskImage> {
    let image = DiskImage::create(&DiskOptions {
        region: 1,
        image: directory.join("disk"),
        map: directory.join("map"),
        bytes: BYTES,
        block_size: BLOCK as u32,
        overwrite: true,
    })
    .unwrap();
    let missing: BlockSet = [3].into_iter().collect();
    image.arm(&missing, Arc::new(NoFaults)).unwrap();
    image
}

fn server(directory: &Path, image: &Arc<DiskImage>) -> NbdServer {
    let options = NbdOptions {
        socket: directory.join("nbd"),
        export: "disk".into(),
        read_only: false,
    };
    NbdServer::start(&options, Arc::clone(image)).unwrap()
}

#[test]
fn the_file_may_be_made_but_not_taken() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, b"").unwrap();
    drop(Disk::create(&path, BYTES, false).unwrap());
    let error = Disk::create(&path, BYTES, false).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    Disk::create(&path, BYTES, true).unwrap();
}

#[test]
fn a_server_that_is_not_there_is_waited_for_until_the_file_will_do() {
    let directory = tempfile::tempdir().unwrap();
    let disk = disk(directory.path());
    disk.serve(served(directory.path()));
    let (done, result) = channel();
    let reader = Arc::clone(&disk);
    let thread = std::thread::spawn(move || {
        let mut data = vec![1; SECTOR];
        let read = DiskIo::new(reader).perform(Act::Read(0, &mut data), || false);
        done.send(read.map(|()| data)).unwrap();
    });
    assert_eq!(
        result.recv_timeout(WHILE).err(),
        Some(RecvTimeoutError::Timeout)
    );
    disk.unserve(LONG).unwrap();
    assert_eq!(result.recv_timeout(LONG).unwrap().unwrap(), [0; SECTOR]);
    thread.join().unwrap();

    // Or until nobody wants it any more.
    disk.serve(served(directory.path()));
    let mut data = vec![1; SECTOR];
    let error = DiskIo::new(disk).perform(Act::Read(0, &mut data), || true);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Interrupted);
}

#[test]
fn a_server_must_stay_while_an_operation_is_under_way_and_another_may_follow_it() {
    let directory = tempfile::tempdir().unwrap();
    let disk = disk(directory.path());
    let image = image(directory.path());
    let first = server(directory.path(), &image);
    disk.serve(served(directory.path()));
    let mut io = DiskIo::new(Arc::clone(&disk));
    io.perform(Act::Write(0, &[7; SECTOR]), || false).unwrap();
    io.perform(Act::Flush, || false).unwrap();
    let written: BlockSet = [0].into_iter().collect();
    assert_eq!(disk.marks.take_written(), written);

    let (done, result) = channel();
    let thread = std::thread::spawn(move || {
        let mut data = vec![1; SECTOR];
        let read = io.perform(Act::Read(3 * BLOCK as u64, &mut data), || false);
        done.send(read.map(|()| data)).unwrap();
    });
    assert!(result.recv_timeout(WHILE).is_err(), "block 3 is missing");
    assert!(disk.unserve(WHILE).unwrap_err().contains("missing"));
    assert_eq!(disk.served(), Some(served(directory.path())));
    // The reader asks the next server again.
    first.stop();
    assert!(result.recv_timeout(WHILE).is_err());
    let second = server(directory.path(), &image);
    image.place(3, &vec![9; BLOCK]).unwrap();
    assert_eq!(result.recv_timeout(LONG).unwrap().unwrap(), [9; SECTOR]);
    thread.join().unwrap();

    disk.unserve(LONG).unwrap();
    second.stop();
    let mut data = vec![0; SECTOR];
    let mut io = DiskIo::new(disk);
    io.perform(Act::Read(0, &mut data), || false).unwrap();
    assert_eq!(data, [7; SECTOR]);
}

#[test]
fn an_error_of_the_storage_is_one() {
    let directory = tempfile::tempdir().unwrap();
    let disk = disk(directory.path());
    let image = image(directory.path());
    let _server = server(directory.path(), &image);
    disk.serve(served(directory.path()));
    disk.file.set_len(0).unwrap();
    let mut data = vec![0; SECTOR];
    let error = DiskIo::new(disk).perform(Act::Read(0, &mut data), || false);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Other);
}
