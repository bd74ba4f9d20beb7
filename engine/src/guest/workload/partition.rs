//! The pages of one worker: a table of generations and the data pages behind it, both in guest
//! memory, so that both are migrated. The digest over all generations stays outside, in the
//! worker's state: it finds what table and page agree on and is stale all the same.

use std::sync::atomic::Ordering::Relaxed;

use super::memory::SharedMemory;
use super::pages::{Contents, PAGE, Page, WrongPage};

/// Entries of the generation table in one page: 32 bits each.
const ENTRIES: u32 = (PAGE / 4) as u32;
/// Bytes of a page's header, which every write replaces.
const HEADER: usize = 32;

/// A contiguous run of guest pages that one worker owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    first: u32,
    table: u32,
    data: u32,
}

/// What is wrong with a partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// Number of wrong pages, or of other disagreements.
    pub count: u64,
    /// Descriptions of the first few.
    pub examples: Vec<String>,
}

impl Damage {
    /// Most descriptions that are kept.
    pub const EXAMPLES: usize = 16;

    /// Notes one wrong thing.
    pub fn add(&mut self, what: impl ToString) {
        self.count += 1;
        if self.examples.len() < Self::EXAMPLES {
            self.examples.push(what.to_string());
        }
    }

    /// Adds what was found elsewhere.
    pub fn merge(&mut self, other: Self) {
        self.count += other.count;
        self.examples.extend(other.examples);
        self.examples.truncate(Self::EXAMPLES);
    }
}

impl Partition {
    /// The partition of worker `worker` of `threads` in a guest of `pages` pages. Every partition
    /// must have at least two pages.
    pub fn of(worker: u32, threads: u32, pages: u32) -> Self {
        let bound = |number: u32| {
            (u64::from(pages) * u64::from(number) / u64::from(threads)) as u32 // ≤ pages
        };
        let (first, end) = (bound(worker), bound(worker + 1));
        let total = end - first;
        assert!(total >= 2, "a partition needs a table page and a data page");
        let table = total.div_ceil(ENTRIES + 1);
        Self {
            first,
            table,
            data: total - table,
        }
    }

    /// Number of data pages.
    pub fn data_pages(&self) -> u32 {
        self.data
    }

    /// Number of all pages.
    pub fn pages(&self) -> u32 {
        self.table + self.data
    }

    /// Number in guest memory of a data page.
    pub fn page(&self, index: u32) -> u32 {
        assert!(index < self.data);
        self.first + self.table + index
    }

    /// Fills all pages with their first generation; the memory must be zero. Returns the digest.
    pub fn fill(&self, memory: &SharedMemory, contents: &Contents) -> u64 {
        let mut digest = 0_u64;
        let mut data = [0; PAGE];
        for index in 0..self.data {
            let page = self.page(index);
            let generation = contents.first_generation(page);
            if generation != 0 {
                contents.produce(page, generation, &mut data);
                memory.write(page as usize * PAGE, &data);
                self.entry(memory, index).store(generation, Relaxed);
            }
            digest = digest.wrapping_add(contents.digest_term(page, generation));
        }
        digest
    }

    /// Reads a data page and checks it against the table.
    pub fn read(
        &self,
        memory: &SharedMemory,
        contents: &Contents,
        index: u32,
        data: &mut Page,
    ) -> Result<u32, WrongPage> {
        let page = self.page(index);
        let generation = self.entry(memory, index).load(Relaxed);
        memory.read_page(page, data);
        contents.check(page, generation, data)?;
        Ok(generation)
    }

    /// Writes the next generation of a data page that [`Self::read`] has just copied to `data`.
    /// Returns what the digest changes by.
    pub fn write(
        &self,
        memory: &SharedMemory,
        contents: &Contents,
        index: u32,
        generation: u32,
        data: &mut Page,
    ) -> u64 {
        let page = self.page(index);
        let (next, changed) = contents.advance(page, generation, data);
        let base = page as usize * PAGE;
        memory.write(base, &data[..HEADER]);
        memory.write(base + changed.start, &data[changed]);
        self.entry(memory, index).store(next, Relaxed);
        contents
            .digest_term(page, next)
            .wrapping_sub(contents.digest_term(page, generation))
    }

