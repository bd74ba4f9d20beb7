//! Chunks on their way: batch ids, bytes in flight and their bound, acknowledgements.

use std::time::Duration;

use super::on_the_way::{self, OnTheWay, Path};
use super::{ChunkBody, ChunkKind, Flight, MAX_FLIGHTS, SourceMachine};
use crate::blocks::RegionId;
use crate::session::io::{Chunk, Lane, Refer};
use crate::session::pieces;

/// What may still be on its way when a round counts as out, where a round trip is less.
const MOMENT: Duration = Duration::from_millis(50);

impl SourceMachine {
    /// Allots a batch.
    pub(super) fn chunk(
        &mut self,
        lane: Lane,
        kind: ChunkKind,
        body: ChunkBody,
        refer: Refer,
    ) -> Chunk {
        let batch = self.next_batch;
        self.next_batch += 1;
        let (pages_per_block, disk) = match &body {
            ChunkBody::Blocks { region, .. } => (
                self.shapes.pages_per_block(*region),
                self.shapes.is_disk(*region),
            ),
            ChunkBody::State { .. } => (1, false),
        };
        let (blocks, bytes) = match &body {
            ChunkBody::Blocks { blocks, .. } => {
                let blocks = blocks.len() as u64;
                let pages = blocks * pages_per_block;
                let bytes = pages as f64 * self.estimator.bytes_per_page(disk);
                (blocks, bytes as u64)
            }
            ChunkBody::State { len, .. } => (0, u64::from(*len)),
        };
        let contents = match &body {
            ChunkBody::Blocks { region, blocks } if kind != ChunkKind::PreCopy => {
                Some((*region, blocks.clone()))
            }
            _ => None,
        };
        let numbers = contents.iter().flat_map(|(_, blocks)| blocks);
        let span = numbers.fold((u32::MAX, 0), |(first, last), block| {
            (first.min(*block), last.max(*block))
        });
        let count = self.figures.count(kind);
        count.blocks += blocks;
        count.pages += blocks * pages_per_block;
        count.chunks += 1;
        if disk {
            count.disk_blocks += blocks;
        }
        self.in_flight_bytes += bytes;
        self.flights.insert(
            batch,
            Flight {
                bytes,
                sent: false,
                applied: false,
                kind,
                pages: blocks * pages_per_block,
                disk,
                contents,
                span,
                arrival: Duration::ZERO,
            },
        );
        Chunk {
            batch,
            pass: self.pass,
            lane,
            body,
            refer,
            awaited: self.before_offer() && (lane == Lane::Freeze || self.round_ends_soon()),
        }
    }

    /// A chunk goes to the data plane: from now on it is on its way.
    pub(super) fn handed_out(&mut self, now: Duration, batch: u64) {
        let path = self.path();
        let in_flight = self.in_flight_bytes;
        if let Some(flight) = self.flights.get_mut(&batch) {
            let ahead = match flight.kind {
                // Goes before all that is bulk; there is not much of it.
                ChunkKind::Prefetch | ChunkKind::Urgent => flight.bytes,
                _ => in_flight,
            };
            flight.arrival = on_the_way::arrival(now, ahead, &path);
        }
    }

    /// Whether the block is on its way and will be there at least as soon as a copy sent now.
    /// If so: when it must be there.
    pub(super) fn comes_anyway(
        &self,
        now: Duration,
        region: RegionId,
        block: u32,
    ) -> Option<Duration> {
        let path = self.path();
        let flight = self.flights.values().rev().find(|flight| {
            let Some((place, blocks)) = &flight.contents else {
                return false;
            };
            let (first, last) = flight.span;
            let batch = OnTheWay {
                arrival: flight.arrival,
                bytes: flight.bytes,
            };
            matches!(flight.kind, ChunkKind::Push | ChunkKind::Prefetch)
                && !flight.applied
                && *place == region
                && (first..=last).contains(&block)
                && blocks.contains(&block)
                && !on_the_way::worth_a_copy(now, &batch, &path)
        })?;
        Some(on_the_way::deadline(now, flight.arrival, &path))
    }

    /// Whether a block is in a batch that has been handed out and is not known to have been applied.
    fn is_on_its_way(&self, region: RegionId, block: u32) -> bool {
        self.flights.values().any(|flight| {
            let contents = flight.contents.as_ref().filter(|_| !flight.applied);
            contents.is_some_and(|(place, blocks)| *place == region && blocks.contains(&block))
        })
    }

