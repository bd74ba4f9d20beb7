//! The handshake: which export, which kind of replies. Bounded in bytes and options; the caller
//! bounds each read in time.

use std::io::{self, Read, Write};

use super::proto::{
    NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, export_flag, handshake_flag, info, option,
    option_reply,
};

/// Longest option data that is read: a name of 4096 bytes and some queries.
const MAX_OPTION: u32 = 16 << 10;
/// Options that a client may send before it must be done.
const MAX_OPTIONS: usize = 64;
/// The one metadata context, and the id that it has here.
const BASE_ALLOCATION: &str = "base:allocation";
pub(super) const BASE_ALLOCATION_ID: u32 = 1;
/// Longest payload of a command, which is told to clients as the maximum block size.
pub(super) const MAX_PAYLOAD: u32 = 32 << 20;
/// Reads and writes of whole multiples of this never need a block for an edge of theirs.
const PREFERRED_BLOCK: u32 = 4096;

/// What is exported.
#[derive(Clone, Debug)]
pub(super) struct Export {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) read_only: bool,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) structured: bool,
    pub(super) allocation: bool,
}

impl Export {
    /// Flush covers what was answered on every connection, and no connection keeps anything to
    /// itself: all write straight into the same file, whose page cache the kernel shares. So a
    /// client may spread its requests over several connections.
    fn flags(&self, agreed: Agreed) -> u16 {
        let mut flags = export_flag::HAS_FLAGS
            | export_flag::SEND_FLUSH
            | export_flag::SEND_FUA
            | export_flag::CAN_MULTI_CONN;
        if self.read_only {
            flags |= export_flag::READ_ONLY;
        } else {
            flags |= export_flag::SEND_TRIM
                | export_flag::SEND_WRITE_ZEROES
                | export_flag::SEND_FAST_ZERO;
        }
        if agreed.structured {
            flags |= export_flag::SEND_DF;
        }
        flags
    }

