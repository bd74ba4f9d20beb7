//! What the encoder remembers of what it sent: which version of a block went out last, where a
//! content can be found at the destination, and the contents themselves as far as memory allows.
//! All of it is bounded and may forget at any time: forgetting costs bytes on the wire, never
//! correctness, because the destination checks whatever a record refers to.

use std::collections::{BTreeMap, HashMap, VecDeque};

use roaring::{RoaringBitmap, RoaringTreemap};

use crate::message::RegionId;

type Key = (RegionId, u32);

/// The last version of a block that was sent.
#[derive(Clone, Copy, Default)]
struct Latest {
    /// Region and block, plus one so that 0 is an empty slot.
    key: u64,
    batch: u64,
}

/// Where a content was sent to.
#[derive(Clone, Copy, Default)]
struct Origin {
    hash: u64,
    batch: u64,
    block: u32,
    region: u16,
    used: bool,
}

/// See the module's text.
pub(super) struct History {
    latest: Vec<Latest>,
    origins: Vec<Origin>,
    contents: Contents,
    /// Batches that the destination has applied.
    applied: RoaringTreemap,
    /// Batches with this id or above have not been made.
    next_batch: u64,
    /// Blocks of which the destination rejected a record: their next version goes in full.
    in_full: BTreeMap<RegionId, RoaringBitmap>,
    regions: BTreeMap<RegionId, Sent>,
}

/// What is known of a region.
struct Sent {
    block_size: usize,
    /// Highest block that was ever sent.
    highest: u32,
}

impl History {
    pub(super) fn new(index_entries: usize, contents_bytes: usize) -> Self {
        let slots = index_entries.max(1).next_power_of_two();
        Self {
            latest: vec![Latest::default(); slots],
            origins: vec![Origin::default(); slots],
            contents: Contents::new(contents_bytes),
            applied: RoaringTreemap::new(),
            next_batch: 0,
            in_full: BTreeMap::new(),
            regions: BTreeMap::new(),
        }
    }

    pub(super) fn begin_batch(&mut self, id: u64) {
        self.next_batch = self.next_batch.max(id.saturating_add(1));
    }

    /// Blocks of the region up to `highest` are about to be sent.
    pub(super) fn begin_region(&mut self, region: RegionId, block_size: usize, highest: u32) {
        let sent = self.regions.entry(region).or_insert(Sent {
            block_size,
            highest,
        });
        sent.highest = sent.highest.max(highest);
    }

    /// Length of the region's blocks, if any was sent.
    pub(super) fn block_size(&self, region: RegionId) -> Option<usize> {
        self.regions.get(&region).map(|sent| sent.block_size)
    }

    /// The destination has applied the batch. A batch that was never made is ignored: the peer
    /// must not make this set grow.
    pub(super) fn acknowledge(&mut self, batch: u64) {
        if batch < self.next_batch {
            self.applied.insert(batch);
        }
    }

    /// Forgets the block, and that it was ever an origin. A block that was never sent is ignored.
    pub(super) fn reject(&mut self, region: RegionId, block: u32) {
        if self
            .regions
            .get(&region)
            .is_none_or(|sent| block > sent.highest)
        {
            return;
        }
        let slot = self.latest_slot(region, block);
        if self.latest[slot].key == key_of(region, block) {
            self.latest[slot] = Latest::default();
        }
        self.contents.forget((region, block));
        self.in_full.entry(region).or_default().insert(block);
    }

    /// Whether the block must go in full this time. True once for every rejection.
    pub(super) fn take_in_full(&mut self, region: RegionId, block: u32) -> bool {
        self.in_full
            .get_mut(&region)
            .is_some_and(|set| set.remove(block))
    }

    /// The contents that the destination has for the block, with their hash, where they are
    /// remembered and acknowledged.
    pub(super) fn base(&self, region: RegionId, block: u32) -> Option<(&[u8], u64)> {
        let kept = self.contents.kept.get(&(region, block))?;
        (self.applied.contains(kept.batch) && self.sent_last(region, block) == Some(kept.batch))
            .then_some((self.contents.slabs.at(kept.data), kept.hash))
    }

    /// A block that has this content at the destination.
    pub(super) fn origin(&self, region: RegionId, hash: u64) -> Option<(RegionId, u32)> {
        let origin = &self.origins[self.origin_slot(hash)];
        let from = RegionId(origin.region);
        (origin.used
            && origin.hash == hash
            && self.applied.contains(origin.batch)
            && self.sent_last(from, origin.block) == Some(origin.batch)
            && self.block_size(from) == self.block_size(region))
        .then_some((from, origin.block))
    }

    /// A zero block is part of the batch: what it held before is gone.
    pub(super) fn sent_zero(&mut self, region: RegionId, block: u32, batch: u64) {
        self.note_latest(region, block, batch);
        self.contents.forget((region, block));
    }

