//! Attaching to a process that knows nothing of it: with and without privileges, asleep and busy,
//! again and again; and it goes on as before.

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;

use common::Guest;
use hybridmig_pager::{Features, PagerError, attach, kernel, process};

#[test]
fn a_privileged_process() {
    let mut guest = Guest::new(64);
    let attached = attach::attach(guest.pid(), attach::Method::Syscall).unwrap();
    assert_eq!(
        process::find_userfaultfds(guest.pid()).unwrap(),
        [attached.target_fd]
    );
    attached.uffd.handshake(Features::PLACING).unwrap();
    // Interrupted in read(2), which must have been restarted.
    assert_eq!(guest.ask("fill 1"), "done");
    let recovered = attach::recover(guest.pid()).unwrap();
    assert_eq!(recovered.target_fd, attached.target_fd);
    assert_eq!(recovered.uffd.features().unwrap(), Some(Features::PLACING));
    attach::close_in_target(guest.pid(), attached.target_fd).unwrap();
    assert!(attach::recover(guest.pid()).is_err());
    assert_eq!(guest.ask("verify 1 1"), "ok");
}

#[test]
fn an_unprivileged_process_by_the_device() {
    // Inherited by the guest, as by QMP getfd.
    let device = File::options()
        .read(true)
        .write(true)
        .open(kernel::DEVICE)
        .unwrap();
    rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::empty()).unwrap();
    let mut guest = Guest::with_user(64, 65534);
    let refused = attach::attach(guest.pid(), attach::Method::Syscall);
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
        .is_ok_and(|value| value.trim() == "1");
    assert!(allowed || matches!(refused, Err(PagerError::NotPermitted { .. })));
    let attached = attach::attach(guest.pid(), attach::Method::Device(device.as_raw_fd())).unwrap();
    attached.uffd.handshake(Features::TRACKING).unwrap();
    assert_eq!(guest.ask("fill 1"), "done");
    assert_eq!(guest.ask("verify 1 2"), "ok");
}

#[test]
fn a_busy_process_again_and_again() {
    let mut guest = Guest::new(64);
    guest.ask("spin");
    guest.ask("spin");
    let before = open_descriptors(guest.pid());
    for round in 0..50 {
        guest.process.send(&format!("churn {round} 5"));
        let attached = attach::attach(guest.pid(), attach::Method::Syscall).unwrap();
        attach::close_in_target(guest.pid(), attached.target_fd).unwrap();
        assert_eq!(guest.process.line(), "done");
    }
    assert_eq!(open_descriptors(guest.pid()), before);
    assert_eq!(guest.ask("fill 7"), "done");
    assert_eq!(guest.ask("verify 7 3"), "ok");
}

#[test]
fn what_cannot_be_attached_to_is_refused() {
    let mut guest = Guest::new(64);
    // Not a userfaultfd: must not be closed.
    assert!(attach::close_in_target(guest.pid(), guest.fd).is_err());
    assert_eq!(guest.ask("fill 7"), "done");
    guest.process.kill();
    assert!(matches!(
        attach::attach(guest.pid(), attach::Method::Syscall),
        Err(PagerError::GuestGone { .. })
    ));
    // A process cannot trace itself.
    assert!(attach::attach(std::process::id(), attach::Method::Syscall).is_err());
}

fn open_descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}
