//! Which blocks of a raw image lie in the host's page cache: what the guest has read or written lately.
//! A hint, for the order of things only.

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::BLOCK_SIZE;
use crate::blocks::BlockSet;

const PAGE_SIZE: u64 = 4096;
/// Bytes of the file that are looked at together.
const WINDOW: u64 = 1 << 30;

/// The blocks of the file at `path` of which a page is cached; none where the kernel does not tell (it
/// tells the file's owner and root), or where the file is no plain image of `bytes`.
pub fn cached_blocks(path: &Path, bytes: u64) -> io::Result<BlockSet> {
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
}
