//! The handover over a Unix socket, both ends, and what must be refused.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hybridmig_pager::handover::{self, GuestMapping};
use hybridmig_pager::{Features, PagerError, Uffd};
use proptest::prelude::*;

const SOON: Duration = Duration::from_secs(10);

fn mapping(address: u64, size: u64) -> GuestMapping {
    GuestMapping::new(address, size, 0, Some("ram".into()))
}

#[test]
fn mappings_and_descriptors_arrive() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let uffd = Uffd::for_this_process(true).unwrap();
    uffd.handshake(Features::MISSING_SHMEM).unwrap();
    let memory = std::fs::File::open("/dev/zero").unwrap();
    // Long enough to need several reads.
    let sent: Vec<_> = (1..1500).map(|i| mapping(i << 20, 4096)).collect();
    let sender = std::thread::spawn({
        let (sent, uffd) = (sent.clone(), uffd.as_fd().try_clone_to_owned().unwrap());
        move || handover::send(&theirs, &sent, uffd.as_fd(), Some(memory.as_fd())).unwrap()
    });
    let got = handover::receive(&ours, SOON).unwrap();
    sender.join().unwrap();
    assert_eq!(got.mappings, sent);
    assert_eq!(got.pid, std::process::id());
    assert!(got.memory.is_some());
    assert_eq!(got.uffd.features().unwrap(), Some(Features::MISSING_SHMEM));
}

#[test]
fn the_form_that_firecracker_sends() {
    let text = br#"[{"base_host_virt_addr":140000000000000,"size":134217728,"offset":0,
        "page_size":4096,"page_size_kib":4096},
        {"base_host_virt_addr":150000000000640,"size":4096,"offset":134217728}]"#;
    assert!(
        handover::decode(text).is_err(),
        "second address not aligned"
    );
    let text = String::from_utf8_lossy(text).replace("150000000000640", "149999999995904");
    let mappings = handover::decode(text.as_bytes()).unwrap();
    assert_eq!(mappings[1].offset, 134_217_728);
    assert_eq!(mappings[1].page_size, None);
}

#[test]
fn what_is_not_a_handover_is_refused() {
    let refused = |text: &str| {
        matches!(
            handover::decode(text.as_bytes()),
            Err(PagerError::BadHandover(_))
        )
    };
    let entry = |address: u64, size: u64, offset: u64, page: u64| {
        format!(
            r#"{{"base_host_virt_addr":{address},"size":{size},"offset":{offset},"page_size":{page}}}"#
        )
    };
    assert!(!refused(&format!("[{}]", entry(4096, 4096, 0, 4096))));
    assert!(refused("[]"));
    assert!(refused("{}"));
    assert!(refused(&format!("[{}]", entry(4096, 4096, 0, 2 << 20))));
    assert!(refused(&format!("[{}]", entry(4096, 0, 0, 4096))));
    assert!(refused(&format!("[{}]", entry(0, 4096, 0, 4096))));
    assert!(refused(&format!("[{}]", entry(1 << 60, 4096, 0, 4096))));
    assert!(refused(&format!(
        "[{}]",
        entry(4096, u64::MAX - 4095, 0, 4096)
    )));
    assert!(refused(&format!(
        "[{}]",
        entry(4096, 4096, u64::MAX - 4095, 4096)
    )));
    assert!(refused(&format!(
        "[{},{}]",
        entry(8192, 8192, 0, 4096),
        entry(12288, 4096, 0, 4096)
    )));
}

#[test]
fn silence_garbage_and_missing_descriptors_end_with_an_error() {
    let good = serde_json::to_vec(&[mapping(4096, 4096)]).unwrap();
    let receive = |bytes: &[u8], close: bool| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).unwrap();
        let kept = (!close).then_some(theirs);
        let result = handover::receive(&ours, Duration::from_millis(20));
        drop(kept);
        result.unwrap_err().to_string()
    };
    assert!(receive(b"", false).contains("in time"));
    assert!(receive(&good[..10], false).contains("in time"));
    assert!(receive(&good[..10], true).contains("closed"));
    assert!(receive(b"GET / HTTP/1.1", false).contains("not a list"));
    assert!(receive(&good, false).contains("no userfaultfd"));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let file = std::fs::File::open("/dev/zero").unwrap();
    handover::send(&theirs, &[mapping(4096, 4096)], file.as_fd(), None).unwrap();
    let error = handover::receive(&ours, SOON).unwrap_err().to_string();
    assert!(error.contains("not a userfaultfd"), "{error}");
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = handover::decode(&bytes);
    }

    #[test]
    fn any_numbers_are_checked(
        entries in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 1..4),
    ) {
        let mappings: Vec<_> = entries
            .iter()
            .map(|&(address, size, offset)| GuestMapping::new(address, size, offset, None))
            .collect();
        if let Ok(accepted) = handover::decode(&serde_json::to_vec(&mappings).unwrap()) {
            for map in accepted {
                prop_assert!(map.base_host_virt_addr.checked_add(map.size).is_some());
                prop_assert!(map.offset.checked_add(map.size).is_some());
            }
        }
    }
}
