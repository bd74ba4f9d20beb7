//! Whether a block that the guest waits for, and that is on its way in bulk already, is worth sending
//! once more on the urgent lane. Pure functions of times and figures; what to do with the answer is
//! decided elsewhere.

use std::time::Duration;

/// Bytes of a batch in one packet.
const PACKET: f64 = 1350.0;
/// Round trips after which a lost packet has come again.
const REPAIR: f64 = 1.25;
/// What sending a block once more costs on the link, redundancy and all: everything behind it is later
/// by the time that this takes.
const COPY_BYTES: f64 = 8192.0;

/// The link, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path {
    /// Round-trip time with the queue of now; zero while unknown.
    pub(super) rtt: Duration,
    /// Bytes per second.
    pub(super) bandwidth: f64,
    /// Share of packets lost.
    pub(super) loss: f64,
}

/// A batch that was handed out and is not acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct OnTheWay {
    /// When it arrives if nothing of it is lost.
    pub(super) arrival: Duration,
    /// Its length in bytes.
    pub(super) bytes: u64,
}

/// When a batch that is handed out `now` arrives if nothing is lost. `ahead` is what has been handed
/// out before it and must leave first, itself among it, less what was acknowledged.
pub(super) fn arrival(now: Duration, ahead: u64, path: &Path) -> Duration {
    // What is acknowledged comes off at the rate of the link, so that this batch will have been
    // acknowledged once all of that was; half a round trip before it had arrived.
    let drained = ahead as f64 / path.bandwidth.max(1.0);
    let acknowledged = drained.clamp(path.rtt.as_secs_f64(), 1e6);
    (now + Duration::from_secs_f64(acknowledged)).saturating_sub(path.rtt / 2)
}

/// Time that the guest is expected to gain if the block is sent once more now.
pub(super) fn saving(now: Duration, batch: &OnTheWay, path: &Path) -> Duration {
    let rtt = path.rtt.as_secs_f64();
    let again = now.as_secs_f64() + rtt / 2.0;
    let whole = batch.arrival.as_secs_f64();
    let repaired = whole + REPAIR * rtt;
    let gain = |arrival: f64| (arrival - again).max(0.0);
    // It had not arrived when the guest's request was sent: if it should have, it lacks a packet.
    let asked = now.as_secs_f64() - rtt / 2.0;
    let packets = (batch.bytes as f64 / PACKET).ceil().max(1.0);
    let lacking = if whole < asked {
        1.0
    } else {
        1.0 - (1.0 - path.loss.clamp(0.0, 1.0)).powf(packets)
    };
    let expected = lacking * gain(repaired) + (1.0 - lacking) * gain(whole);
    Duration::from_secs_f64(expected)
}

/// When a block that was left to come by itself must be known to be there: its batch has arrived, a lost packet of it
/// has come again, and the word of it is back.
pub(super) fn deadline(now: Duration, arrival: Duration, path: &Path) -> Duration {
    arrival.max(now) + path.rtt.mul_f64(REPAIR + 0.5)
}

/// Whether a block in this batch is to be sent once more.
pub(super) fn worth_a_copy(now: Duration, batch: &OnTheWay, path: &Path) -> bool {
    if path.rtt.is_zero() || path.bandwidth <= 0.0 {
        return true;
    }
    // Later than any repair: whatever it waits for, the guest need not.
    let overdue = batch.arrival + path.rtt.mul_f64(REPAIR) < now;
    let cost = Duration::from_secs_f64(COPY_BYTES / path.bandwidth.max(1.0));
    overdue || saving(now, batch, path) > cost
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 Mbit/s, 100 ms.
    fn path(loss: f64) -> Path {
        Path {
            rtt: Duration::from_millis(100),
            bandwidth: 12.5e6,
            loss,
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn handed_out_at(at: Duration, bytes: u64, ahead: u64) -> OnTheWay {
        OnTheWay {
            arrival: arrival(at, ahead, &path(0.0)),
            bytes,
        }
    }

    #[test]
    fn a_batch_arrives_after_half_a_round_trip_or_when_the_queue_has_gone() {
        assert_eq!(arrival(ms(1000), 10_000, &path(0.0)), ms(1050));
        // 2.5 MB: one round trip's worth is in the pipe, as much again waits here.
        assert_eq!(arrival(ms(1000), 2_500_000, &path(0.0)), ms(1150));
    }

    #[test]
    fn what_left_before_on_a_clean_link_is_not_sent_twice() {
        let batch = handed_out_at(ms(1000), 20_000, 1_250_000);
        for now in [1000, 1020, 1080] {
            assert!(!worth_a_copy(ms(now), &batch, &path(0.0)), "{now}");
        }
    }

    #[test]
    fn what_waits_in_a_deep_queue_is_overtaken() {
        let batch = handed_out_at(ms(1000), 20_000, 4_000_000);
        assert!(worth_a_copy(ms(1010), &batch, &path(0.0)));
        // Once most of the queue has gone it is the sooner of the two.
        assert!(!worth_a_copy(ms(1260), &batch, &path(0.0)));
    }

    #[test]
    fn a_large_batch_on_a_lossy_link_probably_lacks_something() {
        let batch = handed_out_at(ms(1000), 200_000, 1_250_000);
        assert!(worth_a_copy(ms(1010), &batch, &path(0.01)));
        // A small one hardly does where little is lost.
        let small = handed_out_at(ms(1000), 1_000, 1_250_000);
        assert!(!worth_a_copy(ms(1010), &small, &path(0.001)));
    }

    #[test]
    fn what_should_have_been_there_when_it_was_asked_for_lacks_something() {
        let batch = handed_out_at(ms(1000), 20_000, 20_000);
        // Arrival at 1050; asked for at 1060; comes again at 1175, a copy at 1160.
        assert!(worth_a_copy(ms(1110), &batch, &path(0.0)));
        // Nearly repaired already.
        assert!(!worth_a_copy(ms(1150), &batch, &path(0.0)));
        // Not even then: nothing is known of it any more.
        assert!(worth_a_copy(ms(1250), &batch, &path(0.0)));
    }

    #[test]
    fn what_is_left_to_come_by_itself_has_a_deadline() {
        let arrival = arrival(ms(1000), 10_000, &path(0.0));
        assert_eq!(deadline(ms(1010), arrival, &path(0.0)), ms(1225));
        // It should have been there: a repair and its word from now on.
        assert_eq!(deadline(ms(1100), arrival, &path(0.0)), ms(1275));
    }

    #[test]
    fn without_figures_it_is_sent() {
        let unknown = Path {
            rtt: Duration::ZERO,
            ..path(0.0)
        };
        let batch = handed_out_at(ms(1000), 20_000, 20_000);
        assert!(worth_a_copy(ms(1000), &batch, &unknown));
    }
}