    /// A block with content is part of the batch. `keep` says whether its contents shall be kept
    /// as a base for differences.
    pub(super) fn sent(
        &mut self,
        region: RegionId,
        block: u32,
        batch: u64,
        data: &[u8],
        hash: u64,
        keep: bool,
    ) {
        // An origin that can be named now is worth more than one that may be later. This very block
        // ceases to be one until the batch is acknowledged.
        let replace = self
            .origin(region, hash)
            .is_none_or(|origin| origin == (region, block));
        let sent_before = self.note_latest(region, block, batch);
        if replace {
            let slot = self.origin_slot(hash);
            self.origins[slot] = Origin {
                hash,
                batch,
                block,
                region: region.0,
                used: true,
            };
        }
        if keep {
            self.contents
                .keep((region, block), batch, data, hash, sent_before);
        }
    }

    /// Returns whether the block had been sent before, as far as is remembered.
    fn note_latest(&mut self, region: RegionId, block: u32, batch: u64) -> bool {
        let slot = self.latest_slot(region, block);
        let key = key_of(region, block);
        let known = self.latest[slot].key == key;
        self.latest[slot] = Latest { key, batch };
        known
    }

    fn sent_last(&self, region: RegionId, block: u32) -> Option<u64> {
        let latest = &self.latest[self.latest_slot(region, block)];
        (latest.key == key_of(region, block)).then_some(latest.batch)
    }

    fn latest_slot(&self, region: RegionId, block: u32) -> usize {
        // Blocks of one region do not collide until it has more of them than there are slots.
        let shift = usize::from(region.0).wrapping_mul(0x9e37_79b1);
        (block as usize).wrapping_add(shift) & (self.latest.len() - 1)
    }

    fn origin_slot(&self, hash: u64) -> usize {
        hash as usize & (self.origins.len() - 1)
    }
}

fn key_of(region: RegionId, block: u32) -> u64 {
    ((u64::from(region.0) << 32) | u64::from(block)) + 1
}

/// Contents kept as bases for differences, within a budget of bytes. Blocks that were sent more
/// than once push out those that were sent once, never the other way: a first pass over a large
/// guest must not flush what is written again and again. Among those sent often only one newcomer
/// in four pushes another out: passes over a set larger than the budget would otherwise flush each
/// block just before its turn comes.
struct Contents {
    kept: HashMap<Key, Kept>,
    slabs: Slabs,
    once: VecDeque<Key>,
    often: VecDeque<Key>,
    bytes: usize,
    limit: usize,
    newcomers: u32,
}

struct Kept {
    data: Slot,
    hash: u64,
    batch: u64,
    often: bool,
}

impl Contents {
    fn new(limit: usize) -> Self {
        Self {
            kept: HashMap::new(),
            slabs: Slabs::default(),
            once: VecDeque::new(),
            often: VecDeque::new(),
            bytes: 0,
            limit,
            newcomers: 0,
        }
    }

    fn keep(&mut self, key: Key, batch: u64, data: &[u8], hash: u64, sent_before: bool) {
        if let Some(kept) = self.kept.get_mut(&key)
            && kept.data.len == data.len()
        {
            self.slabs.at_mut(kept.data).copy_from_slice(data);
            kept.hash = hash;
            kept.batch = batch;
            if !kept.often {
                kept.often = true;
                self.often.push_back(key);
            }
            return;
        }
        self.forget(key);
        while self.bytes + data.len() > self.limit {
            if !self.evict(sent_before) {
                return;
            }
        }
        self.bytes += data.len();
        let queue = if sent_before {
            &mut self.often
        } else {
            &mut self.once
        };
        queue.push_back(key);
        let slot = self.slabs.take(data.len());
        self.slabs.at_mut(slot).copy_from_slice(data);
        self.kept.insert(
            key,
            Kept {
                data: slot,
                hash,
                batch,
                often: sent_before,
            },
        );
        self.compact();
    }

    fn forget(&mut self, key: Key) {
        if let Some(kept) = self.kept.remove(&key) {
            self.bytes -= kept.data.len;
            self.slabs.give_back(kept.data);
        }
    }

    /// Makes room for a block; false when nothing may go for it.
    fn evict(&mut self, for_often: bool) -> bool {
        if !for_often {
            return false;
        }
        while let Some(key) = self.once.pop_front() {
            if self.kept.get(&key).is_some_and(|kept| !kept.often) {
                self.forget(key);
                return true;
            }
        }
        self.newcomers = self.newcomers.wrapping_add(1);
        if !self.newcomers.is_multiple_of(4) {
            return false;
        }
        while let Some(key) = self.often.pop_front() {
            if self.kept.get(&key).is_some_and(|kept| kept.often) {
                self.forget(key);
                return true;
            }
        }
        false
    }

    /// Drops names of blocks that are gone from the queues before they outgrow what is kept.
    fn compact(&mut self) {
        let bound = 2 * self.kept.len() + 1024;
        if self.once.len() + self.often.len() > bound {
            let kept = &self.kept;
            let mut seen = std::collections::HashSet::new();
            self.once
                .retain(|key| kept.get(key).is_some_and(|k| !k.often) && seen.insert(*key));
            self.often
                .retain(|key| kept.get(key).is_some_and(|k| k.often) && seen.insert(*key));
        }
    }
}

