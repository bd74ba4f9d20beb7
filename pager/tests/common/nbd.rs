//! A small NBD client that says what it likes, sensible or not.
#![allow(dead_code)] // each test file uses a part of it

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;
pub const FUA: u16 = 1;
pub const DF: u16 = 4;

pub const EPERM: u32 = 1;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const PATIENCE: Duration = Duration::from_secs(60);

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

/// A chunk, or a simple reply (of kind 0) without the data of a read.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    pub error: u32,
    pub last: bool,
    pub kind: u16,
    pub data: Vec<u8>,
}

pub struct Client {
    pub stream: UnixStream,
}

impl Client {
    /// Connected, and greeted.
    pub fn connect(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut hello = [0; 18];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
        stream.write_all(&3_u32.to_be_bytes()).unwrap();
        Self { stream }
    }

    /// Ready for requests, with structured replies if wanted.
    pub fn open(socket: &Path, structured: bool) -> Self {
        let mut client = Self::connect(socket);
        if structured {
            client.option(8, &[]);
            assert_eq!(client.option_reply().unwrap().0, 1);
        }
        client.option(7, &[0; 6]);
        while client.option_reply().unwrap().0 == 3 {}
        client
    }

    pub fn option(&mut self, option: u32, data: &[u8]) {
        let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.stream.write_all(&message).unwrap();
    }

    /// Kind and data of a reply to an option.
    pub fn option_reply(&mut self) -> io::Result<(u32, Vec<u8>)> {
        let mut head = [0; 20];
        self.stream.read_exact(&mut head)?;
        assert_eq!(head[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        let mut data = vec![0; word(&head[16..]) as usize];
        self.stream.read_exact(&mut data)?;
        Ok((word(&head[12..16]), data))
    }

    pub fn send(&mut self, request: Request, payload: &[u8]) -> io::Result<()> {
        let mut message = 0x2560_9513_u32.to_be_bytes().to_vec();
        message.extend(request.flags.to_be_bytes());
        message.extend(request.command.to_be_bytes());
        message.extend(request.cookie.to_be_bytes());
        message.extend(request.offset.to_be_bytes());
        message.extend(request.len.to_be_bytes());
        message.extend(payload);
        self.stream.write_all(&message)
    }

    pub fn receive(&mut self) -> io::Result<Reply> {
        let mut magic = [0; 4];
        self.stream.read_exact(&mut magic)?;
        if word(&magic) == 0x6744_6698 {
            let mut rest = [0; 12];
            self.stream.read_exact(&mut rest)?;
            return Ok(Reply {
                cookie: long(&rest[4..]),
                error: word(&rest),
                last: true,
                kind: 0,
                data: Vec::new(),
            });
        }
        assert_eq!(word(&magic), 0x668e_33ef);
        let mut rest = [0; 16];
        self.stream.read_exact(&mut rest)?;
        let mut data = vec![0; word(&rest[12..]) as usize];
        self.stream.read_exact(&mut data)?;
        let kind = u16::from_be_bytes([rest[2], rest[3]]);
        Ok(Reply {
            cookie: long(&rest[4..]),
            error: if kind >> 15 == 1 { word(&data) } else { 0 },
            last: rest[1] & 1 == 1,
            kind,
            data,
        })
    }

    /// The error of a request, 0 for none, with data dropped. One request at a time.
    pub fn ask(&mut self, request: Request, payload: &[u8]) -> io::Result<u32> {
        self.send(request, payload)?;
        loop {
            let reply = self.receive()?;
            assert_eq!(reply.cookie, request.cookie);
            if reply.last {
                return Ok(reply.error);
            }
        }
    }

    /// Reads by simple replies: for a client without structured ones.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) {
        let request = Request {
            flags: 0,
            command: READ,
            cookie: 77,
            offset,
            len: buf.len() as u32,
        };
        assert_eq!(self.ask(request, &[]).unwrap(), 0);
        self.stream.read_exact(buf).unwrap();
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

fn long(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().unwrap())
}
