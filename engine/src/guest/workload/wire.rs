//! Lines of JSON over a Unix stream socket, with descriptors attached: the form of the guest's
//! control socket. Bounded in length and in descriptors. This file must never know what a line
//! means.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest line in bytes, with its end.
pub const MAX_LINE: usize = 256 * 1024;
/// Most descriptors that come with one line.
pub const MAX_FDS: usize = 4;

/// Sends a line; the descriptors go with its first byte.
pub fn send<T: Serialize>(
    stream: &UnixStream,
    value: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    assert!(fds.len() <= MAX_FDS);
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    if line.len() > MAX_LINE {
        return Err(io::Error::other("the line would be too long"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let mut sent = 0;
    while sent < line.len() {
        let slices = [IoSlice::new(&line[sent..])];
        match sendmsg(stream, &slices, &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(count) => {
                sent += count;
                ancillary.clear();
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Receives lines.
pub struct LineReader {
    stream: UnixStream,
    buffer: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl LineReader {
    /// Reads from a stream.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// The stream.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The next line with the descriptors that have come; none at the end of the stream. A line
    /// that does not parse is an error of kind `InvalidData`, after which the reader can go on.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let fds = std::mem::take(&mut self.fds);
                let value = serde_json::from_slice(&line)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                return Ok(Some((value, fds)));
            }
            if self.buffer.len() >= MAX_LINE {
                return Err(io::Error::other(format!(
                    "a line is longer than {MAX_LINE} bytes"
                )));
            }
            if !self.fill()? {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
    }

    /// Reads what there is; false at the end of the stream.
    fn fill(&mut self) -> io::Result<bool> {
        let mut chunk = [0; 16 * 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut slices = [IoSliceMut::new(&mut chunk)];
            match recvmsg(
                &self.stream,
                &mut slices,
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                result => break result?,
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if self.fds.len() > MAX_FDS {
            return Err(io::Error::other("more descriptors than a line may have"));
        }
        self.buffer.extend_from_slice(&chunk[..received.bytes]);
        Ok(received.bytes > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn lines_carry_descriptors() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut read, write) = std::io::pipe().unwrap();
        let mut reader = LineReader::new(b);
        send(&a, &"first", &[]).unwrap();
        let (line, fds): (String, _) = reader.receive().unwrap().unwrap();
        assert_eq!((line.as_str(), fds.len()), ("first", 0));
        send(&a, &"second", &[write.as_fd()]).unwrap();
        drop((a, write));
        let (line, mut fds): (String, _) = reader.receive().unwrap().unwrap();
        assert_eq!((line.as_str(), fds.len()), ("second", 1));
        std::fs::File::from(fds.remove(0)).write_all(b"x").unwrap();
        assert_eq!(read.read(&mut [0; 4]).unwrap(), 1);
        assert!(reader.receive::<String>().unwrap().is_none());
    }

    #[test]
    fn bad_lines_are_errors() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(b"no json\n\"good\"\n\"cut").unwrap();
        drop(a);
        let mut reader = LineReader::new(b);
        let error = reader.receive::<String>().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(reader.receive::<String>().unwrap().unwrap().0, "good");
        let error = reader.receive::<String>().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn an_endless_line_is_an_error() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            // Fails once the reader has given up.
            let chunk = [b'x'; 4096];
            while a.write_all(&chunk).is_ok() {}
        });
        let mut reader = LineReader::new(b);
        assert!(reader.receive::<String>().is_err());
        drop(reader);
        writer.join().unwrap();
    }
}
