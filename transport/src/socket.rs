//! The UDP socket under an endpoint, with buffers that hold what a fast link brings between two
//! wake-ups of the process.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

/// Bytes of socket buffer each way.
const BUFFER: usize = 8 << 20;

pub(crate) fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    enlarge(&socket);
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Asks for large buffers. The kernel's limits may allow less, which costs speed and nothing else.
fn enlarge(socket: &Socket) {
    // With CAP_NET_ADMIN the limits do not hold; without it this fails and the plain way follows.
    force(socket, libc::SO_RCVBUFFORCE);
    force(socket, libc::SO_SNDBUFFORCE);
    let received = socket.recv_buffer_size().unwrap_or(0);
    if received < BUFFER {
        report(
            "receive",
            "rmem_max",
            socket.set_recv_buffer_size(BUFFER),
            || socket.recv_buffer_size(),
        );
    }
    let sent = socket.send_buffer_size().unwrap_or(0);
    if sent < BUFFER {
        report(
            "send",
            "wmem_max",
            socket.set_send_buffer_size(BUFFER),
            || socket.send_buffer_size(),
        );
    }
}

fn report(which: &str, limit: &str, set: io::Result<()>, size: impl Fn() -> io::Result<usize>) {
    let bytes = size().unwrap_or(0);
    if set.is_err() || bytes < BUFFER {
        tracing::warn!(
            bytes,
            wanted = BUFFER,
            "the UDP {which} buffer is small: raise net.core.{limit} for fast links"
        );
    }
}

fn force(socket: &Socket, option: libc::c_int) {
    use std::os::fd::AsRawFd as _;
    let size = BUFFER as libc::c_int;
    // SAFETY: the option reads one int from a pointer to a live int; the descriptor is the
    // socket's, open for the whole call. Failure is reported by the return value alone, and the
    // caller looks at the resulting size.
    let _checked_by_size = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const size).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
}
