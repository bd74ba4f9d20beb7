//! Page contents that can be recomputed: from a seed and the page's number.

/// SplitMix64, a bijection with good avalanche.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Word `index` of a page.
#[allow(dead_code)] // not every user looks at words
pub fn word(seed: u64, page: u32, index: usize) -> u64 {
    mix(mix(seed ^ (u64::from(page) << 20)) ^ index as u64)
}

/// Fills whole pages, the first of which has number `first`.
pub fn fill(seed: u64, first: u32, data: &mut [u8]) {
    for (offset, page) in data.chunks_exact_mut(4096).enumerate() {
        let start = mix(seed ^ (u64::from(first + offset as u32) << 20));
        for (index, bytes) in page.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&mix(start ^ index as u64).to_ne_bytes());
        }
    }
}
