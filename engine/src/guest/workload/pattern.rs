//! Which page a worker touches next, and whether it writes. Everything here is a function of the
//! profile, the seed and the [`PatternState`], so that a guest that is moved goes on with exactly
//! the accesses that it would have made. This file must never look at a clock or at memory.

use serde::{Deserialize, Serialize};

use super::profile::{PhaseSpec, Profile, ProfileSpec};

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Index of the page among the worker's data pages.
    pub index: u32,
    /// Whether it is written after it has been read.
    pub write: bool,
}

/// SplitMix64 (Steele, Lea, Flood 2014): eight bytes of state, which travel with the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rng(u64);

impl Rng {
    /// A generator with this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`, with a bias below `bound`/2⁶⁴.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// A number in [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// The finaliser of SplitMix64: a bijection of 64-bit numbers without visible structure.
pub fn mix(value: u64) -> u64 {
    let mut z = value;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What of a pattern changes as it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatternState {
    rng: Rng,
    /// Next page of the sweep.
    cursor: u32,
    /// Accesses made so far.
    accesses: u64,
}

impl PatternState {
    /// The beginning of worker `worker`'s pattern.
    pub fn new(seed: u64, worker: u32) -> Self {
        Self {
            rng: Rng::new(mix(seed ^ mix(u64::from(worker) + 1))),
            cursor: 0,
            accesses: 0,
        }
    }

    /// Accesses made so far.
    pub fn accesses(&self) -> u64 {
        self.accesses
    }
}

/// The fixed part of one worker's pattern.
pub struct Pattern {
    spec: &'static ProfileSpec,
    threads: u32,
    data_pages: u32,
    cycle: u64,
    sets: Vec<WorkingSet>,
}

impl Pattern {
    /// The pattern of one of `threads` workers, each with `data_pages` pages of its own (at least
    /// one).
    pub fn new(profile: Profile, threads: u32, data_pages: u32) -> Self {
        let spec = profile.spec();
        Self {
            spec,
            threads,
            data_pages,
            cycle: spec.phases.iter().map(|phase| phase.operations).sum(),
            sets: spec
                .phases
                .iter()
                .map(|phase| {
                    let PhaseSpec {
                        set_start,
                        set_share,
                        zipf,
                        ..
                    } = *phase;
                    WorkingSet::new(set_start, set_share, zipf, spec.locality, data_pages)
                })
                .collect(),
        }
    }

    /// The phase in which the next access falls.
    pub fn phase(&self, state: &PatternState) -> &'static PhaseSpec {
        &self.spec.phases[self.phase_number(state)]
    }

    /// Accesses per second of this one worker in the present phase, at factor 1.
    pub fn rate(&self, state: &PatternState) -> f64 {
        f64::from(self.phase(state).rate) / f64::from(self.threads)
    }

    /// Draws the next access.
    pub fn next(&self, state: &mut PatternState) -> Access {
        let number = self.phase_number(state);
        let phase = &self.spec.phases[number];
        state.accesses = state.accesses.wrapping_add(1);
        let write = state.rng.below(100) < u64::from(phase.writes);
        let sequential = state.rng.below(100) < u64::from(phase.sequential);
        let index = if sequential {
            let index = state.cursor;
            state.cursor = (index + 1) % self.data_pages;
            index
        } else {
            self.sets[number].draw(&mut state.rng)
        };
        Access { index, write }
    }

    /// Whether a state from elsewhere belongs to this pattern.
    pub fn accepts(&self, state: &PatternState) -> bool {
        state.cursor < self.data_pages
    }

    fn phase_number(&self, state: &PatternState) -> usize {
        let mut position = (state.accesses.wrapping_mul(u64::from(self.threads))) % self.cycle;
        for (number, phase) in self.spec.phases.iter().enumerate() {
            if position < phase.operations {
                return number;
            }
            position -= phase.operations;
        }
        0
    }
}

/// A range of pages whose popularity follows Zipf's law, scattered in runs of `run` neighbours.
pub struct WorkingSet {
    start: u32,
    pages: u32,
    run: u32,
    /// Number of whole runs, and what a run's rank is multiplied by to scatter it: coprime to it.
    runs: u32,
    stride: u32,
    zipf: Zipf,
}

impl WorkingSet {
    /// Of `all` pages (at least one) those from `start` percent on, `share` percent of all.
    pub fn new(start: u32, share: u32, zipf: f64, locality: u32, all: u32) -> Self {
        let percent = |share: u32| (u64::from(all) * u64::from(share) / 100) as u32;
        let start = percent(start).min(all - 1);
        let pages = percent(share).clamp(1, all - start);
        let run = locality.min(pages);
        let runs = pages / run;
        // Near the golden section, so that runs of close rank lie far apart.
        let mut stride = ((f64::from(runs) * 0.618_034) as u32).max(1);
        while greatest_common_divisor(stride, runs) != 1 {
            stride += 1;
        }
        Self {
            start,
            pages,
            run,
            runs,
            stride,
            zipf: Zipf::new(pages, zipf),
        }
    }