/// A place for the contents of one block.
#[derive(Clone, Copy)]
struct Slot {
    slab: usize,
    offset: usize,
    len: usize,
}

/// Memory for contents, taken from the system in large pieces: block by block it would cost more
/// than the copying. Places are used again for contents of the same length, of which a session has
/// as many as its regions have block sizes.
#[derive(Default)]
struct Slabs {
    slabs: Vec<Box<[u8]>>,
    free: BTreeMap<usize, Vec<Slot>>,
}

impl Slabs {
    /// Length of a slab, unless one block is longer.
    const SLAB: usize = 1 << 20;

    fn take(&mut self, len: usize) -> Slot {
        let free = self.free.entry(len).or_default();
        if free.is_empty() {
            let slab = self.slabs.len();
            let count = (Self::SLAB / len.max(1)).max(1);
            self.slabs.push(vec![0; count * len].into());
            // The lowest is taken first.
            free.extend((0..count).rev().map(|index| Slot {
                slab,
                offset: index * len,
                len,
            }));
        }
        free.pop().expect("filled above")
    }

    fn give_back(&mut self, slot: Slot) {
        self.free.entry(slot.len).or_default().push(slot);
    }

    fn at(&self, slot: Slot) -> &[u8] {
        &self.slabs[slot.slab][slot.offset..][..slot.len]
    }

    fn at_mut(&mut self, slot: Slot) -> &mut [u8] {
        &mut self.slabs[slot.slab][slot.offset..][..slot.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: RegionId = RegionId(0);

    #[test]
    fn only_the_acknowledged_last_version_is_a_base() {
        let mut history = History::new(16, 1 << 20);
        history.begin_region(RAM, 4, 3);
        history.begin_batch(0);
        history.sent(RAM, 3, 0, b"aaaa", 11, true);
        assert!(history.base(RAM, 3).is_none(), "not acknowledged");
        history.acknowledge(0);
        assert_eq!(history.base(RAM, 3), Some((&b"aaaa"[..], 11)));
        assert_eq!(history.origin(RAM, 11), Some((RAM, 3)));
        history.begin_batch(1);
        history.sent(RAM, 3, 1, b"bbbb", 12, true);
        assert!(
            history.base(RAM, 3).is_none(),
            "a newer version is under way"
        );
        assert!(history.origin(RAM, 11).is_none());
        history.acknowledge(1);
        assert_eq!(history.base(RAM, 3), Some((&b"bbbb"[..], 12)));
        history.reject(RAM, 3);
        assert!(history.base(RAM, 3).is_none());
        assert!(history.origin(RAM, 12).is_none());
        assert!(history.take_in_full(RAM, 3));
        assert!(!history.take_in_full(RAM, 3));
    }

    #[test]
    fn an_acknowledgement_of_what_was_never_sent_is_ignored() {
        let mut history = History::new(16, 1 << 20);
        history.acknowledge(7);
        history.begin_batch(7);
        history.sent(RAM, 0, 7, b"aaaa", 1, true);
        assert!(history.base(RAM, 0).is_none());
    }

    #[test]
    fn places_are_used_again_and_hold_one_block_each() {
        let mut contents = Contents::new(3 * Slabs::SLAB);
        for round in 0..20_u32 {
            for block in 0..512_u32 {
                let data = [(block % 251) as u8 ^ round as u8; 4096];
                contents.keep((RAM, block), u64::from(round), &data, 1, true);
            }
            for block in (0..512).step_by(3) {
                contents.forget((RAM, block));
            }
            for (key, kept) in &contents.kept {
                let expected = (key.1 % 251) as u8 ^ round as u8;
                let data = contents.slabs.at(kept.data);
                assert!(data.iter().all(|byte| *byte == expected), "{key:?}");
            }
        }
        assert_eq!(contents.slabs.slabs.len(), 2);
    }

    #[test]
    fn blocks_sent_often_stay_within_the_budget() {
        let mut contents = Contents::new(40);
        for block in 0..10 {
            contents.keep((RAM, block), 0, b"aaaa", 1, false);
        }
        contents.keep((RAM, 10), 0, b"aaaa", 1, false);
        assert!(!contents.kept.contains_key(&(RAM, 10)), "full");
        contents.keep((RAM, 5), 1, b"bbbb", 2, true);
        for block in 20..29 {
            contents.keep((RAM, block), 1, b"cccc", 3, true);
        }
        assert!(contents.kept.contains_key(&(RAM, 5)));
        assert!(!contents.kept.contains_key(&(RAM, 0)));
        assert_eq!(contents.bytes, 40);
        for round in 0..5000 {
            contents.keep((RAM, round), 2, b"dddd", 4, true);
            contents.forget((RAM, round));
        }
        assert!(contents.often.len() + contents.once.len() <= 2 * contents.kept.len() + 1024);
    }
}
