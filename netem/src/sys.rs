//! The system calls of the runners, wrapped: batches of datagrams, waiting with nanoseconds, thread
//! priority. All `unsafe` of the crate is here; nothing here decides anything about packets.

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::Duration;

use socket2::{SockAddr, SockAddrStorage};

/// Datagrams per system call.
pub const BATCH: usize = 64;

/// Room for the largest UDP payload.
const SLOT: usize = 1 << 16;

/// Datagrams received by one system call.
pub struct Batch {
    slots: Vec<u8>,
    lengths: Vec<usize>,
    senders: Vec<Option<SocketAddr>>,
}

impl Batch {
    /// An empty batch with room for [`BATCH`] datagrams of any size.
    pub fn new() -> Self {
        Self {
            slots: vec![0; BATCH * SLOT],
            lengths: Vec::with_capacity(BATCH),
            senders: Vec::with_capacity(BATCH),
        }
    }

    /// Receives what is there without waiting, up to [`BATCH`] datagrams; none is not an error.
    pub fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        self.lengths.clear();
        self.senders.clear();
        let mut addresses: [SockAddrStorage; BATCH] =
            std::array::from_fn(|_| SockAddrStorage::zeroed());
        let mut vectors: [libc::iovec; BATCH] = std::array::from_fn(|i| libc::iovec {
            iov_base: self.slots[i * SLOT..].as_mut_ptr().cast(),
            iov_len: SLOT,
        });
        // SAFETY: mmsghdr is plain data for which all zeroes is a valid (empty) value.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        for ((header, address), vector) in headers.iter_mut().zip(&mut addresses).zip(&mut vectors)
        {
            header.msg_hdr.msg_name = ptr::from_mut(address).cast();
            header.msg_hdr.msg_namelen = address.size_of();
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: every header points at an address and a vector of these arrays and at a slot of
        // `self.slots` of SLOT bytes; all outlive the call, and no two slots overlap.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        if received < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            };
        }
        for (header, address) in headers.iter().zip(addresses).take(received as usize) {
            // SAFETY: the kernel has written an address of this length there, at most the storage.
            let address = unsafe { SockAddr::new(address, header.msg_hdr.msg_namelen) };
            self.lengths.push(header.msg_len as usize);
            self.senders.push(address.as_socket());
        }
        Ok(self.lengths.len())
    }

    /// The datagrams of the last receive, each with its sender.
    pub fn datagrams(&self) -> impl Iterator<Item = (&[u8], Option<SocketAddr>)> {
        let slots = self.slots.chunks_exact(SLOT);
        slots
            .zip(&self.lengths)
            .zip(&self.senders)
            .map(|((slot, length), sender)| (&slot[..*length], *sender))
    }
}

/// Sends datagrams without waiting, up to [`BATCH`]; returns how many were taken, at least one
/// unless it fails. `to` is `None` on a connected socket.
pub fn send_batch(
    socket: &UdpSocket,
    datagrams: &[(&[u8], Option<&SockAddr>)],
) -> io::Result<usize> {
    let count = datagrams.len().min(BATCH);
    let mut vectors: [MaybeUninit<libc::iovec>; BATCH] = [const { MaybeUninit::uninit() }; BATCH];
    // SAFETY: mmsghdr is plain data for which all zeroes is a valid (empty) value.
    let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
    for ((header, vector), (bytes, to)) in headers.iter_mut().zip(&mut vectors).zip(datagrams) {
        header.msg_hdr.msg_iov = vector.write(libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        });
        header.msg_hdr.msg_iovlen = 1;
        if let Some(to) = to {
            header.msg_hdr.msg_name = to.as_ptr().cast_mut().cast();
            header.msg_hdr.msg_namelen = to.len();
        }
    }
    // SAFETY: the first `count` headers point at vectors, addresses and payloads that outlive the
    // call; sendmmsg only reads through them.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            count as libc::c_uint,
            libc::MSG_DONTWAIT,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(sent as usize)
}

/// Wakes a thread that is in [`wait`].
#[derive(Debug)]
pub struct Wake(OwnedFd);

impl Wake {
    /// A new one, not set.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers; the result is checked.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a file descriptor that was just made, and that nobody else knows.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sets it.
    pub fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes of a live array. It can only fail when the counter is full, and then
        // the thread is about to wake anyway.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Resets it.
    pub fn clear(&self) {
        let mut count = [0u8; 8];
        // SAFETY: eight bytes of a live array. It can only fail when the counter is zero already.
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of `polls` has something to read or `timeout` has passed (never, if `None`). A signal ends
/// the wait early.
pub fn wait(polls: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(timeout.subsec_nanos()),
    });
    let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: a live slice with its length, and a timeout that is null or outlives the call.
    let ready = unsafe {
        libc::ppoll(
            polls.as_mut_ptr(),
            polls.len() as libc::nfds_t,
            timeout,
            ptr::null(),
        )
    };
    if ready < 0 {
        for poll in polls {
            poll.revents = 0;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(())
}

/// An entry for [`wait`].
pub fn readable(fd: &impl AsFd) -> libc::pollfd {
    libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }
}

/// Makes timers of the calling thread exact and, where the system allows it, puts the thread before
/// ordinary ones: an emulated link that waits for the CPU is a longer link. Returns whether
/// the second was allowed.
pub fn prefer_latency() -> bool {
    // SAFETY: sets one number of the calling thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong, 0, 0, 0) };
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: a live struct; 0 is the calling thread.
    unsafe {
        libc::sched_setscheduler(
            0,
            libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK,
            &raw const priority,
        ) == 0
    }
}

/// Asks for `bytes` of socket buffer each way, past the system's limit where that is allowed.
pub fn grow_buffers(socket: &UdpSocket, bytes: usize) -> io::Result<()> {
    let wanted = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        // SAFETY: a live c_int with its size. Without the privilege it fails and changes nothing.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                ptr::from_ref(&wanted).cast(),
                mem::size_of_val(&wanted) as libc::socklen_t,
            )
        };
    }
    let socket = socket2::SockRef::from(socket);
    // The getters report twice what was asked for.
    if socket.recv_buffer_size()? < 2 * bytes {
        socket.set_recv_buffer_size(bytes)?;
    }
    if socket.send_buffer_size()? < 2 * bytes {
        socket.set_send_buffer_size(bytes)?;
    }
    Ok(())
}

/// Lets the kernel cut what is sent into datagrams of `segment` bytes, and hand those of one sender over
/// together: one system call for many. Whether it can; if not, nothing has changed.
pub fn segment(sender: &UdpSocket, receiver: &UdpSocket, segment: usize) -> bool {
    let set = |socket: &UdpSocket, option: libc::c_int, value: libc::c_int| {
        // SAFETY: a live c_int with its size.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_UDP,
                option,
                ptr::from_ref(&value).cast(),
                mem::size_of_val(&value) as libc::socklen_t,
            ) == 0
        }
    };
    set(receiver, libc::UDP_GRO, 1) && set(sender, libc::UDP_SEGMENT, segment as libc::c_int)
}
