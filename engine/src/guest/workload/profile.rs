//! The access profiles of the embedded guest, as one table of numbers. `docs/workload.md` shows the
//! same table to people. This file must never know how an access is made.
//!
//! The profiles are access *patterns* in the form that the literature on workloads uses (working
//! set, Zipf popularity, read/write mix, sequential sweeps); they are named for the kind of machine
//! that they resemble and claim nothing about a particular product.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which access pattern a guest follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Next to nothing happens: timers, a log line.
    Idle,
    /// Mostly reads, few hot pages: a web server with its caches.
    Web,
    /// A third writes, flat popularity, contents that do not compress: a database.
    Db,
    /// Phases with working sets of their own: a compiler run.
    Build,
    /// Sweeps over all memory, half of it writes: the worst case for pre-copy.
    Scan,
}

/// Shares of page contents in percent; what is left to 100 is random bytes. Written as
/// `zero:text:duplicate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentShares {
    /// Pages that are all zero until they are first written.
    pub zero: u32,
    /// Pages of words, which zstd packs to about a third.
    pub text: u32,
    /// Pages that are byte for byte equal to others: one of `DUPLICATE_POOL` contents.
    pub duplicate: u32,
}

impl fmt::Display for ContentShares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.zero, self.text, self.duplicate)
    }
}

impl FromStr for ContentShares {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Result<Vec<u32>, _> = text.split(':').map(str::parse).collect();
        match parts.as_deref() {
            Ok([zero, text, duplicate]) => Some(Self {
                zero: *zero,
                text: *text,
                duplicate: *duplicate,
            }),
            _ => None,
        }
        .filter(Self::is_sound)
        .ok_or_else(|| {
            format!(
                "'{text}' is not a mix of contents: three percentages zero:text:duplicate are \
                 expected, 100 in sum at most"
            )
        })
    }
}

impl ContentShares {
    /// Whether the shares make a whole.
    pub fn is_sound(&self) -> bool {
        let sum = u64::from(self.zero) + u64::from(self.text) + u64::from(self.duplicate);
        sum <= 100
    }
}

/// Number of different contents among the pages of the duplicate class.
pub const DUPLICATE_POOL: u32 = 64;

/// One phase of a profile. All rates and counts are of the whole guest at factor 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PhaseSpec {
    /// What the phase is called.
    pub name: &'static str,
    /// Length in operations, over all workers. A profile with one phase repeats it.
    pub operations: u64,
    /// Page accesses per second.
    pub rate: u32,
    /// Share of accesses that write, in percent.
    pub writes: u32,
    /// Share of accesses that continue a sweep over all pages, in percent. The others draw from the
    /// working set.
    pub sequential: u32,
    /// Where the working set begins, in percent of the data pages.
    pub set_start: u32,
    /// Length of the working set, in percent of the data pages.
    pub set_share: u32,
    /// Exponent of the Zipf popularity within the working set; 0 is uniform.
    pub zipf: f64,
}

impl PhaseSpec {
    /// Page writes per second at factor 1.
    pub fn writes_per_second(&self) -> f64 {
        f64::from(self.rate) * f64::from(self.writes) / 100.0
    }
}

/// All numbers of one profile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProfileSpec {
    /// Contents of the pages.
    pub contents: ContentShares,
    /// A write replaces one of this many equal parts of the page (and the page's header).
    pub parts: u32,
    /// Length in pages of the runs of neighbours with similar popularity.
    pub locality: u32,
    /// The phases, in the order in which they follow each other for ever.
    pub phases: &'static [PhaseSpec],
}

impl Profile {
    /// Every profile.
    pub const ALL: [Self; 5] = [Self::Idle, Self::Web, Self::Db, Self::Build, Self::Scan];

    /// The profile's numbers.
    pub fn spec(self) -> &'static ProfileSpec {
        match self {
            Self::Idle => &IDLE,
            Self::Web => &WEB,
            Self::Db => &DB,
            Self::Build => &BUILD,
            Self::Scan => &SCAN,
        }
    }

    /// The profile's name, as the command line takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Web => "web",
            Self::Db => "db",
            Self::Build => "build",
            Self::Scan => "scan",
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Profile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|profile| profile.name() == text)
            .ok_or_else(|| {
                format!("'{text}' is not a profile: idle, web, db, build or scan is expected")
            })
    }
}

const IDLE: ProfileSpec = ProfileSpec {
    contents: ContentShares {
        zero: 60,
        text: 20,
        duplicate: 10,
    },
    parts: 16,
    locality: 16,
    phases: &[PhaseSpec {
        name: "idle",
        operations: 10_000,
        rate: 200,
        writes: 10,
        sequential: 0,
        set_start: 0,
        set_share: 2,
        zipf: 1.0,
    }],
};

