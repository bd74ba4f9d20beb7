//! A direction in the words of tc(8), for kernels that have `sch_netem`. Only words: nothing is run.

use std::time::Duration;

use crate::model::MAX_IN_FLIGHT;
use crate::spec::{Chance, DirectionSpec, Distribution, Limit, Loss, Setting};

/// IP-level length of the packets that a queue is reckoned in, in bytes.
const FULL_PACKET: u64 = 1500;

/// Why the kernel's netem cannot do what a description says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TcWordsError {
    /// tc refuses this.
    #[error("tc cannot reorder packets without a delay; give one, as in 'delay 10ms reorder 25%'")]
    ReorderWithoutDelay,
}

/// The arguments of `tc qdisc … netem` that do what `spec` says.
///
/// tc knows one limit, in packets, and counts what is queued *and* under way. A queue in time or bytes
/// becomes delay + jitter + queue at the rate in packets of 1500 bytes: exact for full
/// packets, deeper in time for smaller ones.
pub fn netem_words(spec: &DirectionSpec) -> Result<Vec<String>, TcWordsError> {
    if spec.reorder.is_some() && spec.delay.is_zero() {
        return Err(TcWordsError::ReorderWithoutDelay);
    }
    let mut words = Vec::new();
    for setting in spec.settings() {
        match setting {
            // tc has no word for it in versions before 4.16; it is the default.
            Setting::Distribution(Distribution::Uniform) => {}
            Setting::Loss(Loss::Random(chance)) => {
                words.extend(["loss".to_owned(), "random".to_owned()]);
                words.extend(chance_words(chance));
            }
            Setting::Limit(_) => words.extend(["limit".to_owned(), packets(spec).to_string()]),
            other => words.extend(other.to_string().split(' ').map(str::to_owned)),
        }
    }
    Ok(words)
}

fn chance_words(chance: Chance) -> impl Iterator<Item = String> {
    let text = chance.to_string();
    text.split(' ')
        .map(str::to_owned)
        .collect::<Vec<_>>()
        .into_iter()
}

/// The limit as tc counts.
fn packets(spec: &DirectionSpec) -> u64 {
    if let Limit::Packets(packets) = spec.limit {
        return u64::from(packets);
    }
    match (spec.rate, spec.queue()) {
        (Some(rate), Some(queue)) => {
            let held = spec.delay + spec.jitter + queue;
            bytes(held, rate).div_ceil(u128::from(FULL_PACKET)) as u64 + 1
        }
        // Without a rate nothing queues: what is under way is bounded as elsewhere.
        _ => MAX_IN_FLIGHT as u64,
    }
}

fn bytes(time: Duration, rate: u64) -> u128 {
    time.as_nanos() * u128::from(rate) / 8_000_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> String {
        let link: crate::LinkSpec = text.parse().unwrap();
        netem_words(&link.forward).unwrap().join(" ")
    }

    #[test]
    fn queues_become_packets() {
        // 25 ms + 50 ms at 25 MB/s are 1 875 000 bytes.
        assert_eq!(
            words("delay 25ms rate 200mbit loss 0.5% limit 50ms"),
            "delay 25ms rate 200mbit loss random 0.5% limit 1251"
        );
        assert_eq!(words("delay 25ms limit 77"), "delay 25ms limit 77");
        assert_eq!(words("delay 25ms"), "delay 25ms limit 65536");
        assert_eq!(
            words("delay 0ms rate 12mbit limit 15000b"),
            "delay 0ms rate 12mbit limit 11"
        );
    }

    #[test]
    fn every_word_has_its_twin() {
        let netem = "delay 100ms 10ms 25% distribution normal loss gemodel 1% 25% 90% 0.1% \
                     corrupt 0.1% duplicate 1% 5% reorder 25% 50% gap 5 slot 5ms 7ms limit 1000";
        assert_eq!(words(netem), netem);
        assert_eq!(
            words("loss state 1% 30% 20% 50% 0.5% limit 9"),
            "delay 0ms loss state 1% 30% 20% 50% 0.5% limit 9"
        );
        assert_eq!(
            words("loss 1% 25% limit 9"),
            "delay 0ms loss random 1% 25% limit 9"
        );
    }

    #[test]
    fn refuses_what_tc_refuses() {
        let link: crate::LinkSpec = "reorder 5%".parse().unwrap();
        assert_eq!(
            netem_words(&link.forward),
            Err(TcWordsError::ReorderWithoutDelay)
        );
    }
}
