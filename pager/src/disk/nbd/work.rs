//! Requests that take time: on threads of their connection, or waiting for missing blocks.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::connection::{Connection, HEAD, PIECE, WORTH_A_LOOK};
use super::handshake::BASE_ALLOCATION_ID;
use super::proto::{
    Errno, Request, SIMPLE_BYTES, allocation, chunk, chunk_header, command, command_flag, simple,
};
use crate::disk::guest::{Edge, Zero};
use crate::disk::pending::Resume;
use crate::disk::stats::Operation;

/// Extents in one answer to `BLOCK_STATUS`, at most.
const MAX_EXTENTS: usize = 512;

/// What is left to do.
pub(super) enum Work {
    /// Read and send; everything is here when this runs.
    Read,
    /// Flush and answer; a write has been done before.
    Flush,
    /// Write zeroes or trim.
    Zero,
    /// Write parts of granules that are here when this runs.
    Merge(Vec<Edge>),
    /// Tell what is data and what is hole.
    Status,
}

/// A request that is not answered yet.
pub(super) struct Job {
    pub(super) connection: Arc<Connection>,
    pub(super) request: Request,
    pub(super) since: Instant,
    pub(super) work: Work,
}

impl Resume for Job {
    fn resume(self: Arc<Self>) {
        let connection = Arc::clone(&self.connection);
        connection.submit(self);
    }

    fn abandoned(&self) -> bool {
        self.connection.is_closed()
    }
}

impl Job {
    /// Does it and answers, or lets it wait for missing blocks. An error means that nothing can be
    /// sent any more. `buffer` has room for a head and a piece.
    pub(super) fn run(&self, buffer: &mut [u8]) -> io::Result<()> {
        let answered = match &self.work {
            Work::Read => self.read(buffer).map(|()| true),
            Work::Flush => self.answer_changed(Ok(())).map(|()| true),
            Work::Merge(edges) => {
                let merged = edges
                    .iter()
                    .try_for_each(|edge| self.connection.image.guest_merge(edge));
                self.answer_changed(merged).map(|()| true)
            }
            Work::Zero => self.zero(),
            Work::Status => self.status().map(|()| true),
        };
        if answered? {
            self.connection.answered();
        }
        Ok(())
    }

    fn bytes(&self) -> Range<u64> {
        self.request.offset..self.request.offset + u64::from(self.request.len)
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes();
        let fragmented =
            self.connection.agreed.structured && self.request.flags & command_flag::DF == 0;
        let sent = if fragmented {
            self.read_in_chunks(&bytes, buffer)
        } else {
            self.read_as_a_whole(&bytes, buffer)
        };
        if sent? {
            let stats = &self.connection.image.stats;
            stats.done(Operation::Read, bytes.end - bytes.start, self.since);
        }
        Ok(())
    }

    /// One chunk a piece. False if it was answered with an error.
    fn read_in_chunks(&self, bytes: &Range<u64>, buffer: &mut [u8]) -> io::Result<bool> {
        let image = &self.connection.image;
        let mut at = bytes.start;
        while at < bytes.end {
            let len = (bytes.end - at).min(PIECE as u64);
            let piece = at..at + len;
            // Not knowing costs a piece of zeroes.
            if len >= WORTH_A_LOOK && image.is_hole(&piece).unwrap_or(false) {
                let last = piece.end == bytes.end;
                let cookie = self.request.cookie;
                let mut hole = chunk_header(cookie, chunk::OFFSET_HOLE, last, 12).to_vec();
                hole.extend(at.to_be_bytes());
                hole.extend((len as u32).to_be_bytes());
                self.connection.sender().send(&hole)?;
            } else {
                let (head, data) = buffer.split_at_mut(HEAD);
                let data = &mut data[..len as usize];
                if let Err(error) = image.guest_read(at, data) {
                    self.refuse(&error)?;
                    return Ok(false);
                }
                let head = self
                    .connection
                    .data_head(head, &self.request, at, data.len());
                let end = HEAD + len as usize;
                self.connection.sender().send(&buffer[HEAD - head..end])?;
            }
            at = piece.end;
        }
        Ok(true)
    }

