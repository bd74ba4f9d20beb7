//! The numbers of the profiles' disk patterns. All rates are of the whole guest at factor 1.

use crate::guest::workload::profile::{ContentShares, Profile};

/// All numbers of one profile's use of its disk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiskSpec {
    /// Contents of the sectors that have been written.
    pub contents: ContentShares,
    /// Share of the disk that is written when the guest is started, in percent; the rest are holes.
    pub used: u32,
    /// Reads per second.
    pub reads: u32,
    /// Writes per second.
    pub writes: u32,
    /// Share of writes that do not read first what they replace, in percent.
    pub blind: u32,
    /// Smallest and largest operation, in sectors of 4 KiB; powers of two up to 16.
    pub sizes: (u32, u32),
    /// Share of operations that continue a sweep over all of the disk, in percent. The others draw
    /// from the working set.
    pub sequential: u32,
    /// Length of the working set, in percent of the disk.
    pub set_share: u32,
    /// Exponent of the Zipf popularity within the working set; 0 is uniform.
    pub zipf: f64,
    /// Writes of one thread between two flushes; 0: it never flushes.
    pub flush_every: u32,
    /// Threads that use the disk, at most.
    pub threads: u32,
}

impl DiskSpec {
    /// The numbers of a profile.
    pub fn of(profile: Profile) -> &'static Self {
        match profile {
            Profile::Idle => &IDLE,
            Profile::Web => &WEB,
            Profile::Db => &DB,
            Profile::Build => &BUILD,
            Profile::Scan => &SCAN,
        }
    }

    /// Operations per second.
    pub fn rate(&self) -> u32 {
        self.reads + self.writes
    }
}

const IDLE: DiskSpec = DiskSpec {
    contents: mix(20, 50, 10),
    used: 30,
    reads: 1,
    writes: 1,
    blind: 0,
    sizes: (1, 2),
    sequential: 0,
    set_share: 2,
    zipf: 1.0,
    flush_every: 8,
    threads: 1,
};

const WEB: DiskSpec = DiskSpec {
    contents: mix(5, 50, 10),
    used: 50,
    reads: 100,
    writes: 10,
    blind: 50,
    sizes: (1, 8),
    sequential: 10,
    set_share: 10,
    zipf: 0.9,
    flush_every: 0,
    threads: 2,
};

const DB: DiskSpec = DiskSpec {
    contents: mix(5, 35, 5),
    used: 60,
    reads: 250,
    writes: 150,
    blind: 30,
    sizes: (2, 4),
    sequential: 5,
    set_share: 20,
    zipf: 0.8,
    flush_every: 32,
    threads: 4,
};

const BUILD: DiskSpec = DiskSpec {
    contents: mix(5, 60, 10),
    used: 40,
    reads: 150,
    writes: 120,
    blind: 80,
    sizes: (1, 16),
    sequential: 40,
    set_share: 30,
    zipf: 0.6,
    flush_every: 256,
    threads: 4,
};

const SCAN: DiskSpec = DiskSpec {
    contents: mix(5, 25, 5),
    used: 80,
    reads: 200,
    writes: 50,
    blind: 0,
    sizes: (16, 16),
    sequential: 100,
    set_share: 100,
    zipf: 0.0,
    flush_every: 0,
    threads: 2,
};

const fn mix(zero: u32, text: u32, duplicate: u32) -> ContentShares {
    ContentShares {
        zero,
        text,
        duplicate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sound() {
        for profile in Profile::ALL {
            let spec = DiskSpec::of(profile);
            let (small, large) = spec.sizes;
            assert!(spec.contents.is_sound() && spec.rate() > 0 && spec.threads > 0);
            assert!(small.is_power_of_two() && large.is_power_of_two());
            assert!(small <= large && large <= super::super::BLOCK_SECTORS);
            let percent = [spec.used, spec.blind, spec.sequential, spec.set_share];
            assert!(percent.iter().all(|share| *share <= 100) && spec.set_share > 0);
        }
    }

    #[test]
    fn the_documentation_shows_the_same_numbers() {
        let text = include_str!("../../../../../docs/workload.md");
        for profile in Profile::ALL {
            let spec = DiskSpec::of(profile);
            let (small, large) = spec.sizes;
            let flush = match spec.flush_every {
                0 => "never".to_owned(),
                every => format!("{every} writes"),
            };
            let row = format!(
                "| {profile} | {} % | {} | {} | {} % | {}–{} KiB | {} % | {} % | {} | {flush} | {} |",
                spec.used,
                spec.reads,
                spec.writes,
                spec.blind,
                small * 4,
                large * 4,
                spec.sequential,
                spec.set_share,
                spec.zipf,
                spec.threads
            );
            assert!(text.contains(&row), "docs/workload.md lacks: {row}");
        }
    }
}
