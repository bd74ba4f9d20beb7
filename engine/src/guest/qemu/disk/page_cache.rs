//! What a guest uses of a raw image that it reads through the host's page cache. A hint, for the order of
//! things only.
//!
//! What is cached was used once, which may be long ago: a host with memory to spare keeps whole images. So
//! the image's clean pages are dropped when a migration begins, and what is cached later was read or
//! written since, unless we have read it ourselves. The price is that the guest's next reads come
//! from the disk, once.
//!
//! What the kernel reads ahead, of our reads above all, would look like the guest's, and be read by us, and so on until
//! all of the image is cached. So meanwhile QEMU's open image is one that is not read ahead of.

use std::fs::{self, File};
use std::io;
use std::num::NonZero;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::BLOCK_SIZE;
use crate::blocks::BlockSet;

const PAGE_SIZE: u64 = 4096;
/// Bytes of the file that are looked at together.
const WINDOW: u64 = 1 << 30;

/// Share of an image in the cache up to which that tells what is used, even of the past.
const TELLING: u64 = 4;
/// Blocks behind one that we read that the kernel may read ahead, where it could not be told not to.
const READ_AHEAD: u32 = 4;
/// Time between two looks, in units of how long one takes.
const RARELY: u32 = 50;

/// See the module's text.
pub struct CacheWatch {
    path: PathBuf,
    bytes: u64,
    /// The process that has the image open.
    pid: i32,
    /// Whether it is not read ahead of.
    calmed: bool,
    state: Mutex<State>,
}

impl Drop for CacheWatch {
    fn drop(&mut self) {
        let advice = PosixFadviseAdvice::POSIX_FADV_NORMAL;
        if self.calmed
            && let Err(error) = advise(self.pid, &self.path, advice)
        {
            // Most often it has ended.
            tracing::debug!(%error, self.pid, "QEMU's image is still not read ahead of");
        }
    }
}

struct State {
    /// Used before the watch began; told by the first look.
    first: BlockSet,
    /// What we have read ourselves, and what the kernel may have read ahead for us.
    ours: BlockSet,
    /// When there was a look, and how long it took.
    last: Option<(Instant, Duration)>,
}

impl CacheWatch {
    /// Begins to watch the image of `bytes` at `path`, which process `pid` has open: drops what is cached of it.
    pub fn start(path: PathBuf, bytes: u64, pid: i32) -> io::Result<Self> {
        let advised = advise(pid, &path, PosixFadviseAdvice::POSIX_FADV_RANDOM);
        if let Err(error) = &advised {
            tracing::debug!(%error, pid, "QEMU's image is read ahead of");
        }
        let before = cached_blocks(&path, bytes)?;
        let file = File::open(&path)?;
        let held = file.metadata()?.blocks() * 512 / u64::from(BLOCK_SIZE);
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        let first = if before.len() <= held / TELLING {
            before
        } else {
            // Written lately and not yet on the disk.
            cached_blocks(&path, bytes)?
        };
        Ok(Self {
            path,
            bytes,
            pid,
            calmed: advised.is_ok(),
            state: Mutex::new(State {
                first,
                ours: BlockSet::new(),
                last: None,
            }),
        })
    }

    /// We are about to read this block.
    pub fn we_read(&self, block: u32) {
        let more = if self.calmed { 0 } else { READ_AHEAD };
        let ours = block..=block.saturating_add(more);
        self.lock().ours.insert_range(ours);
    }

    /// The blocks that the guest has used since the beginning; none where it is too early to look again.
    pub fn look(&self) -> io::Result<BlockSet> {
        let began = Instant::now();
        let mut state = self.lock();
        if let Some((at, took)) = state.last
            && began.saturating_duration_since(at) < took * RARELY
        {
            return Ok(BlockSet::new());
        }
        let mut used = cached_blocks(&self.path, self.bytes)?;
        used -= &state.ours;
        used |= std::mem::take(&mut state.first);
        state.last = Some((began, began.elapsed()));
        Ok(used)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives an advice for every descriptor of the process that the file at `path` is open by. An advice belongs to the
/// open file, which a copy of the descriptor shares; the copy is closed at once.
fn advise(pid: i32, path: &Path, advice: PosixFadviseAdvice) -> io::Result<()> {
    let image = fs::metadata(path)?;
    let process = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let mut found = false;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        // One that was closed meanwhile, or is no file, is not it.
        let Ok(metadata) = fs::metadata(entry.path()) else {
            continue;
        };
        if (metadata.dev(), metadata.ino()) != (image.dev(), image.ino()) {
            continue;
        }
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let number = number.ok_or(io::ErrorKind::InvalidData)?;
        let copy = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
        posix_fadvise(&copy, 0, 0, advice)?;
        found = true;
    }
    if found {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the process does not have the image open",
        ))
    }
}