    /// The empty name means the default export, which is the only one.
    fn is(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

/// Speaks with a client until it has chosen the export. None if it went away in good order.
pub(super) fn shake_hands(
    stream: &mut (impl Read + Write),
    export: &Export,
) -> io::Result<Option<Agreed>> {
    let mut hello = Vec::with_capacity(18);
    hello.extend(NBD_MAGIC.to_be_bytes());
    hello.extend(OPTION_MAGIC.to_be_bytes());
    let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    hello.extend(flags.to_be_bytes());
    stream.write_all(&hello)?;
    let client = read_u32(stream)?;
    if client & !u32::from(flags) != 0 {
        return Err(refused("it sets handshake flags that do not exist"));
    }
    if client & u32::from(handshake_flag::FIXED_NEWSTYLE) == 0 {
        return Err(refused("it does not speak fixed newstyle"));
    }
    let no_zeroes = client & u32::from(handshake_flag::NO_ZEROES) != 0;

    let mut agreed = Agreed::default();
    for _ in 0..MAX_OPTIONS {
        if read_u64(stream)? != OPTION_MAGIC {
            return Err(refused("it sends something else than options"));
        }
        let (number, len) = (read_u32(stream)?, read_u32(stream)?);
        if len > MAX_OPTION {
            return Err(refused("it sends an option of more than 16 KiB"));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        let mut replies = Replies {
            option: number,
            bytes: Vec::new(),
        };
        match number {
            option::EXPORT_NAME => {
                // The protocol knows no answer but hanging up to a name that does not exist.
                if !export.is(&data) {
                    return Err(refused("it wants an export that does not exist"));
                }
                let mut reply = Vec::with_capacity(134);
                reply.extend(export.bytes.to_be_bytes());
                reply.extend(export.flags(agreed).to_be_bytes());
                if !no_zeroes {
                    reply.extend([0; 124]);
                }
                stream.write_all(&reply)?;
                return Ok(Some(agreed));
            }
            option::ABORT => {
                replies.add(option_reply::ACK, &[]);
                // It may have gone already, which is as good.
                let _ = stream.write_all(&replies.bytes);
                return Ok(None);
            }
            option::LIST if data.is_empty() => {
                let mut server = (export.name.len() as u32).to_be_bytes().to_vec();
                server.extend(export.name.as_bytes());
                replies.add(option_reply::SERVER, &server);
                replies.add(option_reply::ACK, &[]);
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                agreed.structured = true;
                replies.add(option_reply::ACK, &[]);
            }
            option::INFO | option::GO => {
                let go = number == option::GO;
                if replies.information(&data, export, agreed) && go {
                    stream.write_all(&replies.bytes)?;
                    return Ok(Some(agreed));
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                let set = number == option::SET_META_CONTEXT;
                let chosen = replies.contexts(&data, export, agreed, set);
                if set {
                    agreed.allocation = chosen;
                }
            }
            option::LIST | option::STRUCTURED_REPLY => {
                replies.add(option_reply::ERR_INVALID, b"this option has no data");
            }
            _ => replies.add(option_reply::ERR_UNSUP, &[]),
        }
        stream.write_all(&replies.bytes)?;
    }
    Err(refused("it does not get done with its options"))
}

/// Replies to one option.
struct Replies {
    option: u32,
    bytes: Vec<u8>,
}

impl Replies {
    fn add(&mut self, kind: u32, data: &[u8]) {
        self.bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        self.bytes.extend(self.option.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend((data.len() as u32).to_be_bytes());
        self.bytes.extend(data);
    }

    /// Answers `INFO` and `GO`. True if the export is known.
    fn information(&mut self, data: &[u8], export: &Export, agreed: Agreed) -> bool {
        let mut fields = Fields(data);
        let Some((name, wanted)) = fields.string().and_then(|name| {
            let count = usize::from(fields.u16()?);
            (fields.0.len() == count * 2).then_some((name, fields.0))
        }) else {
            self.add(option_reply::ERR_INVALID, b"the option's data is malformed");
            return false;
        };
        if !export.is(name) {
            self.add(option_reply::ERR_UNKNOWN, b"there is no such export");
            return false;
        }
        let mut about = info::EXPORT.to_be_bytes().to_vec();
        about.extend(export.bytes.to_be_bytes());
        about.extend(export.flags(agreed).to_be_bytes());
        self.add(option_reply::INFO, &about);
        let mut about = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [1, PREFERRED_BLOCK, MAX_PAYLOAD] {
            about.extend(size.to_be_bytes());
        }
        self.add(option_reply::INFO, &about);
        let (wanted, _) = wanted.as_chunks::<2>();
        if wanted.contains(&info::NAME.to_be_bytes()) {
            let mut about = info::NAME.to_be_bytes().to_vec();
            about.extend(export.name.as_bytes());
            self.add(option_reply::INFO, &about);
        }
        self.add(option_reply::ACK, &[]);
        true
    }

    /// Answers the options on metadata contexts. True if `base:allocation` is among the chosen.
    fn contexts(&mut self, data: &[u8], export: &Export, agreed: Agreed, set: bool) -> bool {
        if !agreed.structured {
            self.add(option_reply::ERR_INVALID, b"structured replies come first");
            return false;
        }
        let mut fields = Fields(data);
        let parsed = fields.string().and_then(|name| {
            let count = fields.u32()?;
            // Every query takes at least its length's bytes: no count makes this long.
            let queries: Option<Vec<_>> = (0..count).map(|_| fields.string()).collect();
            fields.0.is_empty().then_some((name, queries?))
        });
        let Some((name, queries)) = parsed else {
            self.add(option_reply::ERR_INVALID, b"the option's data is malformed");
            return false;
        };
        if !export.is(name) {
            self.add(option_reply::ERR_UNKNOWN, b"there is no such export");
            return false;
        }
        let chosen = queries
            .iter()
            .any(|query| *query == BASE_ALLOCATION.as_bytes() || (!set && query == b"base:"))
            || (!set && queries.is_empty());
        if chosen {
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            let mut context = id.to_be_bytes().to_vec();
            context.extend(BASE_ALLOCATION.as_bytes());
            self.add(option_reply::META_CONTEXT, &context);
        }
        self.add(option_reply::ACK, &[]);
        chosen
    }
}

/// Takes apart an option's data.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.take(len as usize)
    }
}

fn read_u32(stream: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_u64(stream: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

fn refused(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the NBD client is refused: {what}"),
    )
}
