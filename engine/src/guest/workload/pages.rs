//! What the guest's pages hold, as a pure function of (seed, page, generation), and how a page is
//! found to be wrong. This file must never read or write guest memory: it works on copies.
//!
//! A page of generation 0 is all zero. Any other begins with a header of 32 bytes:
//!
//! | bytes | content |
//! |---|---|
//! | 0–7   | page number; in the duplicate class the number of the shared content, bit 63 set |
//! | 8–11  | generation, 0 in the duplicate class |
//! | 12–15 | class of content |
//! | 16–23 | XXH3-64 over the body, seeded with guest, page and generation |
//! | 24–31 | zero |
//!
//! The body is divided into the profile's number of parts; a write of generation g replaces part
//! g mod parts, so that part j of a page of generation g was made by the last generation ≤ g that
//! is congruent to j. All numbers are little-endian.

use std::fmt;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::pattern::{Rng, mix};
use super::profile::{ContentShares, DUPLICATE_POOL, Profile};

/// Size of a page in bytes.
pub const PAGE: usize = 4096;
/// A copy of a page.
pub type Page = [u8; PAGE];

const HEADER: usize = 32;
const BODY: usize = PAGE - HEADER;
const SHARED: u64 = 1 << 63;

/// What a page is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Class {
    /// Zeroes; behind the header, once it was written.
    Zero = 1,
    /// Words.
    Text = 2,
    /// One of a few contents that many pages share.
    Duplicate = 3,
    /// Bytes that do not compress.
    Random = 4,
}

/// The contents of one guest.
#[derive(Clone, Copy, Debug)]
pub struct Contents {
    seed: u64,
    shares: ContentShares,
    parts: u32,
}

/// What is wrong with a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongPage {
    /// Its number in guest memory.
    pub page: u32,
    /// The generation that it should have.
    pub generation: u32,
    /// What was found instead.
    pub found: Found,
}

/// What was found in place of the right contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A non-zero byte at this offset in a page that was never written.
    NotZero(usize),
    /// A page of zeroes.
    Empty,
    /// The header of another page or generation: a page that is stale or in the wrong place.
    Other {
        /// Bytes 0–7.
        tag: u64,
        /// Bytes 8–11.
        generation: u32,
    },
    /// The right header over a body that does not match its checksum.
    Checksum,
    /// The first wrong byte, found by comparison with what should be there.
    Byte {
        /// Its offset in the page.
        offset: usize,
        /// What should be there.
        expected: u8,
        /// What is there.
        found: u8,
    },
}

impl fmt::Display for WrongPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            page, generation, ..
        } = self;
        write!(f, "page {page} should have generation {generation} but ")?;
        match &self.found {
            Found::NotZero(offset) => write!(f, "is not zero at byte {offset}"),
            Found::Empty => write!(f, "is all zero"),
            Found::Other { tag, generation } if tag & SHARED != 0 => {
                let tag = tag & !SHARED;
                write!(f, "holds shared content {tag}, generation {generation}")
            }
            Found::Other { tag, generation } => {
                write!(f, "holds page {tag}, generation {generation}")
            }
            Found::Checksum => write!(f, "its body does not match its checksum"),
            Found::Byte {
                offset,
                expected,
                found,
            } => write!(
                f,
                "has {found:#04x} instead of {expected:#04x} at byte {offset}"
            ),
        }
    }
}

impl Contents {
    /// The contents of a guest with this profile, shares and seed.
    pub fn new(profile: Profile, shares: ContentShares, seed: u64) -> Self {
        Self {
            seed,
            shares,
            parts: profile.spec().parts,
        }
    }

    /// The generation that a page has when the guest is started: 0 (all zero) or 1.
    pub fn first_generation(&self, page: u32) -> u32 {
        u32::from(self.class(page) != Class::Zero)
    }

    /// Writes the whole page of a generation.
    pub fn produce(&self, page: u32, generation: u32, out: &mut Page) {
        out.fill(0);
        if generation == 0 {
            return;
        }
        for part in 0..self.parts {
            self.fill_part(page, generation, part, out);
        }
        self.seal(page, generation, out);
    }

    /// Turns a page into its next generation, which is returned with the range of bytes behind the
    /// header that changed.
    pub fn advance(
        &self,
        page: u32,
        generation: u32,
        data: &mut Page,
    ) -> (u32, std::ops::Range<usize>) {
        // 0 means "never written", so the counter skips it when it wraps.
        let next = generation.checked_add(1).unwrap_or(1);
        if next == 1 || self.class(page) == Class::Duplicate {
            self.produce(page, next, data);
            return (next, HEADER..PAGE);
        }
        let part = next % self.parts;
        self.fill_part(page, next, part, data);
        self.seal(page, next, data);
        (next, self.part_range(part))
    }

    /// Checks header and checksum of a copy of a page.
    pub fn check(&self, page: u32, generation: u32, data: &Page) -> Result<(), WrongPage> {
        let wrong = |found| {
            Err(WrongPage {
                page,
                generation,
                found,
            })
        };
        if generation == 0 {
            return match data.iter().position(|byte| *byte != 0) {
                None => Ok(()),
                Some(offset) => wrong(Found::NotZero(offset)),
            };
        }
        let (tag, stamp, class) = self.header(page, generation);
        let found_tag = u64::from_le_bytes(field(data, 0));
        let found_stamp = u32::from_le_bytes(field(data, 8));
        if (found_tag, found_stamp) != (tag, stamp) {
            return wrong(if data.iter().all(|byte| *byte == 0) {
                Found::Empty
            } else {
                Found::Other {
                    tag: found_tag,
                    generation: found_stamp,
                }
            });
        }
        let intact = u32::from_le_bytes(field(data, 12)) == class as u32
            && u64::from_le_bytes(field(data, 16)) == self.checksum(tag, stamp, data)
            && u64::from_le_bytes(field(data, 24)) == 0;
        if intact {
            Ok(())
        } else {
            wrong(Found::Checksum)
        }
    }

