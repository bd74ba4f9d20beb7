//! How the threads of a runner follow the wishes of its handle and the timed changes of the link.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::lock;
use crate::spec::{DirectionSpec, LinkSpec, Stage};

/// What the handle asks for; the threads look through a [`Schedule`].
#[derive(Debug)]
pub(crate) struct Steering {
    wishes: Mutex<Wishes>,
    /// Counts changes, so that the threads look only when there is one.
    changes: AtomicU64,
}

#[derive(Debug)]
struct Wishes {
    link: LinkSpec,
    down: bool,
    /// When the timeline of the link's changes began, in the runner's time.
    zero: Duration,
}

impl Steering {
    /// The link whose timeline begins at zero.
    pub fn new(link: LinkSpec) -> Self {
        Self {
            wishes: Mutex::new(Wishes {
                link,
                down: false,
                zero: Duration::ZERO,
            }),
            changes: AtomicU64::new(0),
        }
    }

    /// Another link, whose timeline begins now.
    pub fn set_link(&self, link: LinkSpec, now: Duration) {
        self.change(|wishes| {
            wishes.link = link;
            wishes.zero = now;
        });
    }

    /// Begins the timeline of the link's changes again.
    pub fn restart_timeline(&self, now: Duration) {
        self.change(|wishes| wishes.zero = now);
    }

    /// Cuts both directions, whatever the timeline says, or leaves them to it again.
    pub fn set_down(&self, down: bool) {
        self.change(|wishes| wishes.down = down);
    }

    fn change(&self, change: impl FnOnce(&mut Wishes)) {
        change(&mut lock(&self.wishes));
        self.changes.fetch_add(1, Ordering::Release);
    }
}

/// What one direction has to do and when. Belongs to its thread.
#[derive(Debug)]
pub(crate) struct Schedule {
    back: bool,
    /// The change of the steering that was seen last.
    seen: Option<u64>,
    /// In the order of time; times are the runner's.
    stages: Vec<Stage>,
    /// The first that is still to come.
    next: usize,
    down: bool,
}

impl Schedule {
    /// Nothing seen yet.
    pub fn new(back: bool) -> Self {
        Self {
            back,
            seen: None,
            stages: Vec::new(),
            next: 0,
            down: false,
        }
    }

    /// What the direction has to do from now on, if that is something else than before: its
    /// settings, and whether it is cut. Cheap when nothing has changed.
    pub fn follow(&mut self, steering: &Steering, now: Duration) -> Option<(DirectionSpec, bool)> {
        let changes = steering.changes.load(Ordering::Acquire);
        if self.seen != Some(changes) {
            self.seen = Some(changes);
            let wishes = lock(&steering.wishes);
            self.stages = wishes.link.stages(self.back);
            self.stages
                .iter_mut()
                .for_each(|stage| stage.from += wishes.zero);
            self.down = wishes.down;
            self.next = 0;
        } else if self.next_change().is_none_or(|next| next > now) {
            return None;
        }
        self.next = self.stages.partition_point(|stage| stage.from <= now);
        // The first begins when the timeline does; before that it holds as well.
        let stage = &self.stages[self.next.saturating_sub(1)];
        Some((stage.spec, stage.down || self.down))
    }

    /// When [`Self::follow`] will have something new, if the handle wishes nothing before.
    pub fn next_change(&self) -> Option<Duration> {
        self.stages.get(self.next).map(|stage| stage.from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn rate(schedule: &mut Schedule, steering: &Steering, now: Duration) -> Option<(u64, bool)> {
        let (spec, down) = schedule.follow(steering, now)?;
        Some((spec.rate.unwrap_or(0) / 1_000_000, down))
    }

    #[test]
    fn follows_the_timeline() {
        let link = "rate 100mbit; at 10s rate 50mbit; at 20s forward down; at 25s up";
        let steering = Steering::new(link.parse().unwrap());
        let mut forward = Schedule::new(false);
        let mut back = Schedule::new(true);
        assert_eq!(
            rate(&mut forward, &steering, Duration::ZERO),
            Some((100, false))
        );
        assert_eq!(rate(&mut forward, &steering, 9 * S), None);
        assert_eq!(forward.next_change(), Some(10 * S));
        assert_eq!(rate(&mut forward, &steering, 10 * S), Some((50, false)));
        assert_eq!(rate(&mut forward, &steering, 21 * S), Some((50, true)));
        assert_eq!(rate(&mut back, &steering, 21 * S), Some((50, false)));
        assert_eq!(rate(&mut forward, &steering, 40 * S), Some((50, false)));
        assert_eq!(forward.next_change(), None);
    }

    #[test]
    fn the_handle_comes_before_the_timeline() {
        let steering = Steering::new("rate 100mbit; at 10s rate 50mbit".parse().unwrap());
        let mut schedule = Schedule::new(false);
        schedule.follow(&steering, Duration::ZERO);
        steering.set_down(true);
        assert_eq!(rate(&mut schedule, &steering, 1 * S), Some((100, true)));
        assert_eq!(rate(&mut schedule, &steering, 10 * S), Some((50, true)));
        steering.set_down(false);
        assert_eq!(rate(&mut schedule, &steering, 11 * S), Some((50, false)));
        steering.restart_timeline(12 * S);
        assert_eq!(rate(&mut schedule, &steering, 12 * S), Some((100, false)));
        assert_eq!(schedule.next_change(), Some(22 * S));
        steering.set_link("rate 7mbit".parse().unwrap(), 13 * S);
        assert_eq!(rate(&mut schedule, &steering, 13 * S), Some((7, false)));
        assert_eq!(schedule.next_change(), None);
    }
}
