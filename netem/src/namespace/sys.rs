//! The system calls that set up network interfaces, wrapped. They act on the network namespace of
//! the calling thread; which one that is, is not decided here.

use std::io::{self, Read, Write};
use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Socket, Type};

/// Settings of one interface. What is `None` stays as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Interface<'a> {
    /// Its name, at most 15 bytes.
    pub name: &'a str,
    /// Its IPv4 address and the number of leading bits of its network.
    pub address: Option<(Ipv4Addr, u8)>,
    /// Its IPv6 address, likewise. Where IPv6 is not there or switched off, it gets none.
    pub address_v6: Option<(Ipv6Addr, u8)>,
    /// Largest packet, in bytes.
    pub mtu: Option<u16>,
    /// How many packets may wait for its driver.
    pub queue: Option<u16>,
}

impl Interface<'_> {
    /// Applies the settings and brings the interface up.
    pub fn bring_up(&self) -> io::Result<()> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
        let change = |request, change: &dyn Fn(&mut libc::ifreq)| {
            let mut argument = named(self.name)?;
            change(&mut argument);
            interface_ioctl(&socket, request, &mut argument)
        };
        if let Some(mtu) = self.mtu {
            change(libc::SIOCSIFMTU, &|argument| {
                argument.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
            })?;
        }
        if let Some(queue) = self.queue {
            set_queue(self.name, queue)?;
        }
        if let Some((address, prefix)) = self.address {
            change(libc::SIOCSIFADDR, &|argument| {
                argument.ifr_ifru.ifru_addr = socket_address(address);
            })?;
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            change(libc::SIOCSIFNETMASK, &|argument| {
                argument.ifr_ifru.ifru_netmask = socket_address(Ipv4Addr::from_bits(mask));
            })?;
        }
        let mut argument = named(self.name)?;
        interface_ioctl(&socket, libc::SIOCGIFFLAGS, &mut argument)?;
        // SAFETY: SIOCGIFFLAGS has just written this member.
        let flags = unsafe { argument.ifr_ifru.ifru_flags };
        argument.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        interface_ioctl(&socket, libc::SIOCSIFFLAGS, &mut argument)?;
        match self.address_v6 {
            Some((address, prefix)) => set_address_v6(self.name, address, prefix),
            None => Ok(()),
        }
    }
}

/// By netlink, since an address that the ioctl sets is tentative until a kernel worker has looked for a
/// duplicate, and cannot be bound until then. There is nobody to be a duplicate of.
fn set_address_v6(name: &str, address: Ipv6Addr, prefix: u8) -> io::Result<()> {
    // struct ifaddrmsg: family, prefix, flags (the attribute has them all), scope, index.
    let mut body = vec![libc::AF_INET6 as u8, prefix, 0, 0];
    body.extend(if_nametoindex(name)?.to_ne_bytes());
    attribute(&mut body, libc::IFA_LOCAL, &address.octets());
    attribute(&mut body, libc::IFA_FLAGS, &libc::IFA_F_NODAD.to_ne_bytes());
    let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    let result = netlink(libc::RTM_NEWADDR, flags, &body);
    match result.as_ref().map_err(io::Error::raw_os_error) {
        // A kernel without IPv6, or the sysctl disable_ipv6.
        Err(Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::EACCES)) => Ok(()),
        _ => result,
    }
}

/// A request that names an interface and is otherwise empty.
pub fn named(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data for which all zeroes is a valid (empty) value.
    let mut argument: libc::ifreq = unsafe { mem::zeroed() };
    // The last byte stays zero, as the end of the name.
    let room = argument.ifr_name.len() - 1;
    if name.is_empty() || name.len() > room {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("an interface name has 1 to {room} bytes, not {name:?}"),
        ));
    }
    for (to, from) in argument.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(argument)
}

/// Sets how many packets may wait for the driver of an interface. By netlink, since the ioctl wants
/// a privilege over the whole machine.
fn set_queue(name: &str, packets: u16) -> io::Result<()> {
    let mut name = name.as_bytes().to_vec();
    name.push(0);
    // struct ifinfomsg: no index, the name says which.
    let mut body = vec![0; 16];
    attribute(&mut body, libc::IFLA_IFNAME, &name);
    attribute(
        &mut body,
        libc::IFLA_TXQLEN,
        &u32::from(packets).to_ne_bytes(),
    );
    netlink(libc::RTM_NEWLINK, 0, &body)
}

/// Appends an attribute (struct rtattr and its value), padded.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend((value.len() as u16 + 4).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Sends one request to the kernel's routing socket and reads what became of it.
fn netlink(request: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
    let protocol = Protocol::from(libc::NETLINK_ROUTE);
    let mut socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(protocol))?;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
    // struct nlmsghdr: a sequence number and a sender that nobody needs follow the flags.
    let mut message = (body.len() as u32 + 16).to_ne_bytes().to_vec();
    message.extend(request.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.resize(16, 0);
    message.extend(body);
    socket.write_all(&message)?;
    // The answer is a header and an error number, zero or negative.
    let mut answer = [0; 4096];
    let length = socket.read(&mut answer)?;
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    if length < 20 || libc::c_int::from(kind) != libc::NLMSG_ERROR {
        return Err(io::Error::other("an unexpected answer from netlink"));
    }
    let error = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    match error {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Lets `command` run in the network namespace `descriptor`.
pub fn enter(
    command: &mut Command,
    descriptor: Arc<impl std::os::fd::AsFd + Send + Sync + 'static>,
) {
    let hook = move || Ok(setns(descriptor.as_fd(), CloneFlags::CLONE_NEWNET)?);
    // SAFETY: between fork and exec, the hook makes one system call and neither allocates nor
    // locks; an error is made of its number alone.
    unsafe { command.pre_exec(hook) };
}

/// A descriptor by its number, to look at an open file of this process by `/proc`.
pub fn number(descriptor: BorrowedFd<'_>) -> i32 {
    descriptor.as_raw_fd()
}

fn interface_ioctl(
    socket: &Socket,
    request: libc::c_ulong,
    argument: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: every request of this file takes a pointer to an ifreq, which lives.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request as _, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(address.octets()),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain data of the same 16 bytes; the kernel tells them apart by the family.
    unsafe { mem::transmute(address) }
}
