//! Latencies in classes of about an eighth of their size: fine enough for percentiles, few enough for a console.

/// Classes in which the size doubles.
pub const STEPS: usize = 8;
/// How many there are; the last one takes whatever is longer (2³⁶ µs are a day).
pub const CLASSES: usize = 34 * STEPS;

/// The class of a latency in µs: exact below [`STEPS`], then [`STEPS`] to each doubling.
pub fn class(us: u64) -> usize {
    if us < STEPS as u64 {
        return us as usize;
    }
    let power = us.ilog2() as usize;
    let step = (us >> (power - 3)) as usize & (STEPS - 1);
    ((power - 2) * STEPS + step).min(CLASSES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_grow_one_by_one_with_the_latency() {
        let mut last = 0;
        for us in 1..1_000_000 {
            let this = class(us);
            assert!(this == last || this == last + 1, "{us}");
            last = this;
        }
        assert_eq!(class(u64::MAX), CLASSES - 1);
    }
}
