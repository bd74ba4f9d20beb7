//! Which packets are lost on the way: the kernel's models (`loss_event` and what it calls in
//! `net/sched/sch_netem.c`), state by state.

use rand::Rng;
use rand::rngs::SmallRng;

use super::jitter::Correlated;
use crate::spec::Loss;

/// The state of a loss model.
#[derive(Clone, Copy, Debug, Default)]
pub struct LossState {
    random: Correlated,
    chain: Chain,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Chain {
    /// 1 of the four states, "good" of the two.
    #[default]
    Good,
    /// 2.
    GoodInBurst,
    /// 3, "bad" of the two.
    LostInBurst,
    /// 4.
    LostAlone,
}

impl LossState {
    /// Whether the next packet is lost.
    pub fn loses(&mut self, loss: &Loss, rng: &mut SmallRng) -> bool {
        match *loss {
            Loss::None => false,
            Loss::Random(chance) => self.random.hits(chance, rng),
            Loss::State {
                p13,
                p31,
                p32,
                p23,
                p14,
            } => {
                let draw = rng.random::<f64>();
                self.chain = match self.chain {
                    Chain::Good if draw < p14 => Chain::LostAlone,
                    Chain::Good if draw < p14 + p13 => Chain::LostInBurst,
                    Chain::Good => Chain::Good,
                    Chain::GoodInBurst if draw < p23 => Chain::LostInBurst,
                    Chain::GoodInBurst => Chain::GoodInBurst,
                    Chain::LostInBurst if draw < p32 => Chain::GoodInBurst,
                    Chain::LostInBurst if draw < p32 + p31 => Chain::Good,
                    Chain::LostInBurst => Chain::LostInBurst,
                    Chain::LostAlone => Chain::Good,
                };
                matches!(self.chain, Chain::LostInBurst | Chain::LostAlone)
            }
            Loss::Gemodel { p, r, bad, good } => {
                // The state before the transition decides about the packet.
                let was_bad = self.chain != Chain::Good;
                let (leaves, lost) = if was_bad { (r, bad) } else { (p, good) };
                if rng.random::<f64>() < leaves {
                    self.chain = if was_bad {
                        Chain::Good
                    } else {
                        Chain::LostInBurst
                    };
                }
                lost > 0.0 && rng.random::<f64>() < lost
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    /// Share lost, and mean length of a run of losses.
    fn seen(text: &str) -> (f64, f64) {
        let loss = text.parse::<crate::LinkSpec>().unwrap().forward.loss;
        let mut rng = SmallRng::seed_from_u64(5);
        let mut state = LossState::default();
        let (mut lost, mut runs, mut before) = (0u32, 0u32, false);
        for _ in 0..1_000_000 {
            let now = state.loses(&loss, &mut rng);
            lost += u32::from(now);
            runs += u32::from(now && !before);
            before = now;
        }
        (
            f64::from(lost) / 1e6,
            f64::from(lost) / f64::from(runs.max(1)),
        )
    }

    #[test]
    fn shares_are_those_of_the_models() {
        for text in [
            "loss 2%",
            "loss gemodel 0.25% 25%",
            "loss gemodel 1% 10% 70% 0.1%",
            "loss state 0.25% 25%",
            "loss state 1% 30% 20% 50% 0.5%",
            "loss state 0% 100% 0% 100% 2%",
        ] {
            let (share, _) = seen(text);
            let expected = text.parse::<crate::LinkSpec>().unwrap().forward.loss.mean();
            // Bursts make the spread wider than that of independent losses.
            let bound = 0.05 * expected;
            assert!(
                (share - expected).abs() < bound,
                "{text}: {share} for {expected}"
            );
        }
    }

    #[test]
    fn bursts_have_their_length() {
        let (_, run) = seen("loss gemodel 0.25% 25%");
        assert!((run - 4.0).abs() < 0.3, "{run}");
        let (_, run) = seen("loss state 0% 100% 0% 100% 2%");
        assert!((run - 1.0).abs() < 1e-9, "{run}");
    }

    #[test]
    fn correlation_lowers_the_share_as_in_the_kernel() {
        let (share, _) = seen("loss 2% 25%");
        assert!(share > 0.0 && share < 0.02, "{share}");
    }
}