    /// Draws a page.
    pub fn draw(&self, rng: &mut Rng) -> u32 {
        self.start + self.place(self.zipf.draw(rng))
    }

    /// The page with this rank (0 is the most popular): a permutation of `0..pages`.
    fn place(&self, rank: u32) -> u32 {
        debug_assert!(rank < self.pages);
        let (run, offset) = (rank / self.run, rank % self.run);
        if run == self.runs {
            return rank; // the rest that fills no run
        }
        let scattered = u64::from(run) * u64::from(self.stride) % u64::from(self.runs);
        scattered as u32 * self.run + offset
    }
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 {
        a
    } else {
        greatest_common_divisor(b, a % b)
    }
}

/// Ranks 0..n with probability ∝ 1/(rank+1)^s, by rejection-inversion (Hörmann and Derflinger,
/// "Rejection-inversion to generate variates from monotone discrete distributions", 1996): exact,
/// without a table.
struct Zipf {
    n: u32,
    s: f64,
    h_first: f64,
    h_last: f64,
    shortcut: f64,
}

impl Zipf {
    fn new(n: u32, s: f64) -> Self {
        let mut zipf = Self {
            n,
            s,
            h_first: 0.0,
            h_last: 0.0,
            shortcut: 0.0,
        };
        zipf.h_first = zipf.integral(1.5) - 1.0;
        zipf.h_last = zipf.integral(f64::from(n) + 0.5);
        zipf.shortcut = 2.0 - zipf.inverse(zipf.integral(2.5) - zipf.weight(2.0));
        zipf
    }

    fn draw(&self, rng: &mut Rng) -> u32 {
        if self.s == 0.0 {
            return rng.below(u64::from(self.n)) as u32;
        }
        // Accepts more than three draws of four for every n and s.
        loop {
            let u = self.h_last + rng.unit() * (self.h_first - self.h_last);
            let x = self.inverse(u);
            let k = (x + 0.5).floor().clamp(1.0, f64::from(self.n));
            if k - x <= self.shortcut || u >= self.integral(k + 0.5) - self.weight(k) {
                return k as u32 - 1;
            }
        }
    }

    fn weight(&self, x: f64) -> f64 {
        (-self.s * x.ln()).exp()
    }

    /// ∫ x^-s, with the limit ln x for s = 1.
    fn integral(&self, x: f64) -> f64 {
        let log = x.ln();
        let t = (1.0 - self.s) * log;
        let scale = if t.abs() > 1e-8 {
            t.exp_m1() / t
        } else {
            1.0 + t / 2.0
        };
        scale * log
    }

