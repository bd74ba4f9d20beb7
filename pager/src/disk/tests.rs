//! The store against a model of it, and under threads.

mod model;
mod threads;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use roaring::RoaringBitmap;

use super::{DiskError, DiskImage, DiskOptions};
use crate::{FaultAnswer, FaultSink, PagerError};

/// Writes down what it is told.
#[derive(Default)]
pub(super) struct Notes {
    /// Blocks that were asked for, in order.
    pub(super) asked: Mutex<Vec<u32>>,
    pub(super) removed: Mutex<Vec<u32>>,
    /// Blocks that are known to be zero.
    pub(super) zero: BTreeSet<u32>,
}

impl FaultSink for Notes {
    fn fault(&self, _region: u16, block: u32) -> FaultAnswer {
        self.asked.lock().unwrap().push(block);
        if self.zero.contains(&block) {
            FaultAnswer::Zero
        } else {
            FaultAnswer::Requested
        }
    }

    fn removed(&self, _region: u16, first: u32, count: u32) {
        self.removed.lock().unwrap().extend(first..first + count);
    }

    fn failed(&self, error: PagerError) {
        panic!("the disk failed: {error}");
    }
}

pub(super) fn options(dir: &Path, bytes: u64, block_size: u32) -> DiskOptions {
    DiskOptions {
        region: 2,
        image: dir.join("disk.raw"),
        map: dir.join("disk.map"),
        bytes,
        block_size,
        overwrite: false,
    }
}

#[test]
fn what_the_migration_wrote_is_an_ordinary_image_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path(), 3 * 65536 + 1000, DiskOptions::BLOCK_SIZE);
    let disk = DiskImage::create(&options).unwrap();
    disk.write(0, &vec![1; 2 * 65536]).unwrap();
    disk.write(3, &vec![4; 65536]).unwrap();
    disk.write_zero(1, 1).unwrap();
    assert!(disk.write(3, &vec![4; 2 * 65536]).is_err());
    assert!(disk.write(0, &[4; 1000]).is_err());
    let sink = Arc::new(Notes::default());
    let missing: RoaringBitmap = [0, 2].into_iter().collect();
    disk.arm(&missing, sink.clone()).unwrap();
    assert_eq!(disk.missing(), missing);
    assert!(disk.write(0, &vec![4; 65536]).is_err(), "armed");
    let mut buffer = vec![9; 65536];
    assert!(matches!(
        disk.read(0, &mut buffer),
        Err(DiskError::Missing { block: 0, .. })
    ));
    disk.read(3, &mut buffer).unwrap();
    assert_eq!(buffer, [vec![4; 1000], vec![0; 64536]].concat());
    assert!(matches!(
        disk.finish(),
        Err(DiskError::StillMissing { count: 2, .. })
    ));

    disk.place(0, &vec![7; 65536]).unwrap();
    disk.place_zero(1, 2).unwrap();
    disk.place(0, &vec![8; 65536]).unwrap(); // a duplicate that came late
    disk.finish().unwrap();
    let image = std::fs::read(&options.image).unwrap();
    let expected = [vec![7; 65536], vec![0; 2 * 65536], vec![4; 1000]].concat();
    assert!(image == expected);
    disk.place(0, &vec![8; 65536]).unwrap(); // a duplicate that came very late
    assert!(std::fs::read(&options.image).unwrap() == expected);
    assert!(disk.finish().is_err(), "finished");

    // Another process may have to finish it once more: nobody knows how far the first one had come.
    drop(disk);
    let disk = DiskImage::adopt(&options.map, Arc::new(Notes::default())).unwrap();
    assert!(disk.missing().is_empty());
    disk.finish().unwrap();
    assert!(std::fs::read(&options.image).unwrap() == expected);
}

