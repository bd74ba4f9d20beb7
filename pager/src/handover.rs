//! A VMM, or the embedded guest, hands its userfaultfd over by itself: one message on a Unix
//! socket, in the form that Firecracker uses for its page-fault handler. The message is a JSON
//! array of mappings, the descriptors travel with it (SCM_RIGHTS): first the userfaultfd, and, an
//! extension of ours, the memory file behind the mappings.
//!
//! What comes in is bounded and checked; nothing of it is trusted to be true of the process.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};

use crate::{PAGE_SIZE, PagerError, Result, Uffd};

/// Longest message: some thousand mappings.
const MAX_MESSAGE: usize = 1 << 20;
/// Most pieces that a message may come in.
const MAX_PIECES: usize = 1024;
/// Most descriptors in one message (the kernel's SCM_MAX_FD is 253).
const MAX_FDS: usize = 4;

/// One mapping of guest memory, as Firecracker describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMapping {
    /// Address in the guest's process, in bytes.
    pub base_host_virt_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Offset in the memory file, in bytes.
    pub offset: u64,
    /// Page size in bytes. Older senders leave it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u64>,
    /// Page size by its older name; in bytes too, despite the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_size_kib: Option<u64>,
    /// Our own: which region of the guest this is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
}

impl GuestMapping {
    /// A mapping in pages of 4 KiB.
    pub fn new(address: u64, size: u64, offset: u64, region: Option<String>) -> Self {
        Self {
            base_host_virt_addr: address,
            size,
            offset,
            page_size: Some(PAGE_SIZE as u64),
            page_size_kib: Some(PAGE_SIZE as u64),
            region,
        }
    }

    fn check(&self) -> std::result::Result<(), String> {
        let page = PAGE_SIZE as u64;
        for size in [self.page_size, self.page_size_kib].into_iter().flatten() {
            if size != page {
                return Err(format!("pages of {size} bytes; only {page} is supported"));
            }
        }
        for (name, value) in [
            ("base_host_virt_addr", self.base_host_virt_addr),
            ("size", self.size),
            ("offset", self.offset),
        ] {
            if !value.is_multiple_of(page) {
                return Err(format!("{name} {value:#x} is not a multiple of {page}"));
            }
        }
        // User addresses end below 2^56 on every x86-64; offsets are signed in the kernel.
        let fits =
            |start: u64, limit: u64| start.checked_add(self.size).is_some_and(|end| end <= limit);
        if self.size == 0
            || self.base_host_virt_addr == 0
            || !fits(self.base_host_virt_addr, 1 << 56)
            || !fits(self.offset, i64::MAX as u64)
        {
            return Err(format!(
                "{:#x} bytes at {:#x} are not a mapping",
                self.size, self.base_host_virt_addr
            ));
        }
        Ok(())
    }
}

/// What came over the socket.
#[derive(Debug)]
pub struct Handover {
    /// The mappings, checked for form: none empty, none overlapping another.
    pub mappings: Vec<GuestMapping>,
    /// The guest's userfaultfd; the handshake may have been done.
    pub uffd: Uffd,
    /// The memory file, if it was sent along.
    pub memory: Option<OwnedFd>,
    /// The process at the other end, as the kernel says.
    pub pid: u32,
}

/// Decodes and checks the JSON part.
pub fn decode(message: &[u8]) -> Result<Vec<GuestMapping>> {
    let bad = PagerError::BadHandover;
    let mappings: Vec<GuestMapping> = serde_json::from_slice(message)
        .map_err(|error| bad(format!("not a list of mappings: {error}")))?;
    check(&mappings)?;
    Ok(mappings)
}

/// Checks the form of what [`decode`] decodes, for those who get it by other ways.
pub fn check(mappings: &[GuestMapping]) -> Result<()> {
    let bad = PagerError::BadHandover;
    if mappings.is_empty() {
        return Err(bad("the list of mappings is empty".into()));
    }
    mappings
        .iter()
        .try_for_each(GuestMapping::check)
        .map_err(bad)?;
    let mut spans: Vec<_> = mappings
        .iter()
        .map(|map| (map.base_host_virt_addr, map.size))
        .collect();
    spans.sort_unstable();
    if spans
        .windows(2)
        .any(|pair| pair[0].0 + pair[0].1 > pair[1].0)
    {
        return Err(bad("mappings overlap".into()));
    }
    Ok(())
}

