//! One client: reads its requests, answers at once what takes no wait, and hands on the rest.
//!
//! Bounds: [`MAX_IN_FLIGHT`] requests that are not answered, after which no more are read; a buffer
//! of [`PIECE`] for each thread, however long a request is; at most two parts of granules kept for
//! a write that waits.

use std::collections::VecDeque;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::handshake::{Agreed, Export, MAX_PAYLOAD, shake_hands};
use super::proto::{
    CHUNK_BYTES, Errno, REQUEST_BYTES, Request, chunk, chunk_header, command, command_flag, simple,
};
use super::work::{Job, Work};
use crate::disk::DiskImage;
use crate::disk::guest::Edge;
use crate::disk::stats::Operation;

/// Bytes that are read, written and sent at a time.
pub(super) const PIECE: usize = 256 << 10;
/// Room before a piece for the head of a reply.
pub(super) const HEAD: usize = CHUNK_BYTES + 8;
/// Reads of at least this look whether they hit a hole first.
pub(super) const WORTH_A_LOOK: u64 = 64 << 10;
/// Requests of a client that are not answered yet.
const MAX_IN_FLIGHT: usize = 256;
/// Threads of a connection beside the one that reads.
const MAX_WORKERS: usize = 8;
/// Requests that are read ahead.
const READ_AHEAD: usize = 32 << 10;
/// How long a client may be silent before it has chosen its export.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(30);

/// Serves a client until it goes.
pub(super) fn run(mut stream: UnixStream, export: &Export, image: Arc<DiskImage>) {
    let agreed = stream
        .set_read_timeout(Some(HANDSHAKE_PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(HANDSHAKE_PATIENCE)))
        .and_then(|()| shake_hands(&mut stream, export))
        .and_then(|agreed| {
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(None)?;
            Ok(agreed)
        });
    if let Err(error) = &agreed {
        tracing::info!(%error, "an NBD client did not complete its handshake");
    }
    let Ok(Some(agreed)) = agreed else {
        // The server keeps a descriptor of it: dropping ours would not hang up. The client may
        // have done so itself.
        let _ = stream.shutdown(Shutdown::Both);
        return;
    };
    let connection = Arc::new(Connection {
        stream,
        sending: Mutex::new(()),
        image,
        read_only: export.read_only,
        agreed,
        closed: AtomicBool::new(false),
        queue: Mutex::default(),
        work_to_do: Condvar::new(),
        room: Condvar::new(),
    });
    let ended = Reader::new(&connection).serve();
    if let Err(error) = ended
        && error.kind() != io::ErrorKind::UnexpectedEof
        && !connection.is_closed()
    {
        tracing::info!(%error, "an NBD connection ended");
    }
    connection.end();
}

/// What the threads of a connection share.
pub(super) struct Connection {
    stream: UnixStream,
    /// Held while a reply is sent.
    sending: Mutex<()>,
    pub(super) image: Arc<DiskImage>,
    read_only: bool,
    pub(super) agreed: Agreed,
    closed: AtomicBool,
    queue: Mutex<Queue>,
    /// A job is queued, or the connection is closed.
    work_to_do: Condvar,
    /// There is room for a request, or the connection is closed.
    room: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Arc<Job>>,
    in_flight: usize,
    idle: usize,
    workers: Vec<JoinHandle<()>>,
}