#[test]
fn files_in_use_or_in_the_way_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(dir.path(), 1 << 20, 4096);
    let sink = || Arc::new(Notes::default());
    let disk = DiskImage::create(&options).unwrap();
    options.overwrite = true;
    assert!(matches!(
        DiskImage::create(&options),
        Err(DiskError::InUse { .. })
    ));
    assert!(matches!(
        DiskImage::adopt(&options.map, sink()),
        Err(DiskError::InUse { .. })
    ));
    drop(disk);
    assert!(matches!(
        DiskImage::adopt(&options.map, sink()),
        Err(DiskError::NeverArmed { .. })
    ));
    options.overwrite = false;
    assert!(matches!(
        DiskImage::create(&options),
        Err(DiskError::Exists { .. })
    ));
    options.overwrite = true;
    let disk = DiskImage::create(&options).unwrap();
    disk.arm(&[255].into_iter().collect(), sink()).unwrap();
    assert!(disk.arm(&RoaringBitmap::new(), sink()).is_err(), "twice");
    drop(disk);

    // Another file in the image's place, a shorter one, a map that was cut.
    let adopt = || DiskImage::adopt(&options.map, sink());
    assert_eq!(adopt().unwrap().missing(), [255].into_iter().collect());
    let aside = dir.path().join("aside");
    std::fs::rename(&options.image, &aside).unwrap();
    assert!(matches!(adopt(), Err(DiskError::Io { .. })));
    std::fs::write(&options.image, vec![0; 1 << 20]).unwrap();
    assert!(matches!(adopt(), Err(DiskError::BadMap { .. })));
    std::fs::rename(&aside, &options.image).unwrap();
    let image = std::fs::File::options()
        .write(true)
        .open(&options.image)
        .unwrap();
    image.set_len(4096).unwrap();
    assert!(matches!(adopt(), Err(DiskError::BadMap { .. })));
    image.set_len(1 << 20).unwrap();
    assert!(adopt().is_ok());
    let map = std::fs::File::options()
        .write(true)
        .open(&options.map)
        .unwrap();
    map.set_len(100_000).unwrap();
    assert!(matches!(adopt(), Err(DiskError::BadMap { .. })));
    map.set_len(0).unwrap();
    assert!(matches!(adopt(), Err(DiskError::BadMap { .. })));
}

#[test]
fn arming_with_blocks_that_do_not_exist_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let disk = DiskImage::create(&options(dir.path(), 1 << 20, 65536)).unwrap();
    let sink = Arc::new(Notes::default());
    assert!(matches!(
        disk.arm(&[16].into_iter().collect(), sink),
        Err(DiskError::OutOfRange { .. })
    ));
}

#[test]
fn before_the_first_flush_the_process_may_end_but_not_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let spare = tempfile::tempdir().unwrap();
    let options = options(dir.path(), 16 * 65536, DiskOptions::BLOCK_SIZE);
    let sink = || Arc::new(Notes::default());
    let mut disk = DiskImage::create(&options).unwrap();
    disk.write(0, &vec![1; 65536]).unwrap();
    let missing: RoaringBitmap = [3, 4].into_iter().collect();
    disk.arm(&missing, sink()).unwrap();
    let boot = super::header::boot_id().unwrap();
    let mut another = boot;
    another[0] = another[0].wrapping_add(1);
    let adopt = |boot, disk: &mut Arc<DiskImage>| {
        // The locks go with the process that held them.
        let other = tempfile::tempdir_in(spare.path()).unwrap();
        *disk = DiskImage::create(&self::options(other.path(), 65536, 65536)).unwrap();
        DiskImage::adopt_after(&options.map, sink(), boot).map(|taken| *disk = taken)
    };
    let error = adopt(another, &mut disk).unwrap_err();
    assert!(matches!(error, DiskError::NeverArmed { .. }), "{error}");
    adopt(boot, &mut disk).unwrap();
    assert_eq!(disk.missing(), missing);
    disk.flush().unwrap();
    adopt(another, &mut disk).unwrap();
    assert_eq!(disk.missing(), missing);
}
