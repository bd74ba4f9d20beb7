//! The images of a guest's disk on both hosts: filled before the guest boots, compared when it is gone.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hybridmig_tests::guest::layout::{Layout, base};
use hybridmig_tests::guest::pattern::{Contents, PAGE, Page, WORDS};
use hybridmig_tests::profile_dir;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::link::Side;
use crate::scenario::Disk;

/// What the guest calls its disk.
const NAME: &str = "vda";
/// The device's id, the node that it uses, and what that lies on, in both QEMUs.
pub const NODE: &str = "disk";

/// Two raw images: the source's is full, the destination's a hole of the same length. They go when this is dropped.
pub struct Images {
    folder: TempDir,
    bytes: u64,
    used: Used,
}

/// How the guest uses its disk.
enum Used {
    /// Block by block, each of them known.
    Blocks { disk: Disk, layout: Layout },
    /// As a file system.
    FileSystem,
}

/// Both images after the migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compared {
    /// Blocks of 4 KiB that were looked at: all.
    pub blocks: u64,
    /// Blocks that the guest does not use and that are not the same on both hosts.
    pub differing: u64,
    /// Blocks that the guest uses and that are not what it has written some time: torn, misplaced, or older than
    /// the source's.
    pub broken: u64,
}

impl Images {
    /// Makes and fills them. They lie beside what cargo builds: on a tmpfs there is no page cache to drop, which
    /// makes disks of another kind.
    pub fn make(disk: &Disk, seed: u64) -> Result<Self> {
        let layout = disk
            .layout()
            .context("the disk has no room for its blocks")?;
        let images = Self::empty(
            disk.bytes(),
            Used::Blocks {
                disk: disk.clone(),
                layout,
            },
        )?;
        let path = images.path(Side::Source);
        let opened = File::options().write(true).open(&path);
        let filled = opened.and_then(|mut file| fill(disk, &layout, &mut file, seed));
        filled.with_context(|| format!("cannot fill {}", path.display()))?;
        Ok(images)
    }

