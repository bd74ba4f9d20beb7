//! An NBD client, as small as the disks of our guests take: fixed newstyle handshake, structured
//! replies, one metadata context, reads, writes, flushes and block status, one request at a time on a
//! connection. The source reads a QEMU's disks by it; the embedded guest runs on its disk by it.
//!
//! The other end is QEMU or our own server, but nothing that it says is trusted with our memory or our
//! life: every length is checked against what was asked for, and whatever does not fit is an error.
//! After an error other than [`NbdError::Remote`] the connection must not be used again.
//!
//! Protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.

use std::io::{self, BufReader, Read, Write};

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, of either side.
const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;

const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const OPTION_SET_META_CONTEXT: u32 = 10;

const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_META_CONTEXT: u32 = 4;
const REPLY_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
const COMMAND_BLOCK_STATUS: u16 = 7;

const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;

/// Longest answer to an option that is read, in bytes.
const OPTION_LIMIT: u32 = 64 << 10;
/// Longest error text that is read, in bytes.
const ERROR_LIMIT: u32 = 4 << 10;
/// Most extents of one answer that are read; QEMU sends at most 128 Ki.
const EXTENT_LIMIT: u32 = 1 << 20;
/// Answers to one option, or chunks of one reply, that are read.
const PIECES_LIMIT: usize = 64 << 10;

/// Operation not permitted: what QEMU says of an image that it has let go of.
pub const EPERM: u32 = 1;

/// Why a disk could not be used over NBD.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The connection failed.
    #[error("the NBD connection failed while {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What came is not NBD as it was agreed upon.
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(String),
    /// An option was refused.
    #[error("the NBD server refused {option}: {message}")]
    Refused {
        /// What was asked for.
        option: &'static str,
        /// The server's words.
        message: String,
    },
    /// A request failed; the connection is intact.
    #[error("the NBD server cannot {request} at {offset}: {message} (error {errno})")]
    Remote {
        /// What was asked for.
        request: &'static str,
        /// Where, in bytes from the start of the disk.
        offset: u64,
        /// Number of the error, as Linux counts them.
        errno: u32,
        /// The server's words.
        message: String,
    },
}

impl NbdError {
    /// Whether the request failed but the connection can be used again.
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Remote { .. })
    }

    /// Whether QEMU has let go of the image, as it does when a migration completes.
    pub fn is_not_permitted(&self) -> bool {
        matches!(self, Self::Remote { errno: EPERM, .. })
    }
}

/// Result of an NBD operation.
pub type NbdResult<T> = Result<T, NbdError>;

/// A stretch of the disk with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes from the start of the disk.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Flags of the metadata context.
    pub flags: u32,
}

/// A connection to one export.
pub struct Client<S: Read + Write> {
    stream: BufReader<S>,
    size: u64,
    context: Option<u32>,
    cookie: u64,
}

impl<S: Read + Write> Client<S> {
    /// Shakes hands over `stream` and opens the export, with `context` as its metadata context if one
    /// is wanted.
    pub fn open(stream: S, export: &str, context: Option<&str>) -> NbdResult<Self> {
        let mut client = Self {
            stream: BufReader::new(stream),
            size: 0,
            context: None,
            cookie: 0,
        };
        client.greet()?;
        client.option(
            OPTION_STRUCTURED_REPLY,
            "structured replies",
            &[],
            |_, _| Ok(()),
        )?;
        if let Some(wanted) = context {
            client.set_context(export, wanted)?;
        }
        client.go(export)?;
        Ok(client)
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn greet(&mut self) -> NbdResult<()> {
        let doing = "shaking hands";
        if self.u64(doing)? != INIT_MAGIC || self.u64(doing)? != OPTION_MAGIC {
            return Err(protocol("the greeting is not that of a newstyle server"));
        }
        if self.u16(doing)? & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(protocol("the server does not speak fixed newstyle"));
        }
        let flags = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        self.send(&flags.to_be_bytes(), doing)
    }

