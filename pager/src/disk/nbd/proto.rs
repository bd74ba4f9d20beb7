//! Numbers and messages of the NBD protocol, as far as this server speaks it: fixed newstyle,
//! simple and structured replies. All of it is big-endian.

pub(super) const NBD_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(super) const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, and the client's answer to them.
pub(super) mod handshake_flag {
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the handshake.
pub(super) mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub(super) mod option_reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
}

/// Kinds of information about an export.
pub(super) mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub(super) mod export_flag {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub(super) mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub(super) mod command_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types of chunks of structured replies.
pub(super) mod chunk {
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 1 << 15 | 1;
}

/// States of `base:allocation`.
pub(super) mod allocation {
    pub const HOLE: u32 = 1 << 0;
    pub const ZERO: u32 = 1 << 1;
}

/// Errors of commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Errno {
    Perm = 1,
    Io = 5,
    Inval = 22,
    NoSpace = 28,
    NotSup = 95,
}

impl From<&std::io::Error> for Errno {
    fn from(error: &std::io::Error) -> Self {
        use std::io::ErrorKind;
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                Self::NoSpace
            }
            ErrorKind::Unsupported => Self::NotSup,
            _ => Self::Io,
        }
    }
}

/// Bytes of a request without its payload.
pub(super) const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply, and of a structured reply's chunk, before what follows.
pub(super) const SIMPLE_BYTES: usize = 16;
pub(super) const CHUNK_BYTES: usize = 20;

/// A command of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl Request {
    /// None if it is not one.
    pub(super) fn decode(from: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let field = |at: usize, len: usize| {
            from[at..at + len]
                .iter()
                .fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
        };
        (field(0, 4) == u64::from(REQUEST_MAGIC)).then(|| Self {
            flags: field(4, 2) as u16,
            command: field(6, 2) as u16,
            cookie: field(8, 8),
            offset: field(16, 8),
            len: field(24, 4) as u32,
        })
    }
}

/// A simple reply; the data of a read follow if there is no error.
pub(super) fn simple(cookie: u64, error: Option<Errno>) -> [u8; SIMPLE_BYTES] {
    let mut to = [0; SIMPLE_BYTES];
    to[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    to[4..8].copy_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
    to[8..].copy_from_slice(&cookie.to_be_bytes());
    to
}

/// The beginning of a chunk; `len` bytes follow.
pub(super) fn chunk_header(cookie: u64, kind: u16, last: bool, len: u32) -> [u8; CHUNK_BYTES] {
    let mut to = [0; CHUNK_BYTES];
    to[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    to[4..6].copy_from_slice(&u16::from(last).to_be_bytes());
    to[6..8].copy_from_slice(&kind.to_be_bytes());
    to[8..16].copy_from_slice(&cookie.to_be_bytes());
    to[16..].copy_from_slice(&len.to_be_bytes());
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_the_protocol_says() {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&[0x25, 0x60, 0x95, 0x13]);
        bytes[4..8].copy_from_slice(&[0, 1, 0, 6]);
        bytes[8..16].copy_from_slice(b"a cookie");
        bytes[16..24].copy_from_slice(&[0, 0, 0, 1, 0, 0, 2, 0]);
        bytes[24..].copy_from_slice(&[0, 1, 0, 0]);
        let request = Request {
            flags: command_flag::FUA,
            command: command::WRITE_ZEROES,
            cookie: u64::from_be_bytes(*b"a cookie"),
            offset: (1 << 32) + 512,
            len: 65536,
        };
        assert_eq!(Request::decode(&bytes), Some(request));
        bytes[0] = 0;
        assert_eq!(Request::decode(&bytes), None);
    }
}
