//! Keys on disk, fingerprints as people write them, files of known peers.

use std::os::unix::fs::PermissionsExt as _;

use hybridmig_transport::{Fingerprint, Identity, IdentityError, Trust};
use proptest::prelude::*;

#[test]
fn a_created_identity_is_private_and_loads_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new").join("key.pem");
    let created = Identity::create(&path).unwrap();
    let mode = |path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(path.as_path()), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    let loaded = Identity::load(&path).unwrap();
    assert_eq!(loaded.fingerprint(), created.fingerprint());
    let again = Identity::create(&path).unwrap_err();
    assert!(matches!(again, IdentityError::Exists(_)), "{again}");
    assert_eq!(
        Identity::load(&path).unwrap().fingerprint(),
        created.fingerprint()
    );
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key.pem");
    Identity::create(&path).unwrap();
    for mode in [0o640, 0o604, 0o660] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let error = Identity::load(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn what_is_not_an_identity_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let one = std::fs::read_to_string({
        let path = dir.path().join("one.pem");
        Identity::create(&path).unwrap();
        path
    })
    .unwrap();
    let other = rcgen::generate_simple_self_signed(vec!["x".to_owned()]).unwrap();
    let (key, certificate) = one.split_at(one.find("-----BEGIN CERTIFICATE").unwrap());
    let missing = Identity::load(&dir.path().join("none.pem")).unwrap_err();
    assert!(matches!(missing, IdentityError::Io { .. }), "{missing}");
    for (name, text, words) in [
        ("empty.pem", "", "no usable private key"),
        ("certificate.pem", certificate, "no usable private key"),
        ("key.pem", key, "no certificate"),
        (
            "mixed.pem",
            &format!("{key}{}", other.cert.pem()),
            "do not belong together",
        ),
    ] {
        let error = Identity::load(&write(name, text)).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(name), "{error}");
    }
}

#[test]
fn fingerprints_are_read_as_people_write_them() {
    let fingerprint = Identity::generate().unwrap().fingerprint();
    let text = fingerprint.to_string();
    assert_eq!(text.len(), 71);
    let digits = text.strip_prefix("sha256:").unwrap();
    let colons: Vec<&str> = (0..32).map(|i| &digits[2 * i..2 * i + 2]).collect();
    for form in [
        text.clone(),
        digits.to_owned(),
        text.to_uppercase(),
        colons.join(":"),
        format!(" SHA256:{}\n", colons.join(":").to_uppercase()),
    ] {
        assert_eq!(form.parse(), Ok(fingerprint), "{form}");
    }
    let longer = format!("{text}0");
    for wrong in [
        "",
        "sha256:",
        &digits[1..],
        &longer,
        "sha1:00",
        &"é".repeat(32),
    ] {
        assert!(wrong.parse::<Fingerprint>().is_err(), "{wrong}");
    }
}

#[test]
fn known_peers_name_the_line_that_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peers");
    let fingerprint = Identity::generate().unwrap().fingerprint();
    let mut trust = Trust::new();
    std::fs::write(
        &path,
        format!("# hosts\n\n{fingerprint}  rack 7  # the left one\n"),
    )
    .unwrap();
    trust.add_known_peers(&path).unwrap();
    assert!(!trust.is_empty());
    std::fs::write(&path, format!("{fingerprint}\n# fine\nnonsense here\n")).unwrap();
    let error = trust.add_known_peers(&path).unwrap_err().to_string();
    assert!(
        error.contains("line 3") && error.contains("peers"),
        "{error}"
    );
    std::fs::write(&path, [0xff, 0xfe, 0]).unwrap();
    assert!(trust.add_known_peers(&path).is_err());
    let authority = trust.add_authorities(&path).unwrap_err().to_string();
    assert!(authority.contains("no certificate"), "{authority}");
}

#[test]
fn nobody_is_trusted_by_default() {
    let rejection = Trust::new().judge(&[]).unwrap_err();
    assert_eq!(rejection.fingerprint(), None);
    let rejection = Trust::new().judge(&[vec![1, 2, 3].into()]).unwrap_err();
    assert!(rejection.to_string().contains("--peer"), "{rejection}");
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC*", hex in "[sha256:0-9a-fA-F]{60,75}") {
        let _result = text.parse::<Fingerprint>();
        if let Ok(fingerprint) = hex.parse::<Fingerprint>() {
            prop_assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        }
        let _result = Trust::new().add_known_peers_text(&text);
        let _result = Trust::new().add_known_peers_text(&hex);
    }

    #[test]
    fn arbitrary_certificates_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Trust::new().judge(&[bytes.into()]).is_err());
    }
}
