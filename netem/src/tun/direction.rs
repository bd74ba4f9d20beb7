//! The thread of one direction: deliver what is due, take in what the near device has, sleep until the
//! next of either. Fates are drawn for every packet of the link's MTU; what survives in a row
//! and arrives at nearly the same time is delivered as one super-packet.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::device::Device;
use super::gso::{Frame, MAX_FRAME};
use super::pool::Pool;
use super::{Shared, Side};
use crate::model::{Dropped, Fate, InFlight, MAX_IN_FLIGHT, Path};
use crate::runner::{Counters, Schedule};
use crate::sys;

/// Frames read in a row before those that are due get their turn.
const FRAMES_PER_TURN: usize = 64;

/// The most link time between the first and the last packet that are delivered together.
const RUN_TIME: Duration = Duration::from_micros(250);

/// The longest sleep. A packet cannot tell how long it waited to be read: its time begins then. What
/// can is how much later than asked for the thread woke up.
const HEARTBEAT: Duration = Duration::from_millis(10);

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

/// Consecutive packets of a frame that arrive together.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    segments: Range<usize>,
    /// When the first one is due, and the last one.
    first_due: Duration,
    due: Duration,
    bytes: usize,
    /// Flip a bit of it, chosen by this number; the run is one packet.
    corrupt: Option<u64>,
}

/// Draws the fates of a frame's packets.
struct Judge {
    path: Path,
    /// The runs of the frame judged last.
    runs: Vec<Run>,
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
            judge: Judge {
                path,
                runs: Vec::new(),
            },
            in_flight: InFlight::new(),
            pool: Pool::default(),
            scratch: vec![0; MAX_FRAME],
        }
    }

    /// The loop, until the link stops.
    pub fn run(&mut self) -> io::Result<()> {
        if !sys::prefer_latency() {
            tracing::debug!("the emulated link runs at ordinary priority");
        }
        let mut polls = [sys::readable(self.source), sys::readable(&self.side.wake)];
        let mut turn = self.shared.now();
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
            let until = next.map_or(now + HEARTBEAT, |next| next.min(now + HEARTBEAT));
            let sleep = until.saturating_sub(now);
            if sleep.is_zero() {
                continue;
            }
            sys::wait(&mut polls, Some(sleep))?;
            if polls[1].revents != 0 {
                self.side.wake.clear();
            }
            turn = self.shared.now();
            self.missed(turn.saturating_sub(until));
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
        let path = &mut self.judge.path;
        path.set_spec(now, &spec);
        if down != path.is_down() {
            path.set_down(down);
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
                self.judge
                    .judge(&frame, now, &self.in_flight, &self.side.counters);
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
        if let [run] = self.judge.runs.as_slice()
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
        for run in &self.judge.runs {
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

impl Judge {
    /// Draws the fates of a frame's packets, counts those that are lost and leaves the others as runs.
    fn judge(
        &mut self,
        frame: &Frame<'_>,
        now: Duration,
        in_flight: &InFlight<Parcel>,
        counters: &Counters,
    ) {
        self.runs.clear();
        let segments = frame.segments();
        let (mut held, mut held_bytes, mut total, mut doubled) = (in_flight.held(), 0, 0, 0);
        for index in 0..segments {
            let bytes = frame.segment_bytes(index);
            total += bytes;
            // Twice: it may be doubled.
            let room = held + 2 <= MAX_IN_FLIGHT && in_flight.has_room(held_bytes + 2 * bytes);
            if !room {
                counters.dropped(Dropped::Overflow);
                continue;
            }
            match self.path.admit(now, bytes, held) {
                Ok(fate) => {
                    let copies = self.add(index, bytes, &fate);
                    held += copies;
                    held_bytes += copies * bytes;
                    doubled += copies - 1;
                    if fate.corrupt.is_some() {
                        Counters::add(&counters.corrupted, 1);
                    }
                }
                Err(why) => counters.dropped(why),
            }
        }
        Counters::add(&counters.packets, segments as u64);
        Counters::add(&counters.bytes, total as u64);
        if doubled > 0 {
            Counters::add(&counters.duplicated, doubled as u64);
        }
    }

    /// Adds a packet that is not lost to the runs; with its copies.
    fn add(&mut self, index: usize, bytes: usize, fate: &Fate) -> usize {
        let alone = |due, corrupt| Run {
            segments: index..index + 1,
            first_due: due,
            due,
            bytes,
            corrupt,
        };
        match self.runs.last_mut() {
            Some(run)
                if fate.corrupt.is_none()
                    && run.corrupt.is_none()
                    && run.segments.end == index
                    && run.due <= fate.due
                    && fate.due <= run.first_due + RUN_TIME =>
            {
                run.segments.end += 1;
                run.due = fate.due;
                run.bytes += bytes;
            }
            _ => self.runs.push(alone(fate.due, fate.corrupt)),
        }
        // The copy ends the run: what follows begins another.
        match fate.duplicate {
            Some(due) => {
                self.runs.push(alone(due, None));
                2
            }
            None => 1,
        }
    }
}