    /// Compares every byte of every page with what it should be, and all generations with the
    /// digest.
    pub fn verify(&self, memory: &SharedMemory, contents: &Contents, digest: u64) -> Damage {
        let mut damage = Damage::default();
        let mut found = 0_u64;
        let mut data = [0; PAGE];
        for index in 0..self.data {
            let page = self.page(index);
            let generation = self.entry(memory, index).load(Relaxed);
            memory.read_page(page, &mut data);
            if let Err(wrong) = contents.compare(page, generation, &data) {
                damage.add(wrong);
            }
            found = found.wrapping_add(contents.digest_term(page, generation));
        }
        for index in self.data..self.table * ENTRIES {
            let entry = self.raw_entry(memory, index).load(Relaxed);
            if entry != 0 {
                let page = self.first + index / ENTRIES;
                damage.add(format!("table page {page} has {entry} in an unused entry"));
            }
        }
        if found != digest {
            let (first, last) = (self.first, self.first + self.pages() - 1);
            damage.add(format!(
                "the generations in pages {first} to {last} are not those that were written: \
                 digest {found:016x} instead of {digest:016x}, so a table page is stale"
            ));
        }
        damage
    }

    fn entry<'a>(&self, memory: &'a SharedMemory, index: u32) -> &'a std::sync::atomic::AtomicU32 {
        assert!(index < self.data);
        self.raw_entry(memory, index)
    }

    fn raw_entry<'a>(
        &self,
        memory: &'a SharedMemory,
        index: u32,
    ) -> &'a std::sync::atomic::AtomicU32 {
        memory.word32(self.first as usize * PAGE + index as usize * 4)
    }
}

#[cfg(test)]
mod tests {
    use super::super::profile::Profile;
    use super::*;

    fn guest(pages: u32) -> (SharedMemory, Contents, Partition, u64) {
        let memory = SharedMemory::create(c"partition-test", pages as usize * PAGE).unwrap();
        let contents = Contents::new(Profile::Db, Profile::Db.spec().contents, 5);
        let partition = Partition::of(0, 1, pages);
        let digest = partition.fill(&memory, &contents);
        (memory, contents, partition, digest)
    }

    #[test]
    fn partitions_cover_all_pages_once() {
        for (pages, threads) in [
            (4096, 1),
            (4096, 3),
            (4097, 32),
            (65_536, 7),
            (2_097_152, 2),
        ] {
            let mut next = 0;
            for worker in 0..threads {
                let partition = Partition::of(worker, threads, pages);
                assert_eq!(partition.first, next);
                assert!(partition.table * ENTRIES >= partition.data);
                // One page more than needed at most, where no split is exact.
                assert!((partition.table - 1) * ENTRIES <= partition.data);
                next += partition.pages();
            }
            assert_eq!(next, pages);
        }
    }

    #[test]
    fn a_stale_page_with_its_stale_table_is_found_by_the_digest() {
        let (memory, contents, partition, mut digest) = guest(100);
        let mut data = [0; PAGE];
        let (mut old_table, mut old_page) = ([0; PAGE], [0; PAGE]);
        memory.read_page(0, &mut old_table);
        memory.read_page(partition.page(42), &mut old_page);
        let generation = partition.read(&memory, &contents, 42, &mut data).unwrap();
        let change = partition.write(&memory, &contents, 42, generation, &mut data);
        digest = digest.wrapping_add(change);
        assert_eq!(partition.verify(&memory, &contents, digest).count, 0);

        memory.write(partition.page(42) as usize * PAGE, &old_page);
        assert_eq!(partition.verify(&memory, &contents, digest).count, 1);
        assert!(partition.read(&memory, &contents, 42, &mut data).is_err());

        memory.write(0, &old_table);
        partition.read(&memory, &contents, 42, &mut data).unwrap();
        let damage = partition.verify(&memory, &contents, digest);
        assert_eq!(damage.count, 1, "{damage:?}");
        assert!(damage.examples[0].contains("stale"), "{damage:?}");
    }

    #[test]
    fn a_byte_in_an_unused_entry_is_found() {
        let (memory, contents, partition, digest) = guest(100);
        memory.write(PAGE - 1, &[1]);
        let damage = partition.verify(&memory, &contents, digest);
        assert_eq!(damage.count, 1, "{damage:?}");
        assert!(damage.examples[0].contains("unused"), "{damage:?}");
    }
}