/// The blocks of the file at `path` of which a page is cached; none where the kernel does not tell (it
/// tells the file's owner and root), or where the file is no plain image of `bytes`.
fn cached_blocks(path: &Path, bytes: u64) -> io::Result<BlockSet> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    let euid = nix::unistd::geteuid();
    let may_know = euid.is_root() || euid.as_raw() == metadata.uid();
    let mut blocks = BlockSet::new();
    // A file that does not end with the disk is not laid out like the disk, or not by the page.
    if !metadata.is_file() || !may_know || metadata.len() != bytes {
        return Ok(blocks);
    }
    let mut resident = vec![0; (WINDOW / PAGE_SIZE) as usize];
    let mut offset = 0;
    while offset < bytes {
        let len = WINDOW.min(bytes - offset);
        let pages = &mut resident[..len.div_ceil(PAGE_SIZE) as usize];
        residency(&file, offset, len as usize, pages)?;
        for (index, page) in pages.iter().enumerate() {
            if page & 1 != 0 {
                let at = offset + index as u64 * PAGE_SIZE;
                blocks.insert((at / u64::from(BLOCK_SIZE)) as u32);
            }
        }
        offset += len;
    }
    Ok(blocks)
}

/// mincore(2) for `len` bytes of a file.
fn residency(file: &File, offset: u64, len: usize, pages: &mut [u8]) -> io::Result<()> {
    let length = NonZero::new(len).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: a new mapping at an address that the kernel chooses; nothing ever reads through it.
    let start = unsafe {
        mmap(
            None,
            length,
            ProtFlags::PROT_READ,
            MapFlags::MAP_SHARED,
            file.as_fd(),
            offset as i64,
        )
    }?;
    // SAFETY: the range is the mapping just made, and `pages` has a byte for each of its pages.
    let result = unsafe { libc::mincore(start.as_ptr(), len, pages.as_mut_ptr()) };
    let error = io::Error::last_os_error();
    // SAFETY: made above, and nothing refers to it.
    unsafe { munmap(start, len) }?;
    if result == 0 { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// It stands for QEMU.
    fn this_process() -> i32 {
        std::process::id() as i32
    }

    #[test]
    fn what_was_written_is_cached_and_a_hole_is_not() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let bytes = 40 * u64::from(BLOCK_SIZE);
        file.as_file().set_len(bytes).unwrap();
        file.write_all(&[1; 4096]).unwrap();
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[2; 10], 5 * 65536 + 9000)
            .unwrap();
        let cached = cached_blocks(file.path(), bytes).unwrap();
        assert_eq!(cached.iter().collect::<Vec<_>>(), [0, 5]);
        // Of another size, it is not the image that was meant.
        assert!(cached_blocks(file.path(), bytes + 512).unwrap().is_empty());
    }

    #[test]
    fn what_is_read_later_is_told_apart_from_what_was_cached_and_from_our_own_reads() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let size = u64::from(BLOCK_SIZE);
        let bytes = 400 * size;
        file.as_file().set_len(bytes).unwrap();
        let read = |block: u64| {
            let mut buffer = [0; 4096];
            std::os::unix::fs::FileExt::read_exact_at(file.as_file(), &mut buffer, block * size)
                .unwrap();
        };
        for block in 0..400 {
            let data = vec![7; BLOCK_SIZE as usize];
            std::os::unix::fs::FileExt::write_all_at(file.as_file(), &data, block * size).unwrap();
        }
        // Clean pages can be dropped; all of it is cached, which tells nothing.
        file.as_file().sync_all().unwrap();
        let watch = CacheWatch::start(file.path().to_owned(), bytes, this_process()).unwrap();
        if watch.lock().first.len() > 40 {
            eprintln!("skipped: this file system keeps what it is told to drop");
            return;
        }
        watch.we_read(100);
        read(100);
        read(300);
        let used = watch.look().unwrap();
        assert!(used.contains(300), "{used:?}");
        assert!(!used.contains(100), "{used:?}");
        assert!(used.len() < 40, "{used:?}");
    }

    #[test]
    fn an_open_image_is_not_read_ahead_of_while_it_is_watched() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let size = u64::from(BLOCK_SIZE);
        let data = vec![7; 400 * BLOCK_SIZE as usize];
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &data, 0).unwrap();
        file.as_file().sync_all().unwrap();
        let watch =
            CacheWatch::start(file.path().to_owned(), data.len() as u64, this_process()).unwrap();
        assert!(watch.calmed);
        if watch.lock().first.len() > 40 {
            eprintln!("skipped: this file system keeps what it is told to drop");
            return;
        }
        let mut buffer = vec![0; BLOCK_SIZE as usize];
        for block in 100..140 {
            watch.we_read(block as u32);
            std::os::unix::fs::FileExt::read_exact_at(file.as_file(), &mut buffer, block * size)
                .unwrap();
        }
        let used = watch.look().unwrap();
        assert!(used.is_empty(), "{used:?}");
        // One that does not have it open cannot be told.
        drop(watch);
        let init = CacheWatch::start(file.path().to_owned(), data.len() as u64, 1).unwrap();
        assert!(!init.calmed);
    }
}