    /// A simple reply or a single chunk. False if it was answered with an error.
    fn read_as_a_whole(&self, bytes: &Range<u64>, buffer: &mut [u8]) -> io::Result<bool> {
        let image = &self.connection.image;
        let whole = (bytes.end - bytes.start) as usize;
        let mut sender = None;
        let mut at = bytes.start;
        while at < bytes.end {
            let len = (bytes.end - at).min(PIECE as u64) as usize;
            let (head, data) = buffer.split_at_mut(HEAD);
            if let Err(error) = image.guest_read(at, &mut data[..len]) {
                if sender.is_none() {
                    self.refuse(&error)?;
                    return Ok(false);
                }
                // The reply has begun as a good one: the protocol leaves only this.
                return Err(error);
            }
            let mut start = HEAD;
            if sender.is_none() {
                start -= self.connection.data_head(head, &self.request, at, whole);
            }
            sender
                .get_or_insert_with(|| self.connection.sender())
                .send(&buffer[start..HEAD + len])?;
            at += len as u64;
        }
        Ok(true)
    }

    /// False if it goes on when parts of granules are here.
    fn zero(&self) -> io::Result<bool> {
        let flags = self.request.flags;
        let how = if self.request.command == command::TRIM {
            Zero::Trim
        } else if flags & command_flag::NO_HOLE == 0 {
            Zero::Hole
        } else if flags & command_flag::FAST_ZERO == 0 {
            Zero::Allocated
        } else {
            Zero::AllocatedFast
        };
        let mut edges = Vec::new();
        let image = &self.connection.image;
        let zeroed = image.guest_zero(&self.bytes(), how, &mut edges);
        if zeroed.is_err() || edges.is_empty() {
            return self.answer_changed(zeroed).map(|()| true);
        }
        let bytes: Vec<_> = edges.iter().map(Edge::bytes).collect();
        let rest = Self {
            connection: Arc::clone(&self.connection),
            request: self.request,
            since: self.since,
            work: Work::Merge(edges),
        };
        image.wait_for(&bytes, Arc::new(rest));
        Ok(false)
    }

    /// Answers what changes the disk, after a flush where one is wanted.
    fn answer_changed(&self, changed: io::Result<()>) -> io::Result<()> {
        let image = &self.connection.image;
        let durably =
            self.request.command == command::FLUSH || self.request.flags & command_flag::FUA != 0;
        let done = changed.and_then(|()| {
            if durably {
                image.flush()?;
                image.stats.done(Operation::Flush, 0, self.since);
            }
            Ok(())
        });
        if let Err(error) = done {
            return self.refuse(&error);
        }
        let bytes = u64::from(self.request.len);
        match self.request.command {
            command::WRITE => image.stats.done(Operation::Write, bytes, self.since),
            command::FLUSH => {}
            _ => image.stats.done(Operation::Zero, bytes, self.since),
        }
        self.connection
            .sender()
            .send(&simple(self.request.cookie, None))
    }

    fn status(&self) -> io::Result<()> {
        let one = self.request.flags & command_flag::REQ_ONE != 0;
        let limit = if one { 1 } else { MAX_EXTENTS };
        let extents = match self.connection.image.extents(&self.bytes(), limit) {
            Ok(extents) => extents,
            Err(error) => return self.refuse(&error),
        };
        let len = 4 + 8 * extents.len() as u32;
        let cookie = self.request.cookie;
        let mut reply = chunk_header(cookie, chunk::BLOCK_STATUS, true, len).to_vec();
        reply.extend(BASE_ALLOCATION_ID.to_be_bytes());
        for extent in extents {
            let state = if extent.hole {
                allocation::HOLE | allocation::ZERO
            } else {
                0
            };
            // No longer than the request, whose length has 32 bits.
            reply.extend((extent.bytes as u32).to_be_bytes());
            reply.extend(u32::to_be_bytes(state));
        }
        self.connection.sender().send(&reply)
    }

    fn refuse(&self, error: &io::Error) -> io::Result<()> {
        let number = Errno::from(error);
        if number == Errno::NotSup {
            // FAST_ZERO asks for this answer where zeroes have to be written.
            tracing::debug!(%error, request = ?self.request, "not supported by the file system");
        } else {
            tracing::error!(%error, request = ?self.request, "a request failed");
        }
        let reply = self.connection.refusal(&self.request, number);
        self.connection.sender().send(&reply)
    }
}

const _: () = assert!(SIMPLE_BYTES <= HEAD);
