//! The disks of a domain that has suspended itself: its back ends in dom0 go on with the requests that they have. The
//! guest gives all that it has no answer to once more where it runs next, so none of these may be under way any
//! more then: a write that came late would be over a newer one.
//!
//! The ring of a PV disk is a page that the guest grants to the back end (`xen/include/public/io/blkif.h`,
//! `io/ring.h`); a request is answered when it is on the disk.

use std::thread;
use std::time::{Duration, Instant};

use hybridmig_pager::xen::{GrantedPage, Store};

use crate::guest::{GuestError, GuestResult};

/// How long requests may be under way: longer than a disk may take for one and hosts go on.
const LIMIT: Duration = Duration::from_secs(30);
/// How often a ring is looked at.
const POLL: Duration = Duration::from_micros(200);
/// `XenbusStateConnected` of `xen/include/public/io/xenbus.h`.
const CONNECTED: u32 = 4;
/// The most rings of one disk that are looked at: a queue for each vCPU.
const QUEUES: u32 = 512;

/// Waits until no disk of the suspended domain has a request under way.
pub fn wait_until_idle(store: &Store, domain: u32) -> GuestResult<()> {
    let deadline = Instant::now() + LIMIT;
    let folder = format!("/local/domain/{domain}/device/vbd");
    let disks = store.list(&folder);
    for disk in disks.map_err(|error| unread(&folder, error))? {
        let disk = format!("{folder}/{disk}");
        // One that is not connected has no ring, and makes no requests.
        if number(store, &format!("{disk}/state"))? != Some(CONNECTED) {
            continue;
        }
        for reference in references(store, &disk)? {
            let ring = GrantedPage::map(domain, reference).map_err(|error| {
                GuestError::caused(format!("cannot map the ring of the disk at {disk}"), error)
            })?;
            while unanswered(ring.words()) != 0 {
                if Instant::now() > deadline {
                    return Err(GuestError::new(format!(
                        "the disk at {disk} has had {} requests under way for {} s: is its storage there?",
                        unanswered(ring.words()),
                        LIMIT.as_secs()
                    )));
                }
                thread::sleep(POLL);
            }
        }
    }
    Ok(())
}

/// Requests that the guest has made and that have no answer: of the first words of a ring's first page, which are the
/// number of requests made, the one at which the back end is woken, the number of answers given, and the one at
/// which the guest is.
fn unanswered([requests, _, answers, _]: [u32; 4]) -> u32 {
    requests.wrapping_sub(answers)
}

/// The grants of the first page of each of its rings.
fn references(store: &Store, disk: &str) -> GuestResult<Vec<u32>> {
    let queues = number(store, &format!("{disk}/multi-queue-num-queues"))?.unwrap_or(1);
    if queues > QUEUES {
        return Err(GuestError::new(format!(
            "the disk at {disk} has {queues} queues"
        )));
    }
    let reference = |queue| {
        let folder = match queues {
            1 => disk.to_owned(),
            _ => format!("{disk}/queue-{queue}"),
        };
        // The second where a ring has several pages.
        match number(store, &format!("{folder}/ring-ref"))? {
            Some(reference) => Ok(reference),
            None => number(store, &format!("{folder}/ring-ref0"))?
                .ok_or_else(|| GuestError::new(format!("{folder} tells no ring"))),
        }
    };
    (0..queues).map(reference).collect()
}

fn number(store: &Store, path: &str) -> GuestResult<Option<u32>> {
    store.number(path).map_err(|error| unread(path, error))
}

fn unread(path: &str, error: std::io::Error) -> GuestError {
    GuestError::caused(format!("cannot read {path} in xenstore"), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_across_the_end_of_numbers() {
        assert_eq!(unanswered([7, 8, 7, 8]), 0);
        assert_eq!(unanswered([9, 8, 7, 8]), 2);
        assert_eq!(unanswered([1, 0, u32::MAX, 0]), 2);
    }
}
