//! How far a packet's delay strays: tc's distributions as tables of quantiles. Only numbers.

use std::sync::OnceLock;

use rand::Rng;
use rand::rngs::SmallRng;

use crate::spec::Distribution;

/// Quantiles of a distribution, at (i + ½)/QUANTILES.
const QUANTILES: usize = 4096;

/// Where tc cuts its normal distribution, in standard deviations, and its Pareto, in jitters.
const CUT: f64 = 4.0;

/// One draw of a random number in [0, 1) that resembles the draw before it, as the kernel makes
/// them (`get_crandom`): a moving average.
#[derive(Clone, Copy, Debug, Default)]
pub struct Correlated {
    last: f64,
}

impl Correlated {
    /// The next draw.
    pub fn draw(&mut self, correlation: f64, rng: &mut SmallRng) -> f64 {
        let fresh = rng.random::<f64>();
        if correlation == 0.0 {
            return fresh;
        }
        self.last = fresh * (1.0 - correlation) + self.last * correlation;
        self.last
    }

    /// Whether a chance of `probability` comes true. Nothing is drawn for a chance of zero, so that
    /// it can be switched on without shifting the fates of what comes after a switch back.
    pub fn hits(&mut self, chance: crate::spec::Chance, rng: &mut SmallRng) -> bool {
        chance.probability > 0.0 && self.draw(chance.correlation, rng) < chance.probability
    }
}

/// How many jitters the delay strays for the share `u` in [0, 1) of all packets.
pub fn deviation(distribution: Distribution, u: f64) -> f64 {
    match distribution {
        Distribution::Uniform => 2.0 * u - 1.0,
        Distribution::Normal => look_up(normal(), u),
        Distribution::Pareto => look_up(pareto(), u),
        Distribution::ParetoNormal => look_up(pareto_normal(), u),
    }
}

fn look_up(table: &[f32], u: f64) -> f64 {
    let index = (u * QUANTILES as f64) as usize;
    f64::from(table[index.min(QUANTILES - 1)])
}

/// The middle of the i-th of [`QUANTILES`] equal shares.
fn share(index: usize) -> f64 {
    (index as f64 + 0.5) / QUANTILES as f64
}

/// The normal distribution within [`CUT`], its density summed up by trapezoids.
fn normal() -> &'static [f32] {
    static TABLE: OnceLock<Vec<f32>> = OnceLock::new();
    TABLE.get_or_init(|| {
        const STEPS: usize = 1 << 16;
        let density = |x: f64| (-x * x / 2.0).exp();
        let step = 2.0 * CUT / STEPS as f64;
        let mut sums = vec![0.0];
        for i in 0..STEPS {
            let x = -CUT + step * i as f64;
            sums.push(sums[i] + step * (density(x) + density(x + step)) / 2.0);
        }
        let all = sums[STEPS];
        let quantile = |index| {
            let place = sums.partition_point(|sum| *sum < share(index) * all);
            (-CUT + step * place as f64) as f32
        };
        (0..QUANTILES).map(quantile).collect()
    })
}

/// iproute2's `netem/pareto.c`: shape 3, shifted to a mean of zero, scaled, cut.
fn pareto() -> &'static [f32] {
    static TABLE: OnceLock<Vec<f32>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let quantile = |index| {
            let rest = 1.0 - share(index);
            let x = (rest.powf(-1.0 / 3.0) - 1.5) * 4.0 / 3.0;
            x.min(CUT) as f32
        };
        (0..QUANTILES).map(quantile).collect()
    })
}

/// iproute2's `netem/paretonormal.c`: a quarter and three quarters, quantile by quantile.
fn pareto_normal() -> &'static [f32] {
    static TABLE: OnceLock<Vec<f32>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let both = normal().iter().zip(pareto());
        both.map(|(normal, pareto)| 0.25 * normal + 0.75 * pareto)
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn moments(distribution: Distribution) -> (f64, f64) {
        let values: Vec<f64> = (0..QUANTILES)
            .map(|index| deviation(distribution, share(index)))
            .collect();
        let mean = values.iter().sum::<f64>() / QUANTILES as f64;
        let squares = values.iter().map(|value| (value - mean).powi(2));
        (mean, (squares.sum::<f64>() / QUANTILES as f64).sqrt())
    }

    #[test]
    fn distributions_have_their_moments() {
        let (mean, deviation) = moments(Distribution::Uniform);
        assert!(mean.abs() < 1e-3 && (deviation - 1.0 / 3f64.sqrt()).abs() < 1e-3);
        let (mean, deviation) = moments(Distribution::Normal);
        assert!(
            mean.abs() < 1e-3 && (deviation - 1.0).abs() < 5e-3,
            "{mean} {deviation}"
        );
        let (mean, _) = moments(Distribution::Pareto);
        assert!(mean.abs() < 0.05, "{mean}");
    }

    #[test]
    fn tails_are_where_tc_has_them() {
        assert!(deviation(Distribution::Normal, 0.0) > -4.0);
        assert!((deviation(Distribution::Normal, 0.975) - 1.96).abs() < 0.01);
        let lowest = deviation(Distribution::Pareto, 0.0);
        assert!((lowest + 2.0 / 3.0).abs() < 1e-3, "{lowest}");
        assert!((deviation(Distribution::Pareto, 0.9999) - CUT).abs() < 1e-6);
        let mixed = deviation(Distribution::ParetoNormal, 0.5);
        let pareto = deviation(Distribution::Pareto, 0.5);
        assert!((mixed - 0.75 * pareto).abs() < 1e-3);
    }

    #[test]
    fn correlated_draws_resemble_each_other() {
        let mut rng = SmallRng::seed_from_u64(3);
        let mut steps = |correlation| -> f64 {
            let mut draws = Correlated::default();
            let mut last = draws.draw(correlation, &mut rng);
            let mut sum = 0.0;
            for _ in 0..10_000 {
                let next = draws.draw(correlation, &mut rng);
                sum += (next - last).abs();
                last = next;
            }
            sum / 10_000.0
        };
        // Two independent uniform draws are a third apart.
        assert!((steps(0.0) - 1.0 / 3.0).abs() < 0.01);
        assert!(steps(0.9) < 0.05);
    }
}
