//! The guest runs at the destination: answering its faults, pushing the rest, and the end.

use std::time::Duration;

use hybridmig_transport::message::Message;

use super::{ChunkBody, ChunkKind, Lane, MAX_COMING, MAX_PREFETCH, RegionId, SourceMachine, State};
use crate::plan;
use crate::session::io::{Chunk, Refer, SourceCommand, SourceOutcome, SourceRecord};

impl SourceMachine {
    pub(super) fn begin_postcopy(&mut self, now: Duration) {
        self.enter(State::PostCopy);
        self.predict_freeze(now);
        if self.figures.milestones.complete.is_some() {
            self.complete(now);
        }
    }

    /// The guest at the destination waits for this block. It is answered at once, unless it was pushed
    /// already and will be there before an answer could be: the push may wait behind others, or lack a
    /// packet. Around it, the rest follows on the freeze lane.
    pub(super) fn requested(&mut self, now: Duration, region: RegionId, block: u32) {
        self.figures.faults += 1;
        if self.shapes.is_disk(region) {
            self.figures.faults_disk += 1;
        }
        let left = self.remaining.remove(region, block);
        if left {
            self.asked(region, block);
        }
        let coming = if left {
            None
        } else {
            self.comes_anyway(now, region, block)
        };
        match coming {
            Some(deadline) if self.coming.len() < MAX_COMING => {
                self.figures.faults_on_the_way += 1;
                self.coming.push_back((deadline, region, block));
            }
            _ => self.answer(region, block),
        }
        self.order.faulted(region, block);
        if self.config.prefetch == 0 {
            return;
        }
        let (first, last) = if self.shapes.is_disk(region) {
            self.readahead.after(region, block)
        } else {
            // Mostly ahead: guests walk upwards more often than down.
            (
                block.saturating_sub(self.config.prefetch / 4),
                block.saturating_add(self.config.prefetch - self.config.prefetch / 4),
            )
        };
        if self.prefetch.len() == MAX_PREFETCH {
            self.prefetch.pop_front();
        }
        self.prefetch.push_back((region, first, last));
    }

    /// Queues a block for the urgent lane.
    pub(super) fn answer(&mut self, region: RegionId, block: u32) {
        if self.urgent_set.insert(region, block) {
            if self.shapes.is_disk(region) {
                self.urgent_disks.push_back((region, block));
            } else {
                self.urgent.push_back((region, block));
            }
        }
    }

    /// One block: it is as long as a few packets, and each block more would keep the guest waiting for
    /// those of the others; each is repaired and acknowledged by itself.
    pub(super) fn urgent_chunk(&mut self) -> Option<Chunk> {
        if self.flights.len() >= 8 * super::MAX_FLIGHTS {
            return None;
        }
        let next = self.urgent.pop_front();
        let (region, block) = next.or_else(|| self.urgent_disks.pop_front())?;
        self.urgent_set.remove(region, block);
        let blocks = vec![block];
        let body = ChunkBody::Blocks { region, blocks };
        Some(self.chunk(Lane::Urgent, ChunkKind::Urgent, body, Refer::Nothing))
    }

    pub(super) fn prefetch_chunk(&mut self) -> Option<Chunk> {
        while let Some((region, first, last)) = self.next_prefetch() {
            let limit = self.shapes.chunk(region, self.config.chunk_pages);
            let blocks = plan::take_range(&mut self.remaining, region, first, last, limit);
            if !blocks.is_empty() {
                if blocks.len() == limit {
                    // There may be more of it.
                    self.prefetch.push_front((region, first, last));
                }
                let body = ChunkBody::Blocks { region, blocks };
                return Some(self.chunk(Lane::Freeze, ChunkKind::Prefetch, body, Refer::Nothing));
            }
        }
        None
    }

    /// The next neighbourhood: memory before disks.
    fn next_prefetch(&mut self) -> Option<(RegionId, u32, u32)> {
        let memory = |(region, ..): &(RegionId, u32, u32)| !self.shapes.is_disk(*region);
        let next = self.prefetch.iter().position(memory).unwrap_or(0);
        self.prefetch.remove(next)
    }

    /// References are off: the running guest changes the copies that they would refer to.
    pub(super) fn push_chunk(&mut self) -> Option<Chunk> {
        let pages = self.config.chunk_pages;
        let (region, blocks) = self.order.next(&mut self.remaining, pages)?;
        let body = ChunkBody::Blocks { region, blocks };
        Some(self.chunk(Lane::Bulk, ChunkKind::Push, body, Refer::Nothing))
    }

    /// The destination has every block.
    pub(super) fn complete(&mut self, now: Duration) {
        self.figures.milestones.complete.get_or_insert(now);
        self.enter(State::Completing);
        self.command(SourceCommand::Journal(SourceRecord::Released));
    }

    pub(super) fn release(&mut self) {
        self.enter(State::Releasing);
        self.command(SourceCommand::Release);
    }

    pub(super) fn released(&mut self) {
        self.send(Message::Released);
        self.finish(SourceOutcome::Moved);
    }
}
