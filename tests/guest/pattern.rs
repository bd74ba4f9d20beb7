//! What the checkers inside the test guest write: pages whose every byte follows from their number and
//! generation.

/// Length of a page, and of a block of a disk, in bytes.
pub const PAGE: usize = 4096;
/// Words in it.
pub const WORDS: usize = PAGE / 8;

/// Words of a page's head: its number, its generation, the checksum of the rest.
const HEAD: usize = 3;

/// As the guest's hardware sees it: a page of the checker is a page of guest memory.
#[derive(Clone)]
#[repr(align(4096))]
pub struct Page(pub [u64; WORDS]);

/// What a page of this number and generation holds.
pub struct Contents {
    /// Its number.
    pub page: u64,
    /// How often it has been written.
    pub generation: u64,
    /// Words that do not compress.
    pub random: usize,
}

impl Contents {
    /// Calls `word(index, value)` for every word behind the head and returns the head.
    fn generate(&self, mut word: impl FnMut(usize, u64)) -> [u64; HEAD] {
        // Distinct for every page and generation: the multiplication by an odd number and the
        // finisher below are both one-to-one.
        let stamp = mix(self.page << 32 | self.generation);
        let mut state = stamp;
        let mut sum = stamp;
        for index in HEAD..WORDS {
            let value = if index < self.random {
                state = state
                    .wrapping_mul(0x5851_f42d_4c95_7f2d)
                    .wrapping_add(stamp | 1);
                state ^ state >> 29
            } else {
                stamp
            };
            sum = sum.rotate_left(5) ^ value;
            word(index, value);
        }
        [self.page, self.generation, sum]
    }

    /// Makes the page hold this.
    pub fn write(&self, page: &mut Page) {
        let head = self.generate(|index, value| page.0[index] = value);
        page.0[..HEAD].copy_from_slice(&head);
    }

    /// Index of the first wrong word.
    pub fn first_difference(&self, page: &Page) -> Option<usize> {
        let mut wrong = WORDS;
        let head = self.generate(|index, value| {
            if page.0[index] != value && wrong == WORDS {
                wrong = index;
            }
        });
        let in_head = (0..HEAD).find(|index| page.0[*index] != head[*index]);
        in_head.or((wrong < WORDS).then_some(wrong))
    }
}

/// The finisher of splitmix64: one-to-one, every bit of the result depends on every bit of `x`.
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(page: u64, generation: u64) -> (Contents, Page) {
        let contents = Contents {
            page,
            generation,
            random: WORDS / 2,
        };
        let mut written = Page([0; WORDS]);
        contents.write(&mut written);
        (contents, written)
    }

    #[test]
    fn every_flipped_bit_is_found_where_it_is() {
        let (contents, mut page) = contents(7, 3);
        assert_eq!(contents.first_difference(&page), None);
        for bit in 0..PAGE * 8 {
            page.0[bit / 64] ^= 1 << (bit % 64);
            assert_eq!(contents.first_difference(&page), Some(bit / 64));
            page.0[bit / 64] ^= 1 << (bit % 64);
        }
    }

    #[test]
    fn stale_and_misplaced_pages_differ_in_every_word_that_can_be_torn() {
        let (_, page) = contents(7, 3);
        for (number, generation) in [(7, 4), (8, 3), (3, 7)] {
            let (_, other) = contents(number, generation);
            let same = (2..WORDS)
                .filter(|word| page.0[*word] == other.0[*word])
                .count();
            assert_eq!(same, 0);
        }
    }
}
