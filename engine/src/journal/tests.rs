//! Journals on a real file system: torn, damaged, locked, missing.

use super::*;

const SESSION: SessionId = SessionId([1, 2, 3, 4, 5, 6, 7, 8]);

fn context() -> Context {
    Context {
        session: SESSION,
        guest: "web \"1\"".into(),
        peer: "203.0.113.7:4433".into(),
        software: "test".into(),
    }
}

fn offered() -> SourceRecord {
    SourceRecord::HandoverOffered { session: SESSION }
}

fn declined() -> SourceRecord {
    SourceRecord::Declined {
        reason: "no\nmemory".into(),
    }
}

#[test]
fn says_what_was_appended() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = dir.path().join("a/b");
    let mut journal = Journal::create(&state, &context()).expect("create");
    journal.append(&offered()).expect("append");
    journal.append(&declined()).expect("append");
    let recorded = Journal::<SourceRecord>::read(journal.path()).expect("read");
    assert_eq!(recorded.context, Some(context()));
    assert_eq!(recorded.last(), Some(&declined()));
    assert_eq!(recorded.records.len(), 2);
    assert!(!recorded.torn);
    let listed = list(&state).expect("list");
    assert_eq!(
        listed,
        [(SESSION, Side::Source, journal.path().to_path_buf())]
    );
    assert!(list(&dir.path().join("none")).expect("list").is_empty());
}

#[test]
fn a_second_start_and_a_second_writer_are_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let journal = Journal::<SourceRecord>::create(dir.path(), &context()).expect("create");
    assert!(matches!(
        Journal::<SourceRecord>::create(dir.path(), &context()),
        Err(JournalError::Exists { .. })
    ));
    let path = journal.path().to_path_buf();
    assert!(matches!(
        Journal::<SourceRecord>::open(&path),
        Err(JournalError::InUse { .. })
    ));
    // The other side's journal is another file.
    Journal::<DestinationRecord>::create(dir.path(), &context()).expect("create");
    drop(journal);
    let (mut journal, recorded) = Journal::open(&path).expect("open");
    assert!(recorded.records.is_empty());
    journal.append(&offered()).expect("append");
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    fs::write(&file, "").expect("write");
    let error = Journal::<SourceRecord>::create(&file, &context()).expect_err("a file");
    assert!(error.to_string().contains("file"), "{error}");
}

#[test]
fn a_torn_end_is_passed_over_wherever_it_was_torn() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut journal = Journal::create(dir.path(), &context()).expect("create");
    journal.append(&offered()).expect("append");
    let kept = fs::read(journal.path()).expect("read").len();
    journal.append(&declined()).expect("append");
    let path = journal.path().to_path_buf();
    drop(journal);
    let text = fs::read(&path).expect("read");
    for end in kept + 1..text.len() {
        fs::write(&path, &text[..end]).expect("write");
        let recorded = Journal::<SourceRecord>::read(&path).expect("read");
        assert!(recorded.torn, "torn at {end}");
        assert_eq!(recorded.last(), Some(&offered()));
    }
    // What is appended after a torn end does not stick to it.
    let (mut journal, recorded) = Journal::open(&path).expect("open");
    assert!(recorded.torn);
    journal.append(&SourceRecord::Accepted).expect("append");
    let recorded = Journal::<SourceRecord>::read(&path).expect("read");
    assert!(!recorded.torn);
    assert_eq!(recorded.last(), Some(&SourceRecord::Accepted));
}

#[test]
fn damage_before_the_end_is_an_error() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut journal = Journal::create(dir.path(), &context()).expect("create");
    journal.append(&offered()).expect("append");
    let path = journal.path().to_path_buf();
    let text = fs::read_to_string(&path).expect("read");
    let damaged = text.replacen("203.0", "204.0", 1);
    assert_ne!(text, damaged);
    fs::write(&path, damaged).expect("write");
    let error = Journal::<SourceRecord>::read(&path).expect_err("damaged");
    assert!(
        matches!(error, JournalError::Damaged { line: 1, .. }),
        "{error}"
    );
}

#[test]
fn the_destinations_word_decides() {
    let session = SESSION;
    let accepted = DestinationRecord::Accepted { session };
    let refused = DestinationRecord::Declined {
        session,
        reason: String::new(),
    };
    let offered = [offered()];
    assert_eq!(owner(Some(&[]), None), Owner::Source);
    assert_eq!(owner(Some(&offered), None), Owner::Undecided);
    assert_eq!(owner(None, None), Owner::Undecided);
    assert_eq!(owner(Some(&offered), Some(&[])), Owner::Source);
    let took = [accepted.clone()];
    assert_eq!(owner(Some(&offered), Some(&took)), Owner::Destination);
    // It accepted, could not start the guest, and took that back durably.
    let took_back = [accepted, refused];
    assert_eq!(owner(Some(&offered), Some(&took_back)), Owner::Source);
    let noted = [offered[0].clone(), SourceRecord::Accepted];
    assert_eq!(owner(Some(&noted), None), Owner::Destination);
    let noted = [offered[0].clone(), declined()];
    assert_eq!(owner(Some(&noted), None), Owner::Source);
}
