//! The fault threads: read what the guest's userfaultfd says and answer it. They never block on
//! anything but that descriptor, and they allocate nothing per fault.

use std::os::fd::AsFd;
use std::sync::PoisonError;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::Timespec;

use crate::place::{FaultAnswer, Shared, Step};
use crate::uffd::{Event, RawEvent};
use crate::{PagerError, Result};

/// Events taken by one read. Few, so that several threads share a burst.
const EVENTS_PER_READ: usize = 8;
/// How soon to try again what a layout change held up.
const RETRY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Serves until the bell rings or the guest ends.
pub(crate) fn run(shared: &Shared) {
    if let Err(error) = serve(shared) {
        shared.fail(error);
    }
}

fn serve(shared: &Shared) -> Result<()> {
    let mut events = [RawEvent::default(); EVENTS_PER_READ];
    // Zero pages held up; at most one per thread of the guest.
    let mut held_up: Vec<(u16, u32)> = Vec::with_capacity(EVENTS_PER_READ);
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(shared.uffd.as_fd(), PollFlags::IN),
            PollFd::new(&shared.stop.0, PollFlags::IN),
            PollFd::from_borrowed_fd(shared.process.as_fd(), PollFlags::IN),
        ];
        let timeout = (!held_up.is_empty()).then_some(&RETRY);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(PagerError::os("poll of the userfaultfd", error)),
        }
        let [faults, stop, process] = fds.map(|fd| fd.revents());
        if !stop.is_empty() {
            return Ok(());
        }
        if !process.is_empty() {
            return Err(PagerError::GuestGone {
                pid: shared.process.pid(),
            });
        }
        if faults.contains(PollFlags::IN) {
            let count = read_events(shared, &mut events)?;
            let now = Instant::now();
            for event in &events[..count] {
                answer(shared, event.decode(), now, &mut held_up)?;
            }
        } else if !faults.is_empty() {
            return Err(PagerError::os(
                format!(
                    "poll of the userfaultfd of process {}: {faults:?}",
                    shared.process.pid()
                ),
                std::io::Error::from(std::io::ErrorKind::InvalidData),
            ));
        }
        let mut index = 0;
        while let Some(&(region, block)) = held_up.get(index) {
            match shared.zero(region, block)? {
                Step::Done => {
                    held_up.swap_remove(index);
                }
                Step::HeldUp => index += 1,
            }
        }
    }
}

/// Reads events and applies those that change the layout, in one critical section: see
/// [`crate::place`] on why.
fn read_events(shared: &Shared, events: &mut [RawEvent]) -> Result<usize> {
    let mut layout = shared
        .layout
        .write()
        .unwrap_or_else(PoisonError::into_inner);
    let count = shared
        .uffd
        .read(events)
        .map_err(|error| shared.uffd_error("reading the userfaultfd", error))?;
    for event in &events[..count] {
        match event.decode() {
            Event::Remove { start, end } => {
                for (region, first, count) in layout.blocks_in(start, end) {
                    shared.missing.clear_range(region, first, count);
                }
            }
            Event::Unmap { start, end } => layout.forget(start, end),
            Event::Fault { .. } | Event::Other(_) => {}
        }
    }
    Ok(count)
}

fn answer(
    shared: &Shared,
    event: Event,
    now: Instant,
    held_up: &mut Vec<(u16, u32)>,
) -> Result<()> {
    match event {
        Event::Fault { address, thread } => {
            let Some((region, block)) = shared.layout().block_at(address) else {
                // Unmapped meanwhile: let it fault again and find nothing.
                return shared
                    .uffd
                    .wake(address, crate::PAGE_SIZE as u64)
                    .map_err(|error| shared.uffd_error("UFFDIO_WAKE", error));
            };
            shared.waiters.waits(thread, region, block, now);
            let requested = shared.missing.contains(region, block)
                && shared.sink.fault(region, block) == FaultAnswer::Requested;
            if !requested {
                // Known zero, given back, never written, or placed since: in the last case the
                // kernel says so and we only wake.
                shared.waiters.zeroed();
                if shared.zero(region, block)? == Step::HeldUp {
                    held_up.push((region, block));
                }
            }
            shared.waiters.name(thread);
        }
        Event::Remove { start, end } => {
            let layout = shared.layout();
            for (region, first, count) in layout.blocks_in(start, end) {
                shared.sink.removed(region, first, count);
                // Who waited here faults again and gets a zero page.
                if shared.waiters.any() {
                    shared
                        .uffd
                        .wake(start, end - start)
                        .map_err(|error| shared.uffd_error("UFFDIO_WAKE", error))?;
                    shared.waiters.woken(region, first, count, now);
                }
            }
        }
        // The layout has been changed already; the blocks stay in the file, and stay missing.
        Event::Unmap { .. } => {}
        Event::Other(number) => {
            tracing::warn!(number, "unexpected userfaultfd event");
        }
    }
    Ok(())
}
