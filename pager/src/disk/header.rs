//! The first sector and a bit more of a map file: whose map it is, and how far its disk has come.
//!
//! What changes (phase, boot, checksum) lies in the first 512 bytes, which disks write as a whole.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

const MAGIC: &[u8; 8] = b"hmigdisk";
const VERSION: u32 = 1;
/// Bytes of the header; the maps begin here. A multiple of every page size.
pub(super) const HEADER_BYTES: usize = 64 << 10;
/// Bytes that are in use, under the checksum.
const USED: usize = 8 << 10;
const CHECKSUM_AT: usize = 12;
const BOOT_AT: usize = 48;
const PATH_AT: usize = 512;
const BOOT_BYTES: usize = 36;

/// Which start of the host this is; changes with every boot.
pub(super) type BootId = [u8; BOOT_BYTES];

/// How far the disk has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Written by the migration; nothing is known to be complete.
    Filling = 1,
    /// The live map says what is missing.
    Armed = 2,
    /// So does the durable one: the guest has flushed, or could have.
    Durable = 3,
}

/// The header's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) phase: Phase,
    pub(super) region: u16,
    pub(super) block_size: u32,
    pub(super) bytes: u64,
    /// Inode of the image.
    pub(super) inode: u64,
    /// The start of the host during which the live map holds.
    pub(super) boot: BootId,
    /// Absolute path of the image.
    pub(super) image: PathBuf,
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut to = vec![0; USED];
        let path = self.image.as_os_str().as_bytes();
        to[..8].copy_from_slice(MAGIC);
        to[8..12].copy_from_slice(&VERSION.to_le_bytes());
        to[20..22].copy_from_slice(&(self.phase as u16).to_le_bytes());
        to[22..24].copy_from_slice(&self.region.to_le_bytes());
        to[24..28].copy_from_slice(&self.block_size.to_le_bytes());
        to[28..32].copy_from_slice(&(path.len() as u32).to_le_bytes());
        to[32..40].copy_from_slice(&self.bytes.to_le_bytes());
        to[40..48].copy_from_slice(&self.inode.to_le_bytes());
        to[BOOT_AT..BOOT_AT + BOOT_BYTES].copy_from_slice(&self.boot);
        to[PATH_AT..PATH_AT + path.len()].copy_from_slice(path);
        let checksum = xxh3_64(&to);
        to[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&checksum.to_le_bytes());
        to
    }

    /// The reason if it is unusable.
    pub(super) fn decode(from: &[u8]) -> Result<Self, String> {
        let from: &[u8; USED] = from
            .get(..USED)
            .and_then(|used| used.try_into().ok())
            .ok_or("it is too short")?;
        if &from[..8] != MAGIC {
            return Err("it is something else".into());
        }
        let version = number::<4>(from, 8);
        if version != u64::from(VERSION) {
            return Err(format!("it is of version {version}, not {VERSION}"));
        }
        let mut plain = *from;
        plain[CHECKSUM_AT..CHECKSUM_AT + 8].fill(0);
        if xxh3_64(&plain) != number::<8>(from, CHECKSUM_AT) {
            return Err("its header is damaged".into());
        }
        let phase = match number::<2>(from, 20) {
            1 => Phase::Filling,
            2 => Phase::Armed,
            3 => Phase::Durable,
            other => return Err(format!("it is in phase {other}, which does not exist")),
        };
        let path = PATH_AT
            .checked_add(number::<4>(from, 28) as usize)
            .and_then(|end| from.get(PATH_AT..end))
            .ok_or("its header is damaged")?;
        Ok(Self {
            phase,
            region: number::<2>(from, 22) as u16,
            block_size: number::<4>(from, 24) as u32,
            bytes: number::<8>(from, 32),
            inode: number::<8>(from, 40),
            boot: from[BOOT_AT..BOOT_AT + BOOT_BYTES]
                .try_into()
                .expect("a constant length"),
            image: std::ffi::OsString::from_vec(path.to_vec()).into(),
        })
    }

    /// Whether a path finds room.
    pub(super) fn fits(image: &Path) -> bool {
        image.as_os_str().len() <= USED - PATH_AT
    }
}

fn number<const LEN: usize>(from: &[u8; USED], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..LEN].copy_from_slice(&from[at..at + LEN]);
    u64::from_le_bytes(bytes)
}

/// This start of the host.
pub(super) fn boot_id() -> std::io::Result<BootId> {
    let text = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    text.get(..BOOT_BYTES)
        .and_then(|id| id.try_into().ok())
        .ok_or_else(|| std::io::Error::other("/proc/sys/kernel/random/boot_id is too short"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            phase: Phase::Armed,
            region: 3,
            block_size: 65536,
            bytes: 1 << 40,
            inode: 77,
            boot: boot_id().unwrap(),
            image: "/var/lib/guest/disk.raw".into(),
        }
    }

    #[test]
    fn a_header_reads_back() {
        assert_eq!(Header::decode(&header().encode()), Ok(header()));
        assert!(Header::decode(&[]).is_err());
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(at in 0..USED * 8) {
            let mut bytes = header().encode();
            bytes[at / 8] ^= 1 << (at % 8);
            prop_assert!(Header::decode(&bytes).is_err());
        }
    }
}
