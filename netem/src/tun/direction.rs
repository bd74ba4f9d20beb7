//! The thread of one direction: deliver what is due, take in what the near device has, sleep until the
//! next of either. It decides nothing about packets; `judge` does.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::device::Device;
use super::gso::{Frame, MAX_FRAME};
use super::judge::Judge;
use super::pool::Pool;
use super::{Shared, Side};
use crate::model::{InFlight, Path};
use crate::runner::{Counters, Schedule};
use crate::sys;

/// Frames read in a row before those that are due get their turn.
const FRAMES_PER_TURN: usize = 64;

/// The longest sleep. A packet cannot tell how long it waited to be read: its time begins then. What
/// can is how much later than asked for the thread woke up.
const HEARTBEAT: Duration = Duration::from_millis(10);

/// How much a [`Margin`] moves at a time, down and up: in balance where one sleep in four ends earlier.
const MARGIN_STEPS: (Duration, Duration) = (Duration::from_nanos(1500), Duration::from_nanos(500));

/// The most that the thread wakes up before it has to: it may be busy for so long each time.
const MARGIN_MAX: Duration = Duration::from_micros(100);

/// How long the thread may be awake for packets that are nearly due, and how long it rests then. Where packets
/// are due more often than a margin apart it would never sleep: the kernel takes a real-time
/// thread off its core for 50 ms when it has used 95 % of a second (`sched_rt_runtime_us`).
const AWAKE_MAX: Duration = Duration::from_millis(1);
const REST: Duration = Duration::from_micros(80);

/// Turns of the loop that take longer than this count as lateness.
const LONG_TURN: Duration = Duration::from_millis(1);

/// A frame longer than this that survives whole is not copied: the buffer it was read into goes on its
/// way. (Of a shorter one, that would waste more than half of the buffer.)
const WORTH_KEEPING: usize = MAX_FRAME / 2;

/// One direction of the link.
pub(super) struct Direction<'a> {
    shared: &'a Shared,
    side: &'a Side,
    source: &'a Device,
    sink: &'a Device,
    schedule: Schedule,
    judge: Judge,
    in_flight: InFlight<Parcel>,
    margin: Margin,
    pool: Pool,
    /// What is read into: [`MAX_FRAME`] bytes.
    scratch: Vec<u8>,
}

/// A frame under way.
#[derive(Debug)]
struct Parcel {
    /// The frame is its first `length` bytes.
    buffer: Vec<u8>,
    length: usize,
    packets: usize,
    /// On the wire.
    bytes: usize,
}

impl<'a> Direction<'a> {
    pub fn new(shared: &'a Shared, path: Path, back: bool) -> Self {
        let (side, other) = if back {
            (&shared.far, &shared.near)
        } else {
            (&shared.near, &shared.far)
        };
        Self {
            shared,
            side,
            source: &side.device,
            sink: &other.device,
            schedule: Schedule::new(back),
            judge: Judge::new(path),
            in_flight: InFlight::new(),
            margin: Margin::default(),
            pool: Pool::default(),
            scratch: vec![0; MAX_FRAME],
        }
    }

    /// Carries packets until the link stops.
    pub fn run(mut self) {
        // Whatever ends it before: from then on no packet arrives, which is as late as can be.
        let ended = Ended(self.shared, &self.side.counters);
        if let Err(error) = self.turn_by_turn() {
            tracing::error!(%error, "a direction of the emulated link has ended");
        }
        drop(ended);
    }

    fn turn_by_turn(&mut self) -> io::Result<()> {
        if !sys::prefer_latency() {
            tracing::debug!("the emulated link runs at ordinary priority");
        }
        let mut polls = [sys::readable(self.source), sys::readable(&self.side.wake)];
        let mut turn = self.shared.now();
        let mut awake_since = turn;
        while !self.shared.stopping.load(Ordering::Relaxed) {
            self.follow_schedule();
            self.deliver();
            let more = self.take_in()?;
            let now = self.shared.now();
            let busy = now.saturating_sub(turn);
            if busy > LONG_TURN {
                self.missed(busy);
            }
            turn = now;
            if more {
                continue;
            }
            let next = self.in_flight.next_due().into_iter();
            let next = next.chain(self.schedule.next_change()).min();
            let next = next.map_or(now + HEARTBEAT, |next| next.min(now + HEARTBEAT));
            let mut until = next.saturating_sub(self.margin.0);
            if until <= now {
                if now.saturating_sub(awake_since) <= AWAKE_MAX {
                    // Nearly due: looking at the source once more takes as long as any other wait.
                    continue;
                }
                until = now + REST;
            }
            sys::wait(&mut polls, Some(until.saturating_sub(now)))?;
            if polls[1].revents != 0 {
                self.side.wake.clear();
            }
            turn = self.shared.now();
            awake_since = turn;
            if polls.iter().all(|poll| poll.revents == 0) {
                self.margin.learn(turn.saturating_sub(until));
            }
            self.missed(turn.saturating_sub(next));
        }
        Ok(())
    }

    /// Notes a time in which the thread looked at nothing: a packet that came then was read late.
    fn missed(&self, time: Duration) {
        self.side.counters.delivered(0, 0, time);
    }