    /// Like [`Self::check`], and compares every byte with what it should be.
    pub fn compare(&self, page: u32, generation: u32, data: &Page) -> Result<(), WrongPage> {
        self.check(page, generation, data)?;
        let mut expected = [0; PAGE];
        self.produce(page, generation, &mut expected);
        match (0..PAGE).find(|offset| data[*offset] != expected[*offset]) {
            None => Ok(()),
            Some(offset) => Err(WrongPage {
                page,
                generation,
                found: Found::Byte {
                    offset,
                    expected: expected[offset],
                    found: data[offset],
                },
            }),
        }
    }

    /// The term of a page in its worker's digest, which is the wrapping sum over all pages.
    pub fn digest_term(&self, page: u32, generation: u32) -> u64 {
        mix(mix(self.seed ^ u64::from(page)).wrapping_add(u64::from(generation)))
    }

    /// What a page is filled with, in every generation.
    pub fn class(&self, page: u32) -> Class {
        let draw = (mix(self.seed.rotate_left(17) ^ u64::from(page)) % 100) as u32;
        let ContentShares {
            zero,
            text,
            duplicate,
        } = self.shares;
        if draw < zero {
            Class::Zero
        } else if draw < zero + text {
            Class::Text
        } else if draw < zero + text + duplicate {
            Class::Duplicate
        } else {
            Class::Random
        }
    }

    /// Number of the shared content that a page of the duplicate class has.
    pub fn shared_content(&self, page: u32, generation: u32) -> u64 {
        self.digest_term(page, generation) % u64::from(DUPLICATE_POOL)
    }

    fn header(&self, page: u32, generation: u32) -> (u64, u32, Class) {
        match self.class(page) {
            Class::Duplicate => {
                let shared = self.shared_content(page, generation);
                (SHARED | shared, 0, Class::Duplicate)
            }
            class => (u64::from(page), generation, class),
        }
    }

    fn seal(&self, page: u32, generation: u32, data: &mut Page) {
        let (tag, stamp, class) = self.header(page, generation);
        data[0..8].copy_from_slice(&tag.to_le_bytes());
        data[8..12].copy_from_slice(&stamp.to_le_bytes());
        data[12..16].copy_from_slice(&(class as u32).to_le_bytes());
        let sum = self.checksum(tag, stamp, data);
        data[16..24].copy_from_slice(&sum.to_le_bytes());
        data[24..32].fill(0);
    }

    fn checksum(&self, tag: u64, stamp: u32, data: &Page) -> u64 {
        xxh3_64_with_seed(
            &data[HEADER..],
            mix(mix(self.seed ^ tag) ^ u64::from(stamp)),
        )
    }

    fn part_range(&self, part: u32) -> std::ops::Range<usize> {
        let (part, parts) = (part as usize, self.parts as usize);
        HEADER + BODY * part / parts..HEADER + BODY * (part + 1) / parts
    }

    fn fill_part(&self, page: u32, generation: u32, part: u32, data: &mut Page) {
        // The last generation up to this one that wrote the part; 0 if none has.
        let age = (generation % self.parts + self.parts - part) % self.parts;
        let origin = generation.saturating_sub(age);
        let out = &mut data[self.part_range(part)];
        let key = mix(self.seed ^ mix(u64::from(page) << 32 | u64::from(origin)));
        match self.class(page) {
            Class::Zero => out.fill(0),
            Class::Text => write_words(Rng::new(key.wrapping_add(u64::from(part))), out),
            Class::Random => write_noise(Rng::new(key.wrapping_add(u64::from(part))), out),
            Class::Duplicate => {
                let shared = self.shared_content(page, generation);
                let key = mix(self.seed ^ shared).wrapping_add(u64::from(part));
                write_noise(Rng::new(key), out);
            }
        }
    }
}

fn field<const N: usize>(data: &Page, at: usize) -> [u8; N] {
    data[at..at + N]
        .try_into()
        .expect("a field lies within the page")
}

fn write_noise(mut rng: Rng, out: &mut [u8]) {
    for chunk in out.chunks_mut(8) {
        chunk.copy_from_slice(&rng.next().to_le_bytes()[..chunk.len()]);
    }
}

/// Words of a small vocabulary: what logs, markup and source code look like to a compressor.
fn write_words(mut rng: Rng, out: &mut [u8]) {
    const WORDS: [&[u8]; 32] = [
        b"the ",
        b"of ",
        b"request ",
        b"response ",
        b"user ",
        b"session ",
        b"=\"",
        b"\" ",
        b"<div ",
        b"class ",
        b"return ",
        b"value ",
        b"index ",
        b"error ",
        b"at ",
        b"line ",
        b"GET ",
        b"/static/",
        b"cache ",
        b"hit ",
        b"miss ",
        b"2041-",
        b"07-",
        b"12T",
        b"09:",
        b"struct ",
        b"const ",
        b"let ",
        b"in ",
        b"for ",
        b"{\n",
        b"}\n",
    ];
    let mut at = 0;
    let mut bits = 0_u64;
    let mut left = 0;
    while at < out.len() {
        if left == 0 {
            bits = rng.next();
            left = 12;
        }
        let word = WORDS[(bits & 31) as usize];
        bits >>= 5;
        left -= 1;
        let len = word.len().min(out.len() - at);
        out[at..at + len].copy_from_slice(&word[..len]);
        at += len;
    }
}

#[cfg(test)]
mod tests;
