//! What the steps of a handover cost. Assumed until a guest of the kind has been moved here once; learned from then on,
//! and kept between sessions.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::records;
use crate::report::Downtime;

/// A duration that varies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Mean, in seconds.
    pub mean: f64,
    /// Standard deviation, in seconds.
    pub sd: f64,
    /// Times it was seen; 0 for an assumption.
    pub seen: u32,
}

/// Weight of the newest sight once there are many.
const WEIGHT: f64 = 0.25;

impl Cost {
    const fn assumed(mean: f64, sd: f64) -> Self {
        Self { mean, sd, seen: 0 }
    }

    /// One more sight.
    fn saw(&mut self, seconds: f64) {
        if !seconds.is_finite() || seconds < 0.0 {
            return;
        }
        // What was assumed weighs as much as one sight.
        let weight = (1.0 / f64::from(self.seen + 2)).max(WEIGHT);
        let off = seconds - self.mean;
        self.mean += weight * off;
        self.sd = ((1.0 - weight) * (self.sd * self.sd + weight * off * off)).sqrt();
        self.seen = self.seen.saturating_add(1);
    }

    fn is_sound(&self) -> bool {
        let sound = |value: f64| value.is_finite() && (0.0..3600.0).contains(&value);
        sound(self.mean) && sound(self.sd)
    }
}

/// The steps of a handover that do not depend on how much moves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Stopping the guest.
    pub stop: Cost,
    /// Scans of the stopped guest, both.
    pub scan: Cost,
    /// Saving the device state.
    pub save: Cost,
    /// What the way of the freeze takes beside its bytes and half a round trip: journal, encoding, applying.
    pub overhead: Cost,
    /// At the destination, from all in place to the guest running: discarding, loading, journal, starting.
    pub load: Cost,
    /// After the last block is in place: until both sides know and the guest is released.
    pub finish: Cost,
    /// Session begun → tracking on, in round trips' absence.
    pub start: Cost,
    /// Length of the device state in bytes.
    pub state_bytes: f64,
}

impl Costs {
    /// Assumed of a kind of guest, before one was seen.
    pub fn assumed(guest_kind: &str) -> Self {
        let qemu = guest_kind != "workload";
        let pick = |vm: f64, process: f64| if qemu { vm } else { process };
        Self {
            stop: Cost::assumed(pick(0.006, 0.003), 0.004),
            scan: Cost::assumed(0.004, 0.003),
            save: Cost::assumed(pick(0.03, 0.003), pick(0.02, 0.003)),
            overhead: Cost::assumed(0.010, 0.008),
            load: Cost::assumed(pick(0.05, 0.015), pick(0.03, 0.01)),
            finish: Cost::assumed(0.02, 0.02),
            start: Cost::assumed(pick(0.15, 0.05), 0.05),
            state_bytes: pick(400e3, 4e3),
        }
    }

    /// What a handover has shown. `bytes_time` is what its bytes and half a round trip must have taken.
    pub fn saw(&mut self, parts: &Downtime, bytes_time: f64, state_bytes: f64) {
        self.stop.saw(parts.stop);
        self.scan.saw(parts.scan);
        self.save.saw(parts.save_state);
        self.overhead.saw((parts.transit - bytes_time).max(0.0));
        self.load
            .saw(parts.discard + parts.load + parts.journal + parts.resume);
        if state_bytes.is_finite() && state_bytes >= 0.0 {
            self.state_bytes = state_bytes;
        }
    }

    /// What the end has shown.
    pub fn saw_ends(&mut self, start: f64, finish: f64) {
        self.start.saw(start);
        self.finish.saw(finish);
    }

    fn is_sound(&self) -> bool {
        let all = [
            self.stop,
            self.scan,
            self.save,
            self.overhead,
            self.load,
            self.finish,
            self.start,
        ];
        all.iter().all(Cost::is_sound)
            && self.state_bytes.is_finite()
            && (0.0..=1e10).contains(&self.state_bytes)
    }
}

/// Name of the file in the state directory.
const FILE: &str = "costs.json";
/// Kinds of guests and destinations kept.
const MAX_KINDS: usize = 64;
const MAX_LINKS: usize = 1024;
/// Longest file: room for all of those, and for long names.
const MAX_BYTES: u64 = 1 << 20;

/// A link, as it was last.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkSeen {
    /// Bytes per second.
    pub bandwidth: f64,
    /// Smallest round trip in seconds.
    pub rtt: f64,
    /// Share of packets lost, 0 to 1.
    pub loss: f64,
    /// When, in seconds since 1970.
    pub unix: f64,
}

