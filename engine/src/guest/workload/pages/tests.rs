//! Tests of the page contents: every wrong byte is found.

use super::*;

fn contents_of(profile: Profile, seed: u64) -> Contents {
    Contents::new(profile, profile.spec().contents, seed)
}

#[test]
fn advancing_is_the_same_as_producing() {
    for profile in Profile::ALL {
        let contents = contents_of(profile, 42);
        for page in 0..40 {
            let mut generation = contents.first_generation(page);
            let mut data = [0; PAGE];
            contents.produce(page, generation, &mut data);
            for _ in 0..40 {
                contents.compare(page, generation, &data).unwrap();
                let before = data;
                let (next, changed) = contents.advance(page, generation, &mut data);
                assert_eq!(next, generation + 1);
                generation = next;
                for offset in HEADER..PAGE {
                    assert!(changed.contains(&offset) || before[offset] == data[offset]);
                }
            }
        }
    }
}

#[test]
fn generations_wrap_past_zero() {
    let contents = contents_of(Profile::Db, 1);
    let mut data = [0; PAGE];
    contents.produce(5, u32::MAX, &mut data);
    let (next, _) = contents.advance(5, u32::MAX, &mut data);
    assert_eq!(next, 1);
    contents.compare(5, 1, &data).unwrap();
}

#[test]
fn every_wrong_byte_is_found() {
    let contents = contents_of(Profile::Web, 9);
    let mut data = [0; PAGE];
    for page in 0..20 {
        contents.produce(page, 3, &mut data);
        for offset in (0..PAGE).step_by(97).chain(0..40) {
            data[offset] ^= 0x10;
            let error = contents.check(page, 3, &data).unwrap_err();
            assert_eq!((error.page, error.generation), (page, 3));
            data[offset] ^= 0x10;
        }
        contents.check(page, 3, &data).unwrap();
    }
}

#[test]
fn a_stale_or_misplaced_page_is_found() {
    let contents = contents_of(Profile::Db, 9);
    let mut data = [0; PAGE];
    for page in 0..50 {
        contents.produce(page, 6, &mut data);
        let tag = contents.header(page, 7).0;
        // Shared contents may be equal by design; then no byte is wrong.
        if contents.header(page, 6) != contents.header(page, 7) {
            let error = contents.check(page, 7, &data).unwrap_err();
            assert!(matches!(error.found, Found::Other { .. }), "{error}");
        }
        if tag & SHARED == 0 {
            assert!(contents.check(page + 1, 6, &data).is_err());
        }
        let zero = [0; PAGE];
        let error = contents.check(page, 7, &zero).unwrap_err();
        assert_eq!(error.found, Found::Empty);
        assert!(contents.check(page, 0, &data).is_err());
    }
}

#[test]
fn another_guests_pages_are_wrong() {
    let (one, two) = (contents_of(Profile::Scan, 1), contents_of(Profile::Scan, 2));
    let mut data = [0; PAGE];
    let found = (0..100).filter(|page| {
        one.produce(*page, 4, &mut data);
        two.check(*page, 4, &data).is_err()
    });
    assert_eq!(found.count(), 100);
}

#[test]
fn classes_have_their_shares_and_duplicates_are_equal() {
    let contents = contents_of(Profile::Web, 77);
    let shares = Profile::Web.spec().contents;
    let (mut zero, mut text, mut duplicate) = (0, 0, 0);
    let mut bodies = std::collections::HashSet::new();
    let mut data = [0; PAGE];
    for page in 0..20_000 {
        match contents.class(page) {
            Class::Zero => zero += 1,
            Class::Text => text += 1,
            Class::Duplicate => {
                duplicate += 1;
                contents.produce(page, 1, &mut data);
                bodies.insert(data.to_vec());
            }
            Class::Random => {}
        }
    }
    for (count, share) in [
        (zero, shares.zero),
        (text, shares.text),
        (duplicate, shares.duplicate),
    ] {
        assert!((i64::from(count) - i64::from(share) * 200).abs() < 300);
    }
    assert_eq!(bodies.len(), DUPLICATE_POOL as usize);
}
