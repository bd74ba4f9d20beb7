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

/// Bytes of a block that [`looks_incompressible`] samples at most.
const SAMPLE: usize = 1024;

/// Whether a histogram of sampled bytes looks like noise: then zstd would only cost time.
///
/// For n bytes drawn evenly from 256 values the sum of the squared counts is about n + n²/256.
/// Text and code lie a factor of ten above; 1.5 separates with a wide margin either way. A wrong
/// "yes" costs compression, a wrong "no" costs time; neither costs correctness.
pub(super) fn looks_incompressible(data: &[u8]) -> bool {
    let mut counts = [0_u32; 256];
    // Four pieces spread over the block rather than a stride: a stride can meet only the low or
    // only the high bytes of an array of numbers.
    let piece = (SAMPLE / 4).min(data.len() / 4);
    if piece == 0 {
        return false;
    }
    for quarter in data.chunks_exact(data.len() / 4).take(4) {
        for byte in &quarter[..piece] {
            counts[usize::from(*byte)] += 1;
        }
    }
    let n = (4 * piece) as u64;
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