    /// Does what the timeline and the handle ask for.
    fn follow_schedule(&mut self) {
        let now = self.shared.now();
        let Some((spec, down)) = self.schedule.follow(&self.shared.steering, now) else {
            return;
        };
        self.judge.path.set_spec(now, &spec);
        if down != self.judge.path.is_down() {
            self.judge.path.set_down(down);
            if down {
                let lost = self.in_flight.clear();
                Counters::add(&self.side.counters.dropped_down, lost as u64);
            }
        }
    }

    /// Hands what is due to the far device.
    fn deliver(&mut self) {
        let counters = &self.side.counters;
        let mut now = self.shared.now();
        while let Some((due, parcel)) = self.in_flight.pop_due(now) {
            let (packets, bytes) = (parcel.packets as u64, parcel.bytes as u64);
            let delivered = self.sink.write(&parcel.buffer[..parcel.length]);
            now = self.shared.now();
            match delivered {
                Ok(()) => counters.delivered(packets, bytes, now.saturating_sub(due)),
                Err(error) => {
                    // The interface is down, or the kernel finds the packet malformed.
                    tracing::debug!(%error, "the far device did not take a frame");
                    Counters::add(&counters.dropped_relay, packets);
                }
            }
            self.pool.give(parcel.buffer);
        }
    }

    /// Puts what waits at the near device onto the link; whether there may be more.
    fn take_in(&mut self) -> io::Result<bool> {
        for _ in 0..FRAMES_PER_TURN {
            let Some(length) = self.source.read(&mut self.scratch)? else {
                return Ok(false);
            };
            if let Some(frame) = Frame::new(&self.scratch[..length]) {
                let now = self.shared.now();
                let counters = &self.side.counters;
                self.judge.judge(&frame, now, &self.in_flight, counters);
                self.send(length);
                // Reading on would make it late, and saves no system call.
                if self.in_flight.next_due().is_some_and(|due| due <= now) {
                    break;
                }
            }
        }
        Ok(true)
    }

    /// Puts the surviving runs of the frame in the scratch buffer, which has just been judged, under way.
    fn send(&mut self, length: usize) {
        let Some(frame) = Frame::new(&self.scratch[..length]) else {
            return;
        };
        if let [run] = self.judge.runs()
            && length > WORTH_KEEPING
            && run.corrupt.is_none()
            && frame.is_whole(&run.segments)
        {
            let mut buffer = self.pool.take(MAX_FRAME);
            // Fills what a shorter use has left off; usually nothing.
            buffer.resize(MAX_FRAME, 0);
            std::mem::swap(&mut buffer, &mut self.scratch);
            let parcel = Parcel {
                buffer,
                length,
                packets: run.segments.len(),
                bytes: run.bytes,
            };
            self.in_flight
                .push(run.due, run.bytes, run.segments.len(), parcel);
            return;
        }
        for run in self.judge.runs() {
            let mut buffer = self.pool.take(frame.run_length(&run.segments));
            buffer.clear();
            match run.corrupt {
                Some(bits) => frame.write_corrupt(run.segments.start, bits, &mut buffer),
                None => frame.write_run(&run.segments, &mut buffer),
            }
            let parcel = Parcel {
                length: buffer.len(),
                buffer,
                packets: run.segments.len(),
                bytes: run.bytes,
            };
            self.in_flight
                .push(run.due, run.bytes, run.segments.len(), parcel);
        }
    }
}

/// How much earlier than wanted a sleep has to end, for the thread to be there in time: waking up takes as
/// long as the machine takes to notice a timer, which is much of a millisecond's tenth on a virtual one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Margin(Duration);

impl Margin {
    /// Learns from a sleep that took `longer` than asked for: the lower quartile is approached, so that
    /// most sleeps still end in time for no wait at all.
    fn learn(&mut self, longer: Duration) {
        let (down, up) = MARGIN_STEPS;
        self.0 = if longer < self.0 {
            self.0.saturating_sub(down)
        } else {
            (self.0 + up).min(MARGIN_MAX)
        };
    }
}

/// Makes the measurement invalid if the link is to go on.
struct Ended<'a>(&'a Shared, &'a Counters);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if !self.0.stopping.load(Ordering::Relaxed) {
            self.1.delivered(0, 0, Duration::from_nanos(u64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margin_settles_at_the_lower_quartile_and_is_bounded() {
        let mut margin = Margin::default();
        // Evenly between 20 and 60 µs, in an order that looks like none.
        for i in 0..100_000u64 {
            margin.learn(Duration::from_nanos(20_000 + i * 7919 % 40_000));
        }
        let settled = margin.0.as_nanos();
        assert!((25_000..35_000).contains(&settled), "{settled}");
        for _ in 0..1000 {
            margin.learn(Duration::from_secs(1));
        }
        assert_eq!(margin.0, MARGIN_MAX);
        for _ in 0..1000 {
            margin.learn(Duration::ZERO);
        }
        assert!(margin.0 <= MARGIN_STEPS.1, "{margin:?}");
    }
}