impl Connection {
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Hangs up; every thread notices.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // The client may have gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
        // Under the lock, so that nobody is between looking at the flag and waiting.
        drop(self.queue());
        self.work_to_do.notify_all();
        self.room.notify_all();
    }

    /// Hangs up, ends the threads and forgets what waits.
    fn end(&self) {
        self.close();
        let workers = std::mem::take(&mut self.queue().workers);
        for worker in workers {
            if worker.join().is_err() {
                tracing::error!("a thread of an NBD connection has panicked");
            }
        }
        // Jobs hold the connection: without this they would hold each other for ever.
        let jobs = std::mem::take(&mut self.queue().jobs);
        drop(jobs);
        self.image.sweep();
    }

    /// The right to send, for one reply or chunk.
    pub(super) fn sender(&self) -> Sender<'_> {
        Sender {
            stream: &self.stream,
            _sending: self.sending.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Takes a place among the requests in flight; waits for one. False if the connection closes.
    fn begin(&self) -> bool {
        let mut queue = self.queue();
        while queue.in_flight >= MAX_IN_FLIGHT && !self.is_closed() {
            queue = self
                .room
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue.in_flight += 1;
        !self.is_closed()
    }

    /// A request that had [begun](Self::begin) was answered.
    pub(super) fn answered(&self) {
        let mut queue = self.queue();
        queue.in_flight -= 1;
        drop(queue);
        // Only the reading thread waits for this.
        self.room.notify_one();
    }

    /// Lets another thread go on with a job. Does not block.
    pub(super) fn submit(self: &Arc<Self>, job: Arc<Job>) {
        let mut queue = self.queue();
        if self.is_closed() {
            return;
        }
        queue.jobs.push_back(job);
        if queue.jobs.len() > queue.idle && queue.workers.len() < MAX_WORKERS {
            let connection = Arc::clone(self);
            let started = std::thread::Builder::new()
                .name("nbd-work".into())
                .spawn(move || connection.work());
            match started {
                Ok(worker) => queue.workers.push(worker),
                Err(error) if queue.workers.is_empty() => {
                    tracing::error!(%error, "no thread for an NBD connection");
                    drop(queue);
                    self.close();
                    return;
                }
                // Those that there are get to it.
                Err(error) => tracing::warn!(%error, "no further thread for an NBD connection"),
            }
        }
        drop(queue);
        self.work_to_do.notify_one();
    }

    fn work(&self) {
        let mut buffer = vec![0; HEAD + PIECE];
        let mut queue = self.queue();
        loop {
            if self.is_closed() {
                return;
            }
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                if let Err(error) = job.run(&mut buffer) {
                    tracing::info!(%error, "an NBD reply could not be sent");
                    self.close();
                }
                queue = self.queue();
            } else {
                queue.idle += 1;
                queue = self
                    .work_to_do
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why a request cannot be served.
    fn objection(&self, request: &Request) -> Option<Errno> {
        let allowed = match request.command {
            command::READ if self.agreed.structured => command_flag::FUA | command_flag::DF,
            command::READ | command::WRITE | command::TRIM | command::FLUSH => command_flag::FUA,
            command::WRITE_ZEROES => {
                command_flag::FUA | command_flag::NO_HOLE | command_flag::FAST_ZERO
            }
            command::BLOCK_STATUS if self.agreed.allocation => {
                command_flag::FUA | command_flag::REQ_ONE
            }
            _ => return Some(Errno::Inval),
        };
        if request.flags & !allowed != 0 {
            return Some(Errno::Inval);
        }
        if request.command == command::FLUSH {
            return None;
        }
        let payload = matches!(request.command, command::READ | command::WRITE);
        if request.len == 0 || payload && request.len > MAX_PAYLOAD {
            return Some(Errno::Inval);
        }
        let growing = matches!(request.command, command::WRITE | command::WRITE_ZEROES);
        let changing = growing || request.command == command::TRIM;
        if changing && (self.read_only || !self.image.is_armed()) {
            return Some(Errno::Perm);
        }
        let end = request.offset.checked_add(u64::from(request.len));
        if end.is_none_or(|end| end > self.image.bytes()) {
            return Some(if growing {
                Errno::NoSpace
            } else {
                Errno::Inval
            });
        }
        None
    }

    /// The whole answer to a request that fails.
    pub(super) fn refusal(&self, request: &Request, error: Errno) -> Vec<u8> {
        self.image.stats.errors.fetch_add(1, Ordering::Relaxed);
        let chunked = self.agreed.structured
            && matches!(request.command, command::READ | command::BLOCK_STATUS);
        if !chunked {
            return simple(request.cookie, Some(error)).to_vec();
        }
        let mut reply = chunk_header(request.cookie, chunk::ERROR, true, 6).to_vec();
        reply.extend((error as u32).to_be_bytes());
        reply.extend([0, 0]);
        reply
    }

    /// Puts the head of a chunk of data, or of the simple reply with all data, before the data.
    /// Returns its length; it ends where `room` ends.
    pub(super) fn data_head(
        &self,
        room: &mut [u8],
        request: &Request,
        offset: u64,
        len: usize,
    ) -> usize {
        let put = |room: &mut [u8], head: &[u8]| {
            let start = room.len() - head.len();
            room[start..].copy_from_slice(head);
            head.len()
        };
        if !self.agreed.structured {
            return put(room, &simple(request.cookie, None));
        }
        let last = offset + len as u64 == request.offset + u64::from(request.len);
        let kind = chunk::OFFSET_DATA;
        let mut head = [0; HEAD];
        let start = chunk_header(request.cookie, kind, last, len as u32 + 8);
        head[..CHUNK_BYTES].copy_from_slice(&start);
        head[CHUNK_BYTES..].copy_from_slice(&offset.to_be_bytes());
        put(room, &head)
    }
}

/// Whoever holds this is the only one that sends.
pub(super) struct Sender<'a> {
    stream: &'a UnixStream,
    _sending: MutexGuard<'a, ()>,
}

impl Sender<'_> {
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }
}

/// The thread that reads.
struct Reader<'a> {
    connection: &'a Arc<Connection>,
    input: BufReader<&'a UnixStream>,
    /// Replies that are sent together, before anything that may take time.
    replies: Box<[u8]>,
    used: usize,
    /// A piece of a write.
    piece: Box<[u8]>,
}

impl<'a> Reader<'a> {
    fn new(connection: &'a Arc<Connection>) -> Self {
        Self {
            connection,
            input: BufReader::with_capacity(READ_AHEAD, &connection.stream),
            replies: vec![0; HEAD + PIECE].into(),
            used: 0,
            piece: vec![0; PIECE].into(),
        }
    }