    fn inverse(&self, y: f64) -> f64 {
        let t = (y * (1.0 - self.s)).max(-1.0);
        let scale = if t.abs() > 1e-8 {
            t.ln_1p() / t
        } else {
            1.0 - t / 2.0
        };
        (scale * y).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accesses(profile: Profile, seed: u64, count: usize) -> Vec<Access> {
        let pattern = Pattern::new(profile, 2, 10_000);
        let mut state = PatternState::new(seed, 0);
        (0..count).map(|_| pattern.next(&mut state)).collect()
    }

    #[test]
    fn a_seed_decides_everything() {
        for profile in Profile::ALL {
            assert_eq!(accesses(profile, 7, 5000), accesses(profile, 7, 5000));
            if profile != Profile::Scan {
                assert_ne!(accesses(profile, 7, 5000), accesses(profile, 8, 5000));
            }
        }
        let pattern = Pattern::new(Profile::Db, 2, 10_000);
        let (mut one, mut two) = (PatternState::new(7, 0), PatternState::new(7, 1));
        let differ = (0..100).any(|_| pattern.next(&mut one) != pattern.next(&mut two));
        assert!(differ, "workers share a sequence");
    }

    #[test]
    fn a_saved_state_continues_the_sequence() {
        let pattern = Pattern::new(Profile::Build, 1, 3000);
        let mut state = PatternState::new(3, 0);
        (0..120_000).for_each(|_| _ = pattern.next(&mut state));
        let saved = postcard::to_stdvec(&state).unwrap();
        let mut loaded: PatternState = postcard::from_bytes(&saved).unwrap();
        for _ in 0..50_000 {
            assert_eq!(pattern.next(&mut state), pattern.next(&mut loaded));
        }
    }

    #[test]
    fn mix_and_working_set_follow_the_table() {
        const COUNT: u64 = 150_000; // one cycle of `build`
        for profile in Profile::ALL {
            let pages = 20_000;
            let pattern = Pattern::new(profile, 1, pages);
            let mut state = PatternState::new(11, 0);
            let mut expected_writes = 0.0;
            let (mut writes, mut outside) = (0_u64, 0_u64);
            let mut sequential = 0.0;
            for _ in 0..COUNT {
                let phase = *pattern.phase(&state);
                expected_writes += f64::from(phase.writes) / 100.0;
                sequential += f64::from(phase.sequential) / 100.0;
                let access = pattern.next(&mut state);
                writes += u64::from(access.write);
                let start = pages * phase.set_start / 100;
                let set = start..start + pages * phase.set_share / 100;
                outside += u64::from(!set.contains(&access.index));
            }
            let deviation = (writes as f64 - expected_writes).abs() / expected_writes;
            assert!(deviation < 0.03, "{profile}: {writes} {expected_writes}");
            // Only a sweep leaves the working set.
            assert!(outside as f64 <= sequential * 1.05, "{profile}: {outside}");
        }
    }

    #[test]
    fn ranks_follow_zipfs_law() {
        let n = 1000;
        for s in [0.0, 0.6, 0.99, 1.0, 1.3] {
            let zipf = Zipf::new(n, s);
            let mut rng = Rng::new(1);
            let mut counts = vec![0_u32; n as usize];
            const DRAWS: u32 = 400_000;
            (0..DRAWS).for_each(|_| counts[zipf.draw(&mut rng) as usize] += 1);
            let norm: f64 = (1..=n).map(|k| f64::from(k).powf(-s)).sum();
            for rank in [1_u32, 2, 10, 100] {
                let expected = f64::from(DRAWS) * f64::from(rank).powf(-s) / norm;
                let found = f64::from(counts[rank as usize - 1]);
                let tolerance = 5.0 * expected.sqrt();
                assert!((found - expected).abs() < tolerance, "{s} {rank} {found}");
            }
        }
    }

    #[test]
    fn ranks_are_placed_one_to_one() {
        for (pages, run) in [(1, 1), (7, 16), (1000, 16), (4096, 8), (4099, 4)] {
            let phase = PhaseSpec {
                set_start: 0,
                set_share: 100,
                ..Profile::Web.spec().phases[0]
            };
            let set = WorkingSet::new(phase.set_start, phase.set_share, phase.zipf, run, pages);
            let mut seen: Vec<u32> = (0..pages).map(|rank| set.place(rank)).collect();
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..pages));
        }
    }
}
