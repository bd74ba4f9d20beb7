//! A TUN device in a network namespace, and its packets. It reads and writes whole frames and
//! never looks into one.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use super::TunError;
use super::gso::HEADER;
use super::sys;
use crate::namespace::Namespace;
use crate::namespace::sys::Interface;

/// The device's name, the same in both namespaces.
pub const NAME: &str = "wan0";

/// Frames that may wait for the emulator. TCP sends a window at once, and what finds no room here is lost
/// outside the emulated link.
const QUEUE: u16 = 8192;

/// Bits of the network that both addresses are in.
const PREFIX: u8 = 30;
const PREFIX_V6: u8 = 64;

/// Least MTU that IPv6 works with.
const MTU_MIN_V6: u16 = 1280;

/// Bytes of `/proc/net/dev` that are looked at: two interfaces and the heading take less.
const STATISTICS: usize = 4096;

/// What the kernel may leave to us: checksums, and the segmentation of TCP.
const OFFLOAD_TCP: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;

/// And of UDP, since Linux 6.2.
const OFFLOAD_UDP: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// An open device. The kernel removes it when this is closed.
#[derive(Debug)]
pub struct Device {
    file: File,
    /// `/proc/net/dev` of the device's namespace.
    statistics: File,
}

impl Device {
    /// Makes the device in `namespace`, with an address of each kind, and brings it up.
    pub fn create(
        namespace: &Namespace,
        address: (Ipv4Addr, Ipv6Addr),
        mtu: u16,
        offload: bool,
    ) -> Result<Self, TunError> {
        let failed = |what| move |source| TunError::Device { what, source };
        quieten(namespace).map_err(failed("set the IPv6 defaults of"))?;
        let open = || -> Result<Self, TunError> {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/net/tun")
                .map_err(failed("open /dev/net/tun for"))?;
            sys::create(&file, NAME, HEADER).map_err(failed("make"))?;
            if offload {
                sys::set_offload(&file, OFFLOAD_TCP | OFFLOAD_UDP)
                    .or_else(|_| sys::set_offload(&file, OFFLOAD_TCP))
                    .map_err(failed("set the offloads of"))?;
            }
            // Opened here, it shows this thread's namespace wherever it is read.
            let statistics = File::open("/proc/thread-self/net/dev")
                .map_err(failed("open the statistics of"))?;
            Ok(Self { file, statistics })
        };
        let device = namespace
            .run(open)
            .map_err(failed("enter the namespace of"))??;
        namespace
            .set_up_interface(&Interface {
                name: NAME,
                address: Some((address.0, PREFIX)),
                address_v6: (mtu >= MTU_MIN_V6).then_some((address.1, PREFIX_V6)),
                mtu: Some(mtu),
                queue: Some(QUEUE),
            })
            .map_err(failed("set up"))?;
        Ok(device)
    }

    /// Reads the next frame into `buffer` and returns its length; `None` if none waits.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            return match (&self.file).read(buffer) {
                Ok(length) => Ok(Some(length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
        }
    }

    /// Hands a frame to the kernel, as if it had come over a wire.
    pub fn write(&self, frame: &[u8]) -> io::Result<()> {
        loop {
            return match (&self.file).write(frame) {
                Ok(length) if length == frame.len() => Ok(()),
                Ok(_) => Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
        }
    }

    /// Frames that the kernel had for this device and dropped before they could be read.
    pub fn dropped_unread(&self) -> io::Result<u64> {
        let mut buffer = [0; STATISTICS];
        let length = self.statistics.read_at(&mut buffer, 0)?;
        let text = String::from_utf8_lossy(&buffer[..length]);
        transmit_drops(&text, NAME)
            .ok_or_else(|| io::Error::other(format!("no {NAME} in its namespace's /proc/net/dev")))
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Keeps the kernel's own IPv6 traffic (solicitations, reports of a link-local address) off the devices to
/// come, so that an idle link carries nothing. IPv6 works on them all the same, given an address.
fn quieten(namespace: &Namespace) -> io::Result<()> {
    for (name, value) in [("addr_gen_mode", "1"), ("router_solicitations", "0")] {
        let name = format!("net.ipv6.conf.default.{name}");
        match namespace.set_sysctl(&name, value) {
            // A kernel without IPv6 sends none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
    }
    Ok(())
}

/// The column of `/proc/net/dev` with the transmit drops of an interface.
fn transmit_drops(text: &str, interface: &str) -> Option<u64> {
    let (_, columns) = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == interface)?;
    // Eight columns of what was received come first; bytes, packets, errors and drops follow.
    columns.split_whitespace().nth(11)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_found_in_their_column() {
        let text = "\
Inter-|   Receive                           |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls
    lo:    1    2    3    4    5    6    7    8    9   10   11   12   13   14   15   16
  wan0:  101  102  103  104  105  106  107  108  109  110  111  112  113  114  115  116
";
        assert_eq!(transmit_drops(text, "wan0"), Some(112));
        assert_eq!(transmit_drops(text, "lo"), Some(12));
        assert_eq!(transmit_drops(text, "wan1"), None);
        assert_eq!(transmit_drops("", "wan0"), None);
    }
}