/// Sends the handover from within the guest's process. Keep a copy of the userfaultfd open
/// afterwards: it is what lets another pager take over.
pub fn send(
    socket: &UnixStream,
    mappings: &[GuestMapping],
    uffd: BorrowedFd<'_>,
    memory: Option<BorrowedFd<'_>>,
) -> Result<()> {
    let fail = |error: Errno| PagerError::os("sending the handover", error);
    let message =
        serde_json::to_vec(mappings).map_err(|error| PagerError::BadHandover(error.to_string()))?;
    if message.len() > MAX_MESSAGE {
        return Err(PagerError::BadHandover(format!(
            "{} mappings are too many",
            mappings.len()
        )));
    }
    let mut fds = vec![uffd];
    fds.extend(memory);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(PagerError::BadHandover("too many descriptors".into()));
    }
    let mut sent = loop {
        match rustix::net::sendmsg(
            socket,
            &[IoSlice::new(&message)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Ok(sent) => break sent,
            Err(Errno::INTR) => {}
            Err(error) => return Err(fail(error)),
        }
    };
    // The descriptors have gone with the first byte.
    while sent < message.len() {
        match rustix::net::send(socket, &message[sent..], SendFlags::NOSIGNAL) {
            Ok(more) => sent += more,
            Err(Errno::INTR) => {}
            Err(error) => return Err(fail(error)),
        }
    }
    Ok(())
}

/// Receives a handover: reads until the JSON array is complete, `deadline` at most between two
/// pieces. The socket stays usable; what the peer sends next is not consumed only if it waits for
/// us, as the form has no length.
pub fn receive(socket: &UnixStream, deadline: Duration) -> Result<Handover> {
    let bad = |what: &str| PagerError::BadHandover(what.to_owned());
    let pid = rustix::net::sockopt::socket_peercred(socket)
        .map_err(|error| PagerError::os("asking who is at the other end of the socket", error))?
        .pid
        .as_raw_nonzero()
        .get() as u32;
    let before = socket
        .read_timeout()
        .map_err(|error| PagerError::os("reading the socket's timeout", error))?;
    let set = |timeout| {
        socket
            .set_read_timeout(timeout)
            .map_err(|error| PagerError::os("setting the socket's timeout", error))
    };
    set(Some(deadline))?;
    let received = receive_message(socket);
    set(before)?;
    let (message, mut fds) = received?;
    let mappings = decode(&message)?;
    if fds.len() > 2 {
        return Err(bad("more descriptors than a userfaultfd and a memory file"));
    }
    let memory = (fds.len() == 2).then(|| fds.pop()).flatten();
    let uffd = fds
        .pop()
        .ok_or_else(|| bad("no userfaultfd came with it"))?;
    let uffd = Uffd::from_fd(uffd)?;
    uffd.features()
        .map_err(|_| bad("the first descriptor is not a userfaultfd"))?;
    Ok(Handover {
        mappings,
        uffd,
        memory,
        pid,
    })
}

fn receive_message(socket: &UnixStream) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut message = Vec::new();
    let mut fds = Vec::new();
    let mut piece = vec![0; 64 << 10];
    for _ in 0..MAX_PIECES {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(&mut piece)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        );
        let received = match received {
            Ok(received) => received,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => {
                return Err(PagerError::BadHandover(
                    "the other end did not finish it in time".into(),
                ));
            }
            Err(error) => return Err(PagerError::os("receiving the handover", error)),
        };
        for control in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = control {
                fds.extend(more);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
            return Err(PagerError::BadHandover("too many descriptors".into()));
        }
        message.extend_from_slice(&piece[..received.bytes]);
        if received.bytes == 0 {
            return Err(PagerError::BadHandover(format!(
                "the other end closed the socket after {} bytes",
                message.len()
            )));
        }
        if message.len() > MAX_MESSAGE {
            return Err(PagerError::BadHandover("the message is too long".into()));
        }
        // Complete, or wrong: either way it is for the decoder to say. Only "not yet" reads on.
        match serde_json::from_slice::<serde::de::IgnoredAny>(&message) {
            Err(error) if error.is_eof() => {}
            _ => return Ok((message, fds)),
        }
    }
    Err(PagerError::BadHandover(
        "the message came in too many pieces".into(),
    ))
}
