//! A model guest: what its memory truly is, what each host holds of it, and vCPUs that check every
//! block they read.

use hybridmig_engine::blocks::{Blocks, RegionId};
use hybridmig_engine::session::ledger::Ledger;
use rand::Rng;
use rand::rngs::SmallRng;

/// Contents of a block: 0 is zero, anything else is unique to one write.
pub type Content = u64;

/// A block of a guest.
pub type Block = (RegionId, u32);

/// What an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing that anybody needs to know.
    Done,
    /// The vCPU waits for this block.
    Faulted(Block),
    /// The block was missing, and is not needed any more.
    Overwritten(Block),
}

/// The memory that one host holds; `None` is not populated.
#[derive(Debug)]
pub struct Memory(Vec<Vec<Option<Content>>>);

impl Memory {
    fn new(regions: &[u32]) -> Self {
        Self(regions.iter().map(|n| vec![None; *n as usize]).collect())
    }

    pub fn read(&self, (region, block): Block) -> Content {
        self.0[usize::from(region.0)][block as usize].unwrap_or(0)
    }

    pub fn set(&mut self, (region, block): Block, content: Option<Content>) {
        self.0[usize::from(region.0)][block as usize] = content;
    }

    fn populated(&self, (region, block): Block) -> bool {
        self.0[usize::from(region.0)][block as usize].is_some()
    }
}

/// Both hosts' halves of the guest, and the truth.
#[derive(Debug)]
pub struct Guest {
    regions: Vec<u32>,
    /// Regions with this id or above are disks: what the guest writes there need not be there before.
    first_disk: usize,
    truth: Vec<Vec<Content>>,
    writes: u64,
    pub source: Memory,
    pub source_runs: bool,
    dirty: Blocks,
    tracking: bool,
    pub destination: Memory,
    pub destination_runs: bool,
    pub destination_ever_ran: bool,
    /// Blocks of the destination whose access faults.
    pub trapped: Blocks,
    /// What each vCPU waits for.
    pub vcpus: Vec<Option<Block>>,
    hot: Vec<Block>,
}

impl Guest {
    pub fn new(regions: &[u32], first_disk: usize, vcpus: usize, rng: &mut SmallRng) -> Self {
        let mut guest = Self {
            regions: regions.to_vec(),
            first_disk,
            truth: regions.iter().map(|n| vec![0; *n as usize]).collect(),
            writes: 0,
            source: Memory::new(regions),
            source_runs: true,
            dirty: Blocks::new(),
            tracking: false,
            destination: Memory::new(regions),
            destination_runs: false,
            destination_ever_ran: false,
            trapped: Blocks::new(),
            vcpus: vec![None; vcpus],
            hot: Vec::new(),
        };
        for block in guest.blocks() {
            if rng.random_bool(0.8) {
                guest.write_source(block, rng);
            }
        }
        let all = guest.blocks();
        guest.hot = (0..rng.random_range(1..=24))
            .map(|_| all[rng.random_range(0..all.len())])
            .collect();
        guest
    }

    /// Every eleventh block, of memory: what has to be there when the guest resumes.
    pub fn needed(&self) -> Blocks {
        let mut needed = Blocks::new();
        for (region, block) in self.blocks().into_iter().step_by(11) {
            if usize::from(region.0) < self.first_disk {
                needed.insert(region, block);
            }
        }
        needed
    }

    pub fn blocks(&self) -> Vec<Block> {
        let regions = self.regions.iter().enumerate();
        regions
            .flat_map(|(region, blocks)| (0..*blocks).map(move |b| (RegionId(region as u16), b)))
            .collect()
    }

    pub fn truth(&self, (region, block): Block) -> Content {
        self.truth[usize::from(region.0)][block as usize]
    }

    fn new_content(&mut self, (region, block): Block, rng: &mut SmallRng) -> Content {
        self.writes += 1;
        // Now and then a guest writes zeroes, or the balloon punches the block.
        let content = if rng.random_bool(0.05) {
            0
        } else {
            self.writes
        };
        self.truth[usize::from(region.0)][block as usize] = content;
        content
    }

    fn write_source(&mut self, block: Block, rng: &mut SmallRng) {
        let content = self.new_content(block, rng);
        self.source.set(block, (content != 0).then_some(content));
        if self.tracking {
            self.dirty.insert(block.0, block.1);
        }
    }

    // The source's guest operations.

    pub fn start_tracking(&mut self) -> Blocks {
        self.tracking = true;
        self.dirty = Blocks::new();
        let mut populated = Blocks::new();
        for (region, block) in self.blocks() {
            if self.source.populated((region, block)) {
                populated.insert(region, block);
            }
        }
        populated
    }

    /// May report more than was written, never less.
    pub fn take_dirty(&mut self, rng: &mut SmallRng) -> Blocks {
        assert!(self.tracking, "a scan without tracking");
        let mut dirty = std::mem::take(&mut self.dirty);
        if rng.random_bool(0.2) {
            let (region, block) = self.hot[0];
            dirty.insert(region, block);
        }
        dirty
    }

    /// Device models write into the frozen guest's memory while their state is saved.
    pub fn save_state(&mut self, rng: &mut SmallRng) {
        assert!(!self.source_runs, "the state of a running guest");
        if rng.random_bool(0.3) {
            let all = self.blocks();
            for _ in 0..rng.random_range(1..=5) {
                self.write_source(all[rng.random_range(0..all.len())], rng);
            }
        }
    }