const WEB: ProfileSpec = ProfileSpec {
    contents: ContentShares {
        zero: 20,
        text: 45,
        duplicate: 15,
    },
    parts: 8,
    locality: 8,
    phases: &[PhaseSpec {
        name: "serve",
        operations: 1_000_000,
        rate: 20_000,
        writes: 10,
        sequential: 5,
        set_start: 10,
        set_share: 20,
        zipf: 0.99,
    }],
};

const DB: ProfileSpec = ProfileSpec {
    contents: ContentShares {
        zero: 10,
        text: 30,
        duplicate: 10,
    },
    parts: 4,
    locality: 4,
    phases: &[PhaseSpec {
        name: "transactions",
        operations: 1_000_000,
        rate: 30_000,
        writes: 35,
        sequential: 10,
        set_start: 20,
        set_share: 40,
        zipf: 0.8,
    }],
};

const BUILD: ProfileSpec = ProfileSpec {
    contents: ContentShares {
        zero: 30,
        text: 40,
        duplicate: 10,
    },
    parts: 1,
    locality: 32,
    phases: &[
        PhaseSpec {
            name: "compile",
            operations: 100_000,
            rate: 20_000,
            writes: 45,
            sequential: 20,
            set_start: 0,
            set_share: 30,
            zipf: 0.6,
        },
        PhaseSpec {
            name: "link",
            operations: 30_000,
            rate: 15_000,
            writes: 60,
            sequential: 80,
            set_start: 30,
            set_share: 30,
            zipf: 0.0,
        },
        PhaseSpec {
            name: "test",
            operations: 20_000,
            rate: 10_000,
            writes: 15,
            sequential: 10,
            set_start: 60,
            set_share: 20,
            zipf: 0.9,
        },
    ],
};

const SCAN: ProfileSpec = ProfileSpec {
    contents: ContentShares {
        zero: 5,
        text: 25,
        duplicate: 5,
    },
    parts: 1,
    locality: 1,
    phases: &[PhaseSpec {
        name: "sweep",
        operations: 1_000_000,
        rate: 25_000,
        writes: 50,
        sequential: 100,
        set_start: 0,
        set_share: 100,
        zipf: 0.0,
    }],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for profile in Profile::ALL {
            assert_eq!(profile.name().parse(), Ok(profile));
        }
        assert!("WEB ".parse::<Profile>().is_err());
    }

    #[test]
    fn mixes_parse_or_say_why_not() {
        let mix = ContentShares {
            zero: 20,
            text: 30,
            duplicate: 50,
        };
        assert_eq!("20:30:50".parse(), Ok(mix));
        for bad in [
            "",
            "20:30",
            "20:30:51",
            "1:2:3:4",
            "4294967295:1:1",
            "-1:0:0",
        ] {
            assert!(bad.parse::<ContentShares>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_table_is_sound() {
        for profile in Profile::ALL {
            let spec = profile.spec();
            let shares = spec.contents;
            assert!(shares.is_sound());
            assert!(spec.parts > 0 && spec.locality > 0 && !spec.phases.is_empty());
            for phase in spec.phases {
                assert!(phase.operations > 0 && phase.rate > 0);
                assert!(phase.writes <= 100 && phase.sequential <= 100);
                assert!(phase.set_share > 0 && phase.set_start + phase.set_share <= 100);
            }
        }
    }

    #[test]
    fn the_documentation_shows_the_same_numbers() {
        let text = include_str!("../../../../docs/workload.md");
        let shown = |row: String| assert!(text.contains(&row), "docs/workload.md lacks: {row}");
        for profile in Profile::ALL {
            let spec = profile.spec();
            for phase in spec.phases {
                let length = match spec.phases.len() {
                    1 => "for ever".to_string(),
                    _ => phase.operations.to_string(),
                };
                shown(format!(
                    "| {profile} | {} | {length} | {} | {} % | {} | {} % | {} % from {} % | {} |",
                    phase.name,
                    phase.rate,
                    phase.writes,
                    phase.writes_per_second(),
                    phase.sequential,
                    phase.set_share,
                    phase.set_start,
                    phase.zipf
                ));
            }
            let ContentShares {
                zero,
                text,
                duplicate,
            } = spec.contents;
            shown(format!(
                "| {profile} | {zero} % | {text} % | {duplicate} % | {} % | 1/{} of the page | {} pages |",
                100 - zero - text - duplicate,
                spec.parts,
                spec.locality
            ));
        }
    }
}
