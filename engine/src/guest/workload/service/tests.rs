//! Tests of what a guest makes of a state that may come from a stranger.

use std::sync::OnceLock;
use std::sync::mpsc::sync_channel;

use proptest::prelude::*;

use super::super::options::MIN_BYTES;
use super::*;

fn guest(incoming: bool) -> Service {
    let options = GuestOptions {
        incoming,
        threads: 3,
        rate_factor: 0.0,
        ..GuestOptions::new("unused", MIN_BYTES)
    };
    Service::create(&options, sync_channel(1).0).unwrap()
}

/// The state of a guest that has run.
fn saved() -> Vec<u8> {
    static SAVED: OnceLock<Vec<u8>> = OnceLock::new();
    let save = || {
        let guest = guest(false);
        guest.freeze(Duration::from_secs(60)).unwrap();
        guest.save().unwrap()
    };
    SAVED.get_or_init(save).clone()
}

#[test]
fn a_state_goes_round() {
    let state = saved();
    let guest = guest(true);
    guest.load(&state).unwrap();
    assert_eq!(guest.save().unwrap(), state);
    assert!(guest.load(&state).is_err());
}

#[test]
fn a_state_cut_short_is_refused() {
    let state = saved();
    let guest = guest(true);
    for len in 0..state.len() {
        assert!(guest.load(&state[..len]).is_err(), "{len}");
    }
    guest.load(&state).unwrap();
}

#[test]
fn an_ending_guest_takes_no_state() {
    let state = saved();
    let guest = guest(true);
    guest.end_if_abandoned();
    assert!(guest.load(&state).unwrap_err().contains("ending"));
    assert!(guest.hand_over(Purpose::Page).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(guest(true).load(&bytes).is_err());
    }

    /// A changed state is refused, or gives a guest whose memory does not verify; it never breaks
    /// the guest's process.
    #[test]
    fn a_changed_state_does_no_harm(at: prop::sample::Index, flip in 1..=255_u8) {
        let mut state = saved();
        let at = at.index(state.len());
        state[at] ^= flip;
        let guest = guest(true);
        if guest.load(&state).is_ok() {
            guest.go_on().unwrap();
            guest.freeze(Duration::from_secs(60)).unwrap();
            guest.save().unwrap();
            prop_assert!(guest.verify().is_err());
        }
    }
}
