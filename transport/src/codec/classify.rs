//! Quick looks at the contents of one block, so that time is spent only where it pays.

/// Whether every byte is zero.
pub(super) fn is_zero(data: &[u8]) -> bool {
    // Folding 64 bytes at a time compiles to vector code; the early exit per chunk keeps blocks
    // with content cheap.
    let mut chunks = data.chunks_exact(64);
    chunks
        .by_ref()
        .all(|chunk| chunk.iter().fold(0, |any, byte| any | byte) == 0)
        && chunks.remainder().iter().all(|byte| *byte == 0)
}

/// Pieces of a block that [`looks_incompressible`] samples, and bytes of each at most.
const PIECES: usize = 16;
const PIECE: usize = 64;

/// Whether a histogram of sampled bytes looks like noise: then zstd would only cost time.
///
/// For n bytes drawn evenly from 256 values the sum of the squared counts is about n + n²/256.
/// Text and code lie a factor of ten above; 1.5 separates with a wide margin either way. A wrong
/// "yes" costs compression, a wrong "no" costs time; neither costs correctness.
pub(super) fn looks_incompressible(data: &[u8]) -> bool {
    let mut counts = [0_u32; 256];
    // Pieces spread over the block rather than a stride: a stride can meet only the low or only the
    // high bytes of an array of numbers. Nor do they lie at equal distances: of a disk's block, whose
    // files and records begin at multiples of 512 bytes or 4 KiB, that would meet beginnings only.
    let share = data.len() / PIECES;
    let piece = PIECE.min(share);
    if piece == 0 {
        return false;
    }
    for (index, part) in data.chunks_exact(share).take(PIECES).enumerate() {
        // Multiples of 5 go through all sixteenths, neighbours far apart.
        let at = (share - piece) * (index * 5 % PIECES) / (PIECES - 1);
        for byte in &part[at..at + piece] {
            counts[usize::from(*byte)] += 1;
        }
    }
    let n = (PIECES * piece) as u64;
    let squares: u64 = counts.iter().map(|c| u64::from(*c) * u64::from(*c)).sum();
    squares * 2 < (n + n * n / 256) * 3
}

/// Writes `new XOR base` to the end of `out` and returns how many bytes differ.
pub(super) fn xor_into(out: &mut Vec<u8>, new: &[u8], base: &[u8]) -> usize {
    let start = out.len();
    out.extend(new.iter().zip(base).map(|(a, b)| a ^ b));
    out[start..].iter().filter(|byte| **byte != 0).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut block = vec![0; 4096 + 3];
        assert!(is_zero(&block));
        for at in [0, 63, 64, 4095, 4096, 4098] {
            block[at] = 1;
            assert!(!is_zero(&block), "byte {at}");
            block[at] = 0;
        }
    }

    #[test]
    fn a_large_block_of_which_every_page_is_half_noise_is_not_noise() {
        for size in [4096, 65_536] {
            let mut block = vec![7; size];
            for page in block.chunks_exact_mut(4096) {
                SmallRng::seed_from_u64(1).fill_bytes(&mut page[..2048]);
            }
            assert!(!looks_incompressible(&block), "{size}");
            SmallRng::seed_from_u64(2).fill_bytes(&mut block);
            assert!(looks_incompressible(&block), "{size}");
        }
    }

    #[test]
    fn noise_is_told_from_text_and_counters() {
        let mut noise = vec![0; 4096];
        for seed in 0..100 {
            SmallRng::seed_from_u64(seed).fill_bytes(&mut noise);
            assert!(looks_incompressible(&noise));
        }
        let text: Vec<u8> = b"the quick brown fox jumps over the lazy dog. "
            .iter()
            .copied()
            .cycle()
            .take(4096)
            .collect();
        assert!(!looks_incompressible(&text));
        let counters: Vec<u8> = (0..512_u64).flat_map(|n| (n * 77).to_le_bytes()).collect();
        assert!(!looks_incompressible(&counters));
    }
}