    /// Blocks that the guest waits for and that were thought to come by themselves, but are not there in time: they are
    /// sent now. Estimates err, above all on a link that stalls.
    pub(super) fn overdue(&mut self, now: Duration) {
        let late = |(deadline, ..): &(Duration, RegionId, u32)| *deadline <= now;
        while let Some(at) = self.coming.iter().position(late) {
            let Some((_, region, block)) = self.coming.remove(at) else {
                return;
            };
            if self.is_on_its_way(region, block) {
                self.answer(region, block);
            }
        }
    }

    fn path(&self) -> Path {
        Path {
            rtt: self.estimator.rtt(),
            bandwidth: self.estimator.bandwidth(),
            loss: self.estimator.link_figures().loss,
        }
    }

    pub(super) fn sent(&mut self, batch: u64, bytes: u64) {
        let Some(flight) = self.flights.get_mut(&batch) else {
            // Of a link that is gone: it was sent all the same.
            self.figures.lost_bytes += bytes;
            return;
        };
        if std::mem::replace(&mut flight.sent, true) {
            return;
        }
        let (kind, pages, disk) = (flight.kind, flight.pages, flight.disk);
        if flight.applied {
            self.flights.remove(&batch);
        } else {
            self.in_flight_bytes = self.in_flight_bytes - flight.bytes + bytes;
            flight.bytes = bytes;
        }
        let count = self.figures.count(kind);
        count.bytes += bytes;
        if disk {
            count.disk_bytes += bytes;
        }
        self.estimator.sent(disk, pages, bytes);
        let again = match kind {
            ChunkKind::PreCopy => !self.figures.rounds.is_empty(),
            ChunkKind::Freeze => true,
            _ => false,
        };
        self.estimator.sized(disk, again, pages, bytes);
    }

    /// The bound on the bulk lane, so that a freeze never waits behind a deep queue and the pipe
    /// never runs empty: 2.5 × bandwidth × RTT.
    pub(super) fn in_flight_limit(&self) -> u64 {
        let product = 2.5 * self.estimator.ceiling() * self.estimator.rtt().as_secs_f64();
        (product as u64).clamp(
            self.config.min_in_flight,
            self.config.max_in_flight.max(self.config.min_in_flight),
        )
    }

    pub(super) fn bulk_has_room(&self) -> bool {
        self.flights.len() < MAX_FLIGHTS && self.in_flight_bytes < self.in_flight_limit()
    }

    /// Whether bulk chunks wait only for the link to have room.
    pub fn bulk_is_full(&self) -> bool {
        !self.bulk_has_room()
    }

    /// What may still be in flight at the freeze: one bandwidth × delay.
    pub(super) fn drained(&self) -> u64 {
        let product = self.estimator.bandwidth() * self.estimator.rtt().as_secs_f64();
        // On a short link a batch or two; on a slow one no more than goes out in a moment.
        let least = (self.config.min_in_flight / 8) as f64;
        let moment = self.estimator.bandwidth() * MOMENT.as_secs_f64();
        product.max(least.min(moment)) as u64
    }

    /// Batches have been applied; some blocks of them must come again in full.
    pub(super) fn applied(
        &mut self,
        now: Duration,
        batches: &[(u64, u64)],
        rejected: &[(RegionId, u32)],
    ) {
        for (start, end) in batches {
            if start >= end || *end > self.next_batch {
                self.violation(&format!("it applied batches {start}..{end}, never sent"));
                return;
            }
        }
        for (region, block) in rejected {
            if let Err(what) = pieces::check(self.shapes.infos(), *region, Some(*block)) {
                self.violation(&what);
                return;
            }
        }
        let mut bytes = 0;
        for (start, end) in batches {
            let ids: Vec<u64> = self
                .flights
                .range(*start..*end)
                .map(|(id, _)| *id)
                .collect();
            for id in ids {
                bytes += self.flight_applied(id);
            }
        }
        self.estimator.applied(now, bytes, self.in_flight_bytes > 0);
        for (region, block) in rejected {
            self.figures.rejected += 1;
            self.resend.insert(*region, *block);
            // Sent once, from there.
            self.remaining.remove(*region, *block);
        }
    }

    pub(super) fn flight_applied(&mut self, id: u64) -> u64 {
        let Some(flight) = self.flights.get_mut(&id) else {
            return 0;
        };
        let Flight { bytes, sent, .. } = *flight;
        if std::mem::replace(&mut flight.applied, true) {
            return 0;
        }
        self.in_flight_bytes -= bytes;
        if sent {
            self.flights.remove(&id);
        }
        bytes
    }
}
