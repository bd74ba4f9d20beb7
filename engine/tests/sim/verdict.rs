//! How a run ended, and what must hold then.

use std::fmt;

use hybridmig_engine::journal::{Owner, owner};
use hybridmig_engine::session::io::{
    DestinationOutcome, DestinationRecord, SourceOutcome, SourceRecord,
};

use hybridmig_engine::session::source::SourceFigures;

use super::guest::Guest;

/// Everything that is left when both processes have ended.
#[derive(Debug)]
pub struct End {
    pub source: Option<SourceOutcome>,
    pub destination: Option<DestinationOutcome>,
    pub source_journal: Vec<SourceRecord>,
    pub destination_journal: Vec<DestinationRecord>,
    pub source_crashed: bool,
    pub destination_crashed: bool,
    pub figures: SourceFigures,
}

impl End {
    /// Checks what must hold of every end.
    pub fn check(&self, guest: &Guest) {
        guest.check_one_side();
        let owner = owner(Some(&self.source_journal), Some(&self.destination_journal));
        assert_ne!(owner, Owner::Undecided, "both journals are there: {self:?}");
        if guest.source_runs {
            assert_eq!(owner, Owner::Source, "{self:?}");
        }
        if guest.destination_ever_ran {
            assert_eq!(owner, Owner::Destination, "{self:?}");
        }
        if owner == Owner::Source {
            // It runs there, or an operator may thaw it there.
            assert!(!guest.destination_runs, "{self:?}");
            guest.check_source();
        } else {
            let complete = self.source == Some(SourceOutcome::Moved);
            if guest.destination_ever_ran {
                guest.check_destination(complete);
            } else {
                // Accepted, never started: the source has kept everything.
                assert!(!complete, "{self:?}");
                guest.check_source();
            }
        }
        self.check_source_outcome(guest);
        self.check_destination_outcome(guest);
    }

    fn check_source_outcome(&self, guest: &Guest) {
        match &self.source {
            None => assert!(self.source_crashed, "the source never ended: {self:?}"),
            Some(SourceOutcome::Moved) => {
                assert!(guest.destination_ever_ran && !guest.source_runs, "{self:?}");
                assert!(guest.trapped.is_empty(), "released too early: {self:?}");
            }
            Some(
                SourceOutcome::Refused(_)
                | SourceOutcome::Cancelled { .. }
                | SourceOutcome::NotConverged { .. }
                | SourceOutcome::Checked { .. },
            ) => assert!(guest.source_runs, "it should run at the source: {self:?}"),
            Some(SourceOutcome::InDoubt { .. }) => {
                assert!(!guest.source_runs, "{self:?}");
                let last = self.source_journal.last();
                assert!(
                    matches!(last, Some(SourceRecord::HandoverOffered { .. })),
                    "{self:?}"
                );
            }
            Some(SourceOutcome::Incomplete { .. }) => {
                assert!(guest.destination_ever_ran && !guest.source_runs, "{self:?}");
            }
            Some(SourceOutcome::Failed { .. }) => {
                assert!(!guest.destination_ever_ran, "{self:?}");
            }
        }
    }

    fn check_destination_outcome(&self, guest: &Guest) {
        match &self.destination {
            None => assert!(self.destination_crashed, "it never ended: {self:?}"),
            Some(DestinationOutcome::Moved) => {
                assert!(guest.destination_ever_ran, "{self:?}");
                guest.check_destination(true);
            }
            Some(DestinationOutcome::Incomplete { .. }) => {
                assert!(guest.destination_ever_ran, "{self:?}");
            }
            Some(
                DestinationOutcome::Refused(_)
                | DestinationOutcome::Cancelled { .. }
                | DestinationOutcome::Checked
                | DestinationOutcome::Failed { .. },
            ) => assert!(!guest.destination_ever_ran, "{self:?}"),
        }
    }
}

/// Ends by kind.
#[derive(Debug, Default)]
pub struct Tally {
    pub total: u64,
    pub moved: u64,
    pub stayed: u64,
    pub not_converged: u64,
    pub in_doubt: u64,
    pub incomplete: u64,
    pub failed: u64,
    pub crashed: u64,
    pub resumed_links: u64,
    pub rounds: u64,
    pub faults: u64,
    pub on_the_way: u64,
    pub rejected: u64,
    pub left_behind: u64,
    /// Blocks handed out while the guest ran at the source.
    pub sent_before: u64,
}

impl Tally {
    pub fn count(&mut self, end: &End) {
        self.total += 1;
        match &end.source {
            Some(SourceOutcome::Moved) => self.moved += 1,
            Some(
                SourceOutcome::Refused(_)
                | SourceOutcome::Cancelled { .. }
                | SourceOutcome::Checked { .. },
            ) => self.stayed += 1,
            Some(SourceOutcome::NotConverged { .. }) => self.not_converged += 1,
            Some(SourceOutcome::InDoubt { .. }) => self.in_doubt += 1,
            Some(SourceOutcome::Incomplete { .. }) => self.incomplete += 1,
            Some(SourceOutcome::Failed { .. }) => self.failed += 1,
            None => {}
        }
        self.resumed_links += u64::from(end.figures.reconnects);
        self.rounds += end.figures.rounds.len() as u64;
        self.faults += end.figures.faults;
        self.on_the_way += end.figures.faults_on_the_way;
        self.rejected += end.figures.rejected;
        self.left_behind += end.figures.behind;
        self.sent_before += end.figures.precopy.blocks;
        if end.source_crashed || end.destination_crashed {
            self.crashed += 1;
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} runs: {} moved, {} stayed, {} not converged, {} in doubt, {} incomplete, {} failed, \
             {} with a crash; {} rounds, {} blocks left behind, {} faults ({} on the way), {} rejected records, {} \
             resumed links",
            self.total,
            self.moved,
            self.stayed,
            self.not_converged,
            self.in_doubt,
            self.incomplete,
            self.failed,
            self.crashed,
            self.rounds,
            self.left_behind,
            self.faults,
            self.on_the_way,
            self.rejected,
            self.resumed_links
        )
    }
}