    /// Makes them with an empty file system (ext4) of so many MiB.
    pub fn file_system(mib: u64) -> Result<Self> {
        let images = Self::empty(mib << 20, Used::FileSystem)?;
        let path = images.path(Side::Source);
        let made = Command::new("/sbin/mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096"])
            .arg(&path)
            .output()
            .context("cannot run /sbin/mke2fs; is e2fsprogs installed?")?;
        ensure!(
            made.status.success(),
            "mke2fs {}: {}",
            path.display(),
            String::from_utf8_lossy(&made.stderr)
        );
        Ok(images)
    }

    fn empty(bytes: u64, used: Used) -> Result<Self> {
        let profile = profile_dir()?;
        let target = profile.parent().context("a profile is within a target")?;
        let folder = tempfile::Builder::new()
            .prefix("bench-disk-")
            .tempdir_in(target)
            .with_context(|| format!("no folder for images in {}", target.display()))?;
        let images = Self {
            folder,
            bytes,
            used,
        };
        for side in [Side::Source, Side::Destination] {
            let path = images.path(side);
            let made = File::create(&path).and_then(|file| file.set_len(bytes));
            made.with_context(|| format!("cannot make {}", path.display()))?;
        }
        Ok(images)
    }

    /// Where that host's image is.
    pub fn path(&self, side: Side) -> PathBuf {
        self.folder.path().join(match side {
            Side::Source => "source.img",
            Side::Destination => "destination.img",
        })
    }

    /// Arguments of that host's QEMU.
    pub fn qemu_arguments(&self, side: Side) -> Vec<String> {
        let path = self.path(side);
        [
            "-blockdev",
            &format!(
                "driver=file,node-name={NODE}-file,filename={},discard=unmap",
                path.display()
            ),
            "-blockdev",
            &format!("driver=raw,node-name={NODE},file={NODE}-file,discard=unmap"),
            "-device",
            &format!("virtio-blk-pci,id={NODE}0,drive={NODE}"),
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// Words for the guest's kernel command line.
    pub fn kernel_arguments(&self) -> String {
        let Used::Blocks { disk, .. } = &self.used else {
            return String::new();
        };
        format!(
            "diskcheck.dev={NAME} diskcheck.mb={} diskcheck.run={} diskcheck.random={} diskcheck.reads={} \
             diskcheck.rate={} diskcheck.workers={}",
            disk.hot_mib,
            disk.run_kib / 4,
            disk.random_percent,
            disk.read_mb_s,
            disk.write_mb_s,
            disk.threads
        )
    }

    /// Compares the images. Both guests must have ended: the source's image then is what the guest left, and the
    /// destination's may differ from it only in what the guest has written since.
    pub fn compare(&self) -> Result<Compared> {
        let [here, there] = [Side::Source, Side::Destination].map(|side| {
            let path = self.path(side);
            File::open(&path).with_context(|| format!("cannot open {}", path.display()))
        });
        let (here, there) = (here?, there?);
        let lengths = [&here, &there].map(|file| file.metadata().map(|data| data.len()));
        let [Ok(here_bytes), Ok(there_bytes)] = lengths else {
            anyhow::bail!("an image has no length");
        };
        ensure!(
            here_bytes == there_bytes,
            "the images have {here_bytes} and {there_bytes} bytes"
        );
        match &self.used {
            Used::Blocks { disk, layout } => self.compare_blocks(disk, layout, &here, &there),
            Used::FileSystem => self.check_file_system(),
        }
    }

    fn compare_blocks(
        &self,
        disk: &Disk,
        layout: &Layout,
        here: &File,
        there: &File,
    ) -> Result<Compared> {
        let mut hot: Vec<u64> = (0..layout.blocks).collect();
        hot.sort_by_key(|block| layout.offset(*block));
        let mut hot = hot.into_iter().peekable();
        let mut compared = Compared::default();
        let (mut a, mut b) = (vec![0; PIECE], vec![0; PIECE]);
        for at in (0..self.bytes).step_by(PIECE) {
            read(here, &mut a, at, &self.path(Side::Source))?;
            read(there, &mut b, at, &self.path(Side::Destination))?;
            for (index, (a, b)) in a.chunks_exact(PAGE).zip(b.chunks_exact(PAGE)).enumerate() {
                compared.blocks += 1;
                let offset = at + (index * PAGE) as u64;
                match hot.next_if(|block| layout.offset(*block) == offset) {
                    None => compared.differing += u64::from(a != b),
                    Some(block) => {
                        let (left, has) = (generation(disk, block, a), generation(disk, block, b));
                        let right = matches!((left, has), (Some(left), Some(has)) if has >= left);
                        compared.broken += u64::from(!right);
                    }
                }
            }
        }
        Ok(compared)
    }

    /// A guest that was killed leaves a journal to be replayed, and nothing else to be mended: `broken` is 1 if there
    /// is. What files hold the program in the guest has checked itself.
    fn check_file_system(&self) -> Result<Compared> {
        let path = self.path(Side::Destination);
        let checked = Command::new("/sbin/e2fsck")
            .arg("-fp")
            .arg(&path)
            .output()
            .context("cannot run /sbin/e2fsck; is e2fsprogs installed?")?;
        // 1: errors corrected, which the journal's replay counts as.
        let sound = checked.status.code().is_some_and(|code| code <= 1);
        Ok(Compared {
            blocks: self.bytes / PAGE as u64,
            differing: 0,
            broken: u64::from(!sound),
        })
    }
}

/// Contents, brought to the disk and forgotten, so that the guest's first reads come from there.
fn fill(disk: &Disk, layout: &Layout, file: &mut File, seed: u64) -> io::Result<()> {
    let mut random = SmallRng::seed_from_u64(seed);
    let share = PAGE * disk.random_percent as usize / 100;
    let mut piece = vec![0; PIECE];
    let mut number = 0_u64;
    for _ in 0..disk.bytes() / PIECE as u64 {
        for block in piece.chunks_exact_mut(PAGE) {
            number += 1;
            block.fill(number as u8 | 1);
            random.fill_bytes(&mut block[..share]);
        }
        file.write_all(&piece)?;
    }
    for block in 0..layout.blocks {
        let mut page = Page([0; WORDS]);
        contents(disk, block, 1).write(&mut page);
        let words = page.0.iter().flat_map(|word| word.to_le_bytes());
        let bytes: Vec<u8> = words.collect();
        file.write_all_at(&bytes, layout.offset(block))?;
    }
    file.sync_all()?;
    posix_fadvise(&*file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

fn contents(disk: &Disk, block: u64, generation: u64) -> Contents {
    Contents {
        page: base(NAME) | block,
        generation,
        random: WORDS * disk.random_percent as usize / 100,
    }
}

/// The generation of a block that is whole and where it belongs.
fn generation(disk: &Disk, block: u64, bytes: &[u8]) -> Option<u64> {
    let mut page = Page([0; WORDS]);
    for (word, bytes) in page.0.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    }
    let generation = page.0[1];
    let expected = contents(disk, block, generation);
    expected
        .first_difference(&page)
        .is_none()
        .then_some(generation)
}

/// Bytes that are read and written together.
const PIECE: usize = 1 << 20;

fn read(file: &File, piece: &mut [u8], at: u64, path: &Path) -> Result<()> {
    file.read_exact_at(piece, at)
        .with_context(|| format!("cannot read {} at {at}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Disk {
        Disk {
            mib: 16,
            hot_mib: 2,
            run_kib: 256,
            random_percent: 50,
            read_mb_s: 1.0,
            write_mb_s: 1.0,
            threads: 1,
        }
    }

    fn images() -> Images {
        Images::make(&disk(), 7).unwrap()
    }

    fn copy(images: &Images) -> File {
        let (from, to) = (images.path(Side::Source), images.path(Side::Destination));
        std::fs::copy(from, &to).unwrap();
        File::options().write(true).open(to).unwrap()
    }

    #[test]
    fn a_true_copy_has_nothing_wrong_and_a_hole_everything() {
        let images = images();
        let holes = images.compare().unwrap();
        assert_eq!((holes.blocks, holes.broken), (4096, 512));
        assert_eq!(holes.differing, 4096 - 512);
        copy(&images);
        let same = images.compare().unwrap();
        assert_eq!((same.differing, same.broken), (0, 0));
    }

    #[test]
    fn a_file_system_is_sound_or_not() {
        let images = Images::file_system(16).unwrap();
        assert_eq!(images.compare().unwrap().broken, 1, "a hole is none");
        let there = copy(&images);
        assert_eq!(images.compare().unwrap().broken, 0);
        there.write_all_at(&[7; 4096], 4096).unwrap();
        assert_eq!(images.compare().unwrap().broken, 1);
    }

    #[test]
    fn what_the_guest_wrote_since_is_right_and_what_it_did_not_is_wrong() {
        let images = images();
        let there = copy(&images);
        let write = |contents: &Contents, at: u64| {
            let mut page = Page([0; WORDS]);
            contents.write(&mut page);
            let bytes: Vec<u8> = page.0.iter().flat_map(|word| word.to_le_bytes()).collect();
            there.write_all_at(&bytes, at).unwrap();
        };
        let (disk, layout) = (disk(), disk().layout().unwrap());
        let offset = |block| layout.offset(block);
        write(&contents(&disk, 70, 5), offset(70));
        assert_eq!(images.compare().unwrap().broken, 0);
        // Older than the source's, misplaced, torn.
        write(&contents(&disk, 71, 0), offset(71));
        write(&contents(&disk, 3, 1), offset(72));
        there.write_all_at(b"torn", offset(73) + 2000).unwrap();
        there.write_all_at(b"cold", offset(64) - 4096).unwrap();
        let compared = images.compare().unwrap();
        assert_eq!((compared.differing, compared.broken), (1, 3));
    }
}