    fn set_context(&mut self, export: &str, wanted: &str) -> NbdResult<()> {
        let mut data = string(export);
        data.extend(1_u32.to_be_bytes());
        data.extend(string(wanted));
        let mut found = None;
        self.option(
            OPTION_SET_META_CONTEXT,
            "a metadata context",
            &data,
            |kind, data| {
                if kind == REPLY_META_CONTEXT
                    && let Some((id, name)) = data.split_first_chunk::<4>()
                    && name == wanted.as_bytes()
                {
                    found = Some(u32::from_be_bytes(*id));
                }
                Ok(())
            },
        )?;
        match found {
            Some(id) => {
                self.context = Some(id);
                Ok(())
            }
            None => Err(NbdError::Refused {
                option: "a metadata context",
                message: format!("the export has no {wanted}"),
            }),
        }
    }

    fn go(&mut self, export: &str) -> NbdResult<()> {
        let mut data = string(export);
        data.extend(0_u16.to_be_bytes());
        let mut size = None;
        self.option(OPTION_GO, "the export", &data, |kind, data| {
            if kind == REPLY_INFO && data.starts_with(&INFO_EXPORT.to_be_bytes()) {
                let bytes = data.get(2..10).and_then(|bytes| bytes.try_into().ok());
                let bytes = bytes.ok_or_else(|| protocol("the export's size is cut off"))?;
                size = Some(u64::from_be_bytes(bytes));
            }
            Ok(())
        })?;
        self.size = size.ok_or_else(|| protocol("the export has no size"))?;
        Ok(())
    }

    /// Sends an option and passes every answer before the acknowledgement to `each`.
    fn option(
        &mut self,
        option: u32,
        name: &'static str,
        data: &[u8],
        mut each: impl FnMut(u32, &[u8]) -> NbdResult<()>,
    ) -> NbdResult<()> {
        let doing = "negotiating";
        let mut request = Vec::with_capacity(16 + data.len());
        request.extend(OPTION_MAGIC.to_be_bytes());
        request.extend(option.to_be_bytes());
        request.extend((data.len() as u32).to_be_bytes());
        request.extend(data);
        self.send(&request, doing)?;
        for _ in 0..PIECES_LIMIT {
            if self.u64(doing)? != OPTION_REPLY_MAGIC || self.u32(doing)? != option {
                return Err(protocol("an answer to another option than was sent"));
            }
            let kind = self.u32(doing)?;
            let len = self.u32(doing)?;
            if len > OPTION_LIMIT {
                return Err(protocol(format!("an answer of {len} bytes to an option")));
            }
            let data = self.bytes(len, doing)?;
            if kind == REPLY_ACK {
                return Ok(());
            }
            if kind & REPLY_ERROR != 0 {
                let text = String::from_utf8_lossy(&data);
                return Err(NbdError::Refused {
                    option: name,
                    message: if text.is_empty() {
                        format!("error {}", kind & !REPLY_ERROR)
                    } else {
                        text.escape_debug().to_string()
                    },
                });
            }
            each(kind, &data)?;
        }
        Err(protocol("answers to an option without end"))
    }