impl LinkSeen {
    fn is_sound(&self) -> bool {
        let sound = |value: f64, most: f64| value.is_finite() && (0.0..=most).contains(&value);
        sound(self.bandwidth, 1e12)
            && sound(self.rtt, 60.0)
            && sound(self.loss, 1.0)
            && sound(self.unix, 1e11)
    }
}

/// What is remembered of migrations from this host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Remembered {
    /// By kind of guest: what the steps cost.
    guests: BTreeMap<String, Costs>,
    /// By destination, as it was named.
    links: BTreeMap<String, LinkSeen>,
}

impl Remembered {
    /// Reads the file of a state directory. What cannot be read or is not sound counts as not remembered: the reason
    /// comes with it.
    pub fn read(state_dir: &Path) -> (Self, Option<String>) {
        let path = state_dir.join(FILE);
        match records::read::<Self>(&path, MAX_BYTES) {
            Ok(mut remembered) => {
                remembered.guests.retain(|_, costs| costs.is_sound());
                remembered.links.retain(|_, link| link.is_sound());
                (remembered, None)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (Self::default(), None),
            Err(error) => (
                Self::default(),
                Some(format!("{}: {error}", path.display())),
            ),
        }
    }

    /// The costs of a kind of guest.
    pub fn of(&self, guest_kind: &str) -> Costs {
        let known = self.guests.get(guest_kind).copied();
        known.unwrap_or_else(|| Costs::assumed(guest_kind))
    }

    /// The link to a destination, if a guest went there before.
    pub fn link(&self, destination: &str) -> Option<LinkSeen> {
        self.links.get(destination).copied()
    }

    /// Takes in what a migration has shown. Of too many kinds and destinations new ones are passed over.
    pub fn learn(&mut self, guest_kind: &str, costs: Costs, destination: &str, link: LinkSeen) {
        if costs.is_sound() && has_room(&self.guests, guest_kind, MAX_KINDS) {
            self.guests.insert(guest_kind.to_owned(), costs);
        }
        if link.is_sound() && has_room(&self.links, destination, MAX_LINKS) {
            self.links.insert(destination.to_owned(), link);
        }
    }

    /// Writes the file. Another session may do the same: the last one wins, and a reader sees one or the other whole.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn keep(&self, state_dir: &Path) -> std::io::Result<()> {
        records::write(&state_dir.join(FILE), self)
    }
}

fn has_room<T>(known: &BTreeMap<String, T>, name: &str, most: usize) -> bool {
    known.len() < most || known.contains_key(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_seen_takes_the_place_of_what_was_assumed() {
        let mut costs = Costs::assumed("qemu");
        let parts = Downtime {
            stop: 0.02,
            load: 0.2,
            transit: 0.15,
            ..Downtime::default()
        };
        for _ in 0..40 {
            costs.saw(&parts, 0.1, 1e6);
        }
        assert!((costs.load.mean - 0.2).abs() < 0.01, "{costs:?}");
        assert!((costs.overhead.mean - 0.05).abs() < 0.01, "{costs:?}");
        assert!(costs.load.sd < 0.02, "{costs:?}");
        assert!((costs.state_bytes - 1e6).abs() < 1.0);
    }

    #[test]
    fn what_is_kept_comes_back_and_what_is_broken_is_said() {
        let place = tempfile::tempdir().unwrap();
        let mut costs = Costs::assumed("qemu");
        costs.saw_ends(0.3, 0.1);
        let (mut remembered, error) = Remembered::read(place.path());
        assert_eq!(
            (remembered.of("qemu"), error),
            (Costs::assumed("qemu"), None)
        );
        let link = LinkSeen {
            bandwidth: 25e6,
            rtt: 0.1,
            loss: 0.01,
            unix: 1e9,
        };
        remembered.learn("qemu", costs, "far:4433", link);
        remembered.keep(place.path()).unwrap();
        let (again, error) = Remembered::read(place.path());
        assert_eq!(error, None);
        assert!((again.of("qemu").start.mean - costs.start.mean).abs() < 1e-12);
        assert_eq!(again.of("qemu").start.seen, 1);
        assert_eq!(again.link("far:4433"), Some(link));
        assert_eq!(again.link("near:4433"), None);
        assert_eq!(again.of("workload"), Costs::assumed("workload"));
        let mut wild = serde_json::to_value(&again).unwrap();
        wild["guests"]["qemu"]["load"]["mean"] = (-1.0).into();
        std::fs::write(place.path().join(FILE), wild.to_string()).unwrap();
        assert_eq!(
            Remembered::read(place.path()).0.of("qemu"),
            Costs::assumed("qemu")
        );
        std::fs::write(place.path().join(FILE), "{").unwrap();
        let (_, error) = Remembered::read(place.path());
        assert!(error.unwrap().contains(FILE));
    }
}
