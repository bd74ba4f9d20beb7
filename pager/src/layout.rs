//! Where the guest's process maps its blocks, both ways. Changed only when the guest unmaps.

use crate::{Mapping, PAGE_SIZE, Uffd};

/// All mappings of all regions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    pub(crate) maps: Vec<RegionMapping>,
    /// Whether some block is mapped more than once.
    aliased: bool,
}

/// A mapping and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionMapping {
    pub(crate) region: u16,
    pub(crate) mapping: Mapping,
}

impl Layout {
    pub(crate) fn add(&mut self, region: u16, mappings: &[Mapping]) {
        for mapping in mappings.iter().filter(|mapping| !mapping.is_empty()) {
            self.aliased |= self.maps.iter().any(|other| {
                other.region == region
                    && other.mapping.first < mapping.first + mapping.count
                    && mapping.first < other.mapping.first + other.mapping.count
            });
            self.maps.push(RegionMapping {
                region,
                mapping: *mapping,
            });
        }
    }

    /// An address of a block, and how many blocks are mapped from there on.
    pub(crate) fn find(&self, region: u16, block: u32) -> Option<(u64, u32)> {
        self.addresses(region, block).next()
    }

    /// The block at an address.
    pub(crate) fn block_at(&self, address: u64) -> Option<(u16, u32)> {
        self.maps
            .iter()
            .find_map(|map| Some((map.region, map.mapping.block_at(address)?)))
    }

    /// The blocks between two addresses, as `(region, first, count)`.
    pub(crate) fn blocks_in(&self, start: u64, end: u64) -> impl Iterator<Item = (u16, u32, u32)> {
        self.maps.iter().filter_map(move |map| {
            let from = start.max(map.mapping.address);
            let to = end.min(map.mapping.end());
            let count = to.checked_sub(from)?.div_ceil(PAGE_SIZE as u64) as u32;
            (count > 0).then_some(())?;
            Some((map.region, map.mapping.block_at(from)?, count))
        })
    }

    /// Forgets the addresses between two: the guest unmapped them.
    pub(crate) fn forget(&mut self, start: u64, end: u64) {
        let mut kept = Vec::with_capacity(self.maps.len() + 1);
        for map in &self.maps {
            let Mapping {
                address,
                first,
                count,
            } = map.mapping;
            let pages = |bytes: u64| (bytes / PAGE_SIZE as u64).min(u64::from(count)) as u32;
            let before = pages(start.saturating_sub(address));
            let after = pages(map.mapping.end().saturating_sub(end));
            if before + after >= count {
                kept.push(*map);
                continue;
            }
            for (skip, count) in [(0, before), (count - after, after)] {
                if count > 0 {
                    kept.push(RegionMapping {
                        region: map.region,
                        mapping: Mapping {
                            address: address + u64::from(skip) * PAGE_SIZE as u64,
                            first: first + skip,
                            count,
                        },
                    });
                }
            }
        }
        self.maps = kept;
    }

    /// Wakes who waits for a block, wherever it is mapped.
    pub(crate) fn wake(&self, uffd: &Uffd, region: u16, block: u32) {
        for (address, _) in self.addresses(region, block) {
            wake(uffd, address);
        }
    }

    /// Wakes who waits for blocks at other addresses than `placed`, where the kernel has done so.
    pub(crate) fn wake_aliases(
        &self,
        uffd: &Uffd,
        region: u16,
        first: u32,
        count: u32,
        placed: u64,
    ) {
        if !self.aliased {
            return;
        }
        for offset in 0..count {
            let done = placed + u64::from(offset) * PAGE_SIZE as u64;
            for (address, _) in self.addresses(region, first + offset) {
                if address != done {
                    wake(uffd, address);
                }
            }
        }
    }

    fn addresses(&self, region: u16, block: u32) -> impl Iterator<Item = (u64, u32)> {
        self.maps
            .iter()
            .filter(move |map| map.region == region)
            .filter_map(move |map| {
                let address = map.mapping.address_of(block)?;
                Some((address, map.mapping.count - (block - map.mapping.first)))
            })
    }
}

fn wake(uffd: &Uffd, address: u64) {
    if let Err(error) = uffd.wake(address, PAGE_SIZE as u64) {
        // Only a process that is gone refuses this, and nobody waits there.
        tracing::debug!(%error, address, "UFFDIO_WAKE");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn mapping(address: u64, first: u32, count: u32) -> Mapping {
        Mapping {
            address: address * PAGE,
            first,
            count,
        }
    }

    #[test]
    fn addresses_and_blocks_are_each_others_inverse() {
        let mut layout = Layout::default();
        layout.add(0, &[mapping(100, 0, 10), mapping(200, 10, 10)]);
        layout.add(3, &[mapping(300, 0, 5)]);
        assert!(!layout.aliased);
        assert_eq!(layout.find(0, 12), Some((202 * PAGE, 8)));
        assert_eq!(layout.block_at(202 * PAGE + 17), Some((0, 12)));
        assert_eq!(layout.find(3, 5), None);
        assert_eq!(layout.find(1, 0), None);
        let blocks: Vec<_> = layout.blocks_in(109 * PAGE, 301 * PAGE).collect();
        assert_eq!(blocks, [(0, 9, 1), (0, 10, 10), (3, 0, 1)]);
        layout.add(0, &[mapping(400, 9, 2)]);
        assert!(layout.aliased);
        assert_eq!(layout.addresses(0, 9).count(), 2);
    }

    proptest! {
        #[test]
        fn forgetting_removes_exactly_the_addresses(start in 90_u64..130, len in 1_u64..40) {
            let mut layout = Layout::default();
            layout.add(0, &[mapping(100, 50, 20)]);
            layout.forget(start * PAGE, (start + len) * PAGE);
            for page in 95..125 {
                let expected = ((100..120).contains(&page) && !(start..start + len).contains(&page))
                    .then(|| (0, 50 + (page - 100) as u32));
                prop_assert_eq!(layout.block_at(page * PAGE), expected);
            }
        }
    }
}