    /// Reads `buf.len()` bytes at `offset`, which must lie within the disk.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> NbdResult<()> {
        let len = self.check_range(offset, buf.len() as u64)?;
        if len == 0 {
            return Ok(());
        }
        let doing = "reading";
        let cookie = self.request(COMMAND_READ, offset, len)?;
        let mut filled = 0;
        let mut failed = None;
        for _ in 0..PIECES_LIMIT {
            let chunk = self.chunk(cookie, doing)?;
            match chunk.kind {
                CHUNK_NONE if chunk.len == 0 => {}
                CHUNK_DATA if chunk.len > 8 => {
                    let at = self.u64(doing)?;
                    let part = part_of(buf, offset, at, chunk.len - 8)?;
                    filled += part.len();
                    self.fill(part, doing)?;
                }
                CHUNK_HOLE if chunk.len == 12 => {
                    let at = self.u64(doing)?;
                    let len = self.u32(doing)?;
                    let part = part_of(buf, offset, at, len)?;
                    filled += part.len();
                    part.fill(0);
                }
                _ => failed = Some(self.error_chunk(chunk, "read", offset)?),
            }
            if !chunk.done {
                continue;
            }
            return match failed {
                Some(error) => Err(error),
                None if filled == buf.len() => Ok(()),
                None => Err(protocol(format!("{filled} of {len} bytes came"))),
            };
        }
        Err(protocol("chunks without end"))
    }

    /// Writes `data` at `offset`, which must lie within the disk. When this returns, reads of any
    /// connection see it; a later [`Self::flush`] makes it durable.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> NbdResult<()> {
        let len = self.check_range(offset, data.len() as u64)?;
        if len == 0 {
            return Ok(());
        }
        let cookie = self.request(COMMAND_WRITE, offset, len)?;
        self.send(data, "sending data")?;
        self.acknowledged(cookie, "write", offset)
    }

    /// Makes durable what has been written.
    pub fn flush(&mut self) -> NbdResult<()> {
        let cookie = self.request(COMMAND_FLUSH, 0, 0)?;
        self.acknowledged(cookie, "flush", 0)
    }

    /// Waits for the reply to a request whose reply has no contents.
    fn acknowledged(&mut self, cookie: u64, request: &'static str, offset: u64) -> NbdResult<()> {
        let mut failed = None;
        for _ in 0..PIECES_LIMIT {
            let chunk = self.chunk(cookie, "waiting for a reply")?;
            if chunk.kind != CHUNK_NONE || chunk.len != 0 {
                failed = Some(self.error_chunk(chunk, request, offset)?);
            }
            if chunk.done {
                return failed.map_or(Ok(()), Err);
            }
        }
        Err(protocol("chunks without end"))
    }

    /// The extents of the whole disk in the metadata context that the connection was opened with.
    /// `each` is told of one after the other, without a gap.
    pub fn block_status(&mut self, mut each: impl FnMut(Extent)) -> NbdResult<()> {
        let mut offset = 0;
        while offset < self.size {
            // As long as the field for it allows, and aligned.
            let len = (self.size - offset).min(1 << 31);
            let end = self.status_of(offset, len as u32, &mut each)?;
            if end <= offset {
                return Err(protocol("a block status that tells nothing"));
            }
            offset = end;
        }
        Ok(())
    }

    /// One request for block status; returns where its answer ends.
    fn status_of(
        &mut self,
        offset: u64,
        len: u32,
        each: &mut impl FnMut(Extent),
    ) -> NbdResult<u64> {
        let doing = "asking for the block status";
        let Some(context) = self.context else {
            return Err(protocol("no metadata context was negotiated"));
        };
        let cookie = self.request(COMMAND_BLOCK_STATUS, offset, len)?;
        let mut at = offset;
        let mut failed = None;
        for _ in 0..PIECES_LIMIT {
            let chunk = self.chunk(cookie, doing)?;
            match chunk.kind {
                CHUNK_NONE if chunk.len == 0 => {}
                CHUNK_BLOCK_STATUS
                    if chunk.len >= 12
                        && (chunk.len - 4).is_multiple_of(8)
                        && chunk.len / 8 <= EXTENT_LIMIT =>
                {
                    if self.u32(doing)? != context {
                        return Err(protocol("the status of a context that was not asked for"));
                    }
                    for _ in 0..(chunk.len - 4) / 8 {
                        let len = u64::from(self.u32(doing)?);
                        let flags = self.u32(doing)?;
                        // The last one may reach further than was asked.
                        let end = at.saturating_add(len).min(self.size);
                        if end > at {
                            each(Extent {
                                offset: at,
                                len: end - at,
                                flags,
                            });
                        }
                        at = end;
                    }
                }
                _ => failed = Some(self.error_chunk(chunk, "tell the block status", offset)?),
            }
            if chunk.done {
                return failed.map_or(Ok(at), Err);
            }
        }
        Err(protocol("chunks without end"))
    }

    /// Says goodbye. The server closes the connection; there is no answer.
    pub fn disconnect(mut self) {
        // The connection ends either way.
        let _ = self.request(COMMAND_DISCONNECT, 0, 0);
    }

    fn check_range(&self, offset: u64, len: u64) -> NbdResult<u32> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.size) {
            return Err(protocol(format!(
                "asked for {len} bytes at {offset} of a disk of {}",
                self.size
            )));
        }
        u32::try_from(len).map_err(|_| protocol(format!("asked for {len} bytes at once")))
    }

    fn request(&mut self, command: u16, offset: u64, len: u32) -> NbdResult<u64> {
        self.cookie += 1;
        let mut request = [0; 28];
        request[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request[6..8].copy_from_slice(&command.to_be_bytes());
        request[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        request[16..24].copy_from_slice(&offset.to_be_bytes());
        request[24..28].copy_from_slice(&len.to_be_bytes());
        self.send(&request, "sending a request")?;
        Ok(self.cookie)
    }

    /// The head of the next chunk of the reply to the request with this cookie.
    fn chunk(&mut self, cookie: u64, doing: &'static str) -> NbdResult<Chunk> {
        let magic = self.u32(doing)?;
        let chunk = match magic {
            STRUCTURED_REPLY_MAGIC => {
                let flags = self.u16(doing)?;
                let kind = self.u16(doing)?;
                let answered = self.u64(doing)?;
                (answered == cookie).then_some(Chunk {
                    done: flags & CHUNK_DONE != 0,
                    kind,
                    len: self.u32(doing)?,
                    errno: 0,
                })
            }
            // Legal where nothing but an error number has to be said.
            SIMPLE_REPLY_MAGIC => {
                let errno = self.u32(doing)?;
                let answered = self.u64(doing)?;
                (answered == cookie).then_some(Chunk {
                    done: true,
                    kind: if errno == 0 { CHUNK_NONE } else { CHUNK_ERROR },
                    len: 0,
                    errno,
                })
            }
            other => return Err(protocol(format!("a reply begins with {other:#x}"))),
        };
        chunk.ok_or_else(|| protocol("a reply to another request"))
    }

    /// Reads what is left of a chunk that must be an error.
    fn error_chunk(
        &mut self,
        chunk: Chunk,
        request: &'static str,
        offset: u64,
    ) -> NbdResult<NbdError> {
        let doing = "reading an error";
        if chunk.kind & CHUNK_ERROR == 0 || chunk.len > ERROR_LIMIT {
            return Err(protocol(format!(
                "a chunk of type {} and {} bytes where it is not legal",
                chunk.kind, chunk.len
            )));
        }
        let data = self.bytes(chunk.len, doing)?;
        let errno = data
            .first_chunk::<4>()
            .map_or(chunk.errno, |number| u32::from_be_bytes(*number));
        let text = data
            .get(4..6)
            .and_then(|len| {
                let len = usize::from(u16::from_be_bytes([len[0], len[1]]));
                data.get(6..6 + len)
            })
            .unwrap_or_default();
        let text = String::from_utf8_lossy(text).escape_debug().to_string();
        Ok(NbdError::Remote {
            request,
            offset,
            errno,
            message: if text.is_empty() {
                io::Error::from_raw_os_error(errno as i32).to_string()
            } else {
                text
            },
        })
    }

    fn send(&mut self, bytes: &[u8], doing: &'static str) -> NbdResult<()> {
        let stream = self.stream.get_mut();
        stream
            .write_all(bytes)
            .and_then(|()| stream.flush())
            .map_err(|source| NbdError::Io { doing, source })
    }

    fn fill(&mut self, buf: &mut [u8], doing: &'static str) -> NbdResult<()> {
        self.stream
            .read_exact(buf)
            .map_err(|source| NbdError::Io { doing, source })
    }

    fn bytes(&mut self, len: u32, doing: &'static str) -> NbdResult<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes, doing)?;
        Ok(bytes)
    }

    fn u16(&mut self, doing: &'static str) -> NbdResult<u16> {
        let mut bytes = [0; 2];
        self.fill(&mut bytes, doing)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self, doing: &'static str) -> NbdResult<u32> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes, doing)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self, doing: &'static str) -> NbdResult<u64> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes, doing)?;
        Ok(u64::from_be_bytes(bytes))
    }
}

/// Head of a chunk of a reply.
#[derive(Clone, Copy)]
struct Chunk {
    done: bool,
    kind: u16,
    len: u32,
    /// Of a simple reply, which says no more than that.
    errno: u32,
}

/// The part of the buffer that a chunk is for.
fn part_of(buf: &mut [u8], offset: u64, at: u64, len: u32) -> NbdResult<&mut [u8]> {
    at.checked_sub(offset)
        .and_then(|from| usize::try_from(from).ok())
        .and_then(|from| buf.get_mut(from..from.checked_add(len as usize)?))
        .ok_or_else(|| protocol(format!("{len} bytes at {at}, which were not asked for")))
}

fn protocol(what: impl Into<String>) -> NbdError {
    NbdError::Protocol(what.into())
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}
