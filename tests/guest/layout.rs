//! Where the blocks that `diskcheck` uses lie on a disk: the program in the guest and whoever fills a disk for it
//! beforehand must agree.

/// Length of a block in bytes.
const BLOCK: u64 = 4096;

/// Runs of neighbouring blocks, evenly spread over a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How many blocks there are.
    pub blocks: u64,
    /// Blocks in a run.
    run: u64,
    /// Bytes from the beginning of a run to the next.
    stride: u64,
}

impl Layout {
    /// `checked` bytes of a disk of `disk` bytes, in runs of `run` blocks. `None` if there is no room, or nothing to
    /// check.
    pub fn new(disk: u64, checked: u64, run: u64) -> Option<Self> {
        let runs = (checked / BLOCK).checked_div(run)?;
        let stride = disk.checked_div(runs)? / BLOCK * BLOCK;
        (stride >= run * BLOCK).then_some(Self {
            blocks: runs * run,
            run,
            stride,
        })
    }

    /// Where a block begins.
    pub fn offset(&self, block: u64) -> u64 {
        block / self.run * self.stride + block % self.run * BLOCK
    }
}

/// What the number of each block of a disk has above its lower 16 bits: tells a disk's blocks from another's.
pub fn base(disk: &str) -> u64 {
    let sum = disk.bytes().fold(0, |sum, byte| sum << 4 ^ u64::from(byte));
    (sum & 0xffff) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_spread_and_lie_within_the_disk() {
        let layout = Layout::new(1 << 30, 100 << 20, 256).unwrap();
        assert_eq!(layout.blocks, 25_600);
        assert_eq!(layout.offset(255), 255 * BLOCK);
        assert!(layout.offset(256) >= 10 << 20);
        assert!(layout.offset(layout.blocks - 1) < 1 << 30);
        let mut offsets: Vec<_> = (0..layout.blocks)
            .map(|block| layout.offset(block))
            .collect();
        offsets.dedup();
        assert_eq!(offsets.len() as u64, layout.blocks);
    }

    #[test]
    fn what_does_not_fit_is_none() {
        assert_eq!(Layout::new(1 << 20, 2 << 20, 1), None);
        assert_eq!(Layout::new(1 << 20, 4096, 256), None);
        assert_eq!(Layout::new(1 << 20, 1 << 19, 0), None);
        assert!(Layout::new(1 << 20, 1 << 20, 256).is_some());
    }

    #[test]
    fn disks_have_numbers_of_their_own() {
        assert_ne!(base("vda"), base("vdb"));
        assert_eq!(base("vda") & 0xffff, 0);
    }
}