    pub fn thaw(&mut self) {
        self.tracking = false;
        self.source_runs = true;
        self.vcpus.fill(None);
    }

    // The destination's.

    /// Device models populate some memory before anything has come.
    pub fn prepare(&mut self, rng: &mut SmallRng) {
        for block in self.blocks() {
            if rng.random_bool(0.05) {
                self.destination.set(block, Some(u64::MAX));
            }
        }
    }

    pub fn arm(&mut self, ledger: &mut Ledger, behind: &Blocks, postcopy_pass: u32) -> Blocks {
        let missing = ledger.missing_at_handover(behind, postcopy_pass);
        let written = ledger.written();
        for block in self.blocks() {
            let stale = missing.contains(block.0, block.1);
            if stale || !written.contains(block.0, block.1) {
                self.destination.set(block, None);
            }
        }
        self.trapped = missing.clone();
        missing
    }

    /// Blocks with content, a sample of them: what a guest's host may know of its accesses, or not.
    pub fn accessed(&self, rng: &mut SmallRng) -> Blocks {
        let mut blocks = Blocks::new();
        for (region, block) in self.blocks() {
            if rng.random_bool(0.2) && self.source.populated((region, block)) {
                blocks.insert(region, block);
            }
        }
        blocks
    }

    /// One access by one vCPU that does not wait: what it came to.
    pub fn access(&mut self, writes: f64, rng: &mut SmallRng) -> Access {
        let vcpu = rng.random_range(0..self.vcpus.len());
        if self.vcpus[vcpu].is_some() || !(self.source_runs || self.destination_runs) {
            return Access::Done;
        }
        let all: u32 = self.regions.iter().sum();
        let block = if rng.random_bool(0.7) {
            self.hot[rng.random_range(0..self.hot.len())]
        } else {
            let nth = rng.random_range(0..all) as usize;
            self.nth(nth)
        };
        if self.source_runs {
            assert_eq!(
                self.source.read(block),
                self.truth(block),
                "the guest at the source reads {block:?}"
            );
            if rng.random_bool(writes) {
                self.write_source(block, rng);
            }
            return Access::Done;
        }
        if self.trapped.contains(block.0, block.1) {
            // A disk's block that is written whole need not come.
            if usize::from(block.0.0) >= self.first_disk && rng.random_bool(writes) {
                let content = self.new_content(block, rng);
                self.destination.set(block, Some(content));
                self.wake(block);
                return Access::Overwritten(block);
            }
            self.vcpus[vcpu] = Some(block);
            return Access::Faulted(block);
        }
        assert_eq!(
            self.destination.read(block),
            self.truth(block),
            "the guest at the destination reads {block:?}"
        );
        if rng.random_bool(writes) {
            let content = self.new_content(block, rng);
            self.destination.set(block, Some(content));
        }
        Access::Done
    }

    /// The guest at the destination gives a block back.
    pub fn remove(&mut self, rng: &mut SmallRng) -> Block {
        let all = self.blocks();
        let block = all[rng.random_range(0..all.len())];
        self.truth[usize::from(block.0.0)][block.1 as usize] = 0;
        self.destination.set(block, None);
        self.wake(block);
        block
    }

    /// Places a block of an armed guest; false if it was there already.
    pub fn place(&mut self, block: Block, content: Content) -> bool {
        if !self.trapped.contains(block.0, block.1) {
            return false;
        }
        self.destination.set(block, Some(content));
        self.wake(block);
        true
    }

    fn wake(&mut self, block: Block) {
        self.trapped.remove(block.0, block.1);
        for vcpu in &mut self.vcpus {
            if *vcpu == Some(block) {
                *vcpu = None;
            }
        }
    }

    pub fn active(&self) -> bool {
        (self.source_runs || self.destination_runs) && self.vcpus.iter().any(Option::is_none)
    }

    fn nth(&self, mut nth: usize) -> Block {
        for (region, blocks) in self.regions.iter().enumerate() {
            if nth < *blocks as usize {
                return (RegionId(region as u16), nth as u32);
            }
            nth -= *blocks as usize;
        }
        (RegionId(0), 0)
    }

    /// What must always hold.
    pub fn check_one_side(&self) {
        assert!(
            !(self.source_runs && self.destination_runs),
            "the guest runs on both sides"
        );
        assert!(
            !(self.source_runs && self.destination_ever_ran),
            "the guest was thawed after it had run at the destination"
        );
    }

    /// Every byte at the source is the guest's own.
    pub fn check_source(&self) {
        for block in self.blocks() {
            assert_eq!(
                self.source.read(block),
                self.truth(block),
                "source {block:?}"
            );
        }
    }

    /// Every byte is at the destination, or (if it need not be complete) trapped there and kept by
    /// the source.
    pub fn check_destination(&self, complete: bool) {
        for block in self.blocks() {
            if self.trapped.contains(block.0, block.1) {
                assert!(!complete, "{block:?} never came");
                assert_eq!(self.source.read(block), self.truth(block), "kept {block:?}");
            } else {
                let here = self.destination.read(block);
                assert_eq!(here, self.truth(block), "destination {block:?}");
            }
        }
    }
}
