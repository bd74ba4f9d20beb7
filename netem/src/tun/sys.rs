//! The ioctls of a TUN device, wrapped.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::namespace::sys::named;

/// Makes an open `/dev/net/tun` the device `name` of this thread's network namespace: IP packets,
/// each behind a `virtio_net_hdr` of `header` bytes.
pub fn create(file: &File, name: &str, header: usize) -> io::Result<()> {
    let mut request = named(name)?;
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF takes a pointer to an ifreq, which lives.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    let header = header as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ takes a pointer to an int, which lives.
    check(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETVNETHDRSZ as _,
            &raw const header,
        )
    })
}

/// Says which work on packets their reader takes over (`TUN_F_…`).
pub fn set_offload(file: &File, features: libc::c_uint) -> io::Result<()> {
    let features = libc::c_ulong::from(features);
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, features) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