    /// Until the client goes, one way or another.
    fn serve(mut self) -> io::Result<()> {
        loop {
            let mut header = [0; REQUEST_BYTES];
            self.before_reading(REQUEST_BYTES)?;
            self.input.read_exact(&mut header)?;
            let since = Instant::now();
            let request = Request::decode(&header).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the NBD client sends something else than requests",
                )
            })?;
            if request.command == command::DISC {
                return self.send();
            }
            let objection = self.connection.objection(&request);
            match (request.command, objection) {
                (command::WRITE, _) => self.write(request, since, objection)?,
                (_, Some(error)) => self.refuse(&request, error)?,
                (command::READ, None) => self.read(request, since)?,
                (command::FLUSH, None) => self.hand_on(request, since, Work::Flush)?,
                (command::BLOCK_STATUS, None) => self.hand_on(request, since, Work::Status)?,
                (_, None) => self.hand_on(request, since, Work::Zero)?,
            }
        }
    }

    fn read(&mut self, request: Request, since: Instant) -> io::Result<()> {
        let connection = self.connection;
        let image = &connection.image;
        let len = request.len as usize;
        let bytes = request.offset..request.offset + len as u64;
        if !image.is_here(&bytes) {
            let job = self.begin(request, since, Work::Read)?;
            image.wait_for(&[bytes], job);
            return Ok(());
        }
        let large = len as u64 >= WORTH_A_LOOK && connection.agreed.structured;
        if len > PIECE || large && image.is_hole(&bytes).unwrap_or(false) {
            return self.hand_on(request, since, Work::Read);
        }
        if self.replies.len() - self.used < HEAD + len {
            self.send()?;
        }
        let (head, data) = self.replies[self.used..].split_at_mut(HEAD);
        match image.guest_read_cached(request.offset, &mut data[..len]) {
            Ok(true) => {
                let head = connection.data_head(head, &request, request.offset, len);
                // A simple reply's head is shorter: close the gap that it leaves.
                if head < HEAD {
                    let start = self.used + HEAD - head;
                    self.replies
                        .copy_within(start..start + head + len, self.used);
                }
                self.used += head + len;
                image.stats.done(Operation::Read, len as u64, since);
                Ok(())
            }
            Ok(false) => self.hand_on(request, since, Work::Read),
            Err(error) => {
                tracing::error!(%error, offset = request.offset, "reading the image");
                self.refuse(&request, Errno::from(&error))
            }
        }
    }

    /// Takes the payload in pieces, each of which is written before the next one is read.
    fn write(
        &mut self,
        request: Request,
        since: Instant,
        mut error: Option<Errno>,
    ) -> io::Result<()> {
        let mut edges: Vec<Edge> = Vec::new();
        let mut at = request.offset;
        let mut left = request.len as usize;
        while left > 0 {
            // Pieces end at multiples of their size, so that none but the first and the last has
            // a part of a granule.
            let len = (PIECE - at as usize % PIECE).min(left);
            self.before_reading(len)?;
            self.input.read_exact(&mut self.piece[..len])?;
            if error.is_none()
                && let Err(failed) =
                    self.connection
                        .image
                        .guest_write(at, &self.piece[..len], &mut edges)
            {
                tracing::error!(error = %failed, offset = at, "writing to the image");
                error = Some(Errno::from(&failed));
            }
            at = at.wrapping_add(len as u64);
            left -= len;
        }
        if let Some(error) = error {
            return self.refuse(&request, error);
        }
        if !edges.is_empty() {
            let bytes: Vec<_> = edges.iter().map(Edge::bytes).collect();
            let job = self.begin(request, since, Work::Merge(edges))?;
            self.connection.image.wait_for(&bytes, job);
            return Ok(());
        }
        if request.flags & command_flag::FUA != 0 {
            return self.hand_on(request, since, Work::Flush);
        }
        self.connection
            .image
            .stats
            .done(Operation::Write, u64::from(request.len), since);
        self.reply(&simple(request.cookie, None))
    }

    fn refuse(&mut self, request: &Request, error: Errno) -> io::Result<()> {
        let reply = self.connection.refusal(request, error);
        self.reply(&reply)
    }

    /// For another thread, at once.
    fn hand_on(&mut self, request: Request, since: Instant, work: Work) -> io::Result<()> {
        let job = self.begin(request, since, work)?;
        self.connection.submit(job);
        Ok(())
    }

    /// A job of its own for the request.
    fn begin(&mut self, request: Request, since: Instant, work: Work) -> io::Result<Arc<Job>> {
        // There may be no place free for long.
        self.send()?;
        if !self.connection.begin() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Arc::new(Job {
            connection: Arc::clone(self.connection),
            request,
            since,
            work,
        }))
    }

    fn reply(&mut self, reply: &[u8]) -> io::Result<()> {
        if self.replies.len() - self.used < reply.len() {
            self.send()?;
        }
        self.replies[self.used..self.used + reply.len()].copy_from_slice(reply);
        self.used += reply.len();
        Ok(())
    }

    /// Reading may take as long as the client likes unless it is here already: what is answered
    /// has to be sent before.
    fn before_reading(&mut self, len: usize) -> io::Result<()> {
        if self.input.buffer().len() < len {
            self.send()?;
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        let used = std::mem::take(&mut self.used);
        if used > 0 {
            self.connection.sender().send(&self.replies[..used])?;
        }
        Ok(())
    }
}
