//! The guest runs here: asking for what it waits for, and the end.

use std::time::Duration;

use hybridmig_transport::message::{DestinationSummary, Message};

use super::{DestinationMachine, Link, State};
use crate::blocks::{Blocks, RegionId};
use crate::session::io::{DestinationCommand, DestinationRecord};

/// Blocks asked for in one message: what one round of fault events brings, far below the limit of
/// the protocol.
const FETCH_BLOCKS: usize = 64;

impl DestinationMachine {
    /// The guest waits for a block. It may fault before `Armed` has arrived, and while the state is
    /// loaded.
    pub(super) fn fault(&mut self, region: RegionId, block: u32) {
        if !self.missing.contains(region, block) {
            return;
        }
        self.waiting.insert(region, block);
        self.fetch(region, block);
    }

    fn fetch(&mut self, region: RegionId, block: u32) {
        if self.link != Link::Up || self.status_owed || !self.requested.insert(region, block) {
            return;
        }
        self.faults += 1;
        // Faults that come together go together, and none waits for another.
        if let Some(DestinationCommand::Fetch {
            region: same,
            blocks,
        }) = self.commands.back_mut()
            && *same == region
            && blocks.len() < FETCH_BLOCKS
        {
            blocks.push(block);
            return;
        }
        self.command(DestinationCommand::Fetch {
            region,
            blocks: vec![block],
        });
    }

    /// Asks again for everything that the guest waits for, on a new link.
    pub(super) fn fetch_waiting(&mut self) {
        let waiting: Vec<(RegionId, u32)> = self.waiting.iter_blocks().collect();
        for (region, block) in waiting {
            self.fetch(region, block);
        }
    }

    pub(super) fn removed(&mut self, now: Duration, blocks: &Blocks) {
        self.outstanding.subtract(blocks);
        self.settle(now, blocks);
        self.try_arm(now);
    }

    /// These blocks need not come any more.
    pub(super) fn settle(&mut self, now: Duration, blocks: &Blocks) {
        if self.state == State::Arming && !self.armed {
            self.gone_early.union_with(blocks);
        }
        self.missing.subtract(blocks);
        self.waiting.subtract(blocks);
        self.requested.subtract(blocks);
        if self.state == State::PostCopy && self.missing.is_empty() {
            self.enter(now, State::Disarming);
            self.command(DestinationCommand::Disarm);
        }
    }

    pub(super) fn disarmed(&mut self, now: Duration) {
        self.enter(now, State::Completing);
        self.command(DestinationCommand::Journal(DestinationRecord::Complete));
    }

    pub(super) fn completed(&mut self, now: Duration) {
        self.enter(now, State::AwaitReleased);
        self.tell_complete(now);
    }

    pub(super) fn tell_complete(&mut self, _now: Duration) {
        if self.link == Link::Up {
            self.told_complete = true;
            self.send(Message::AllPlaced(DestinationSummary::default()));
        }
    }
}
