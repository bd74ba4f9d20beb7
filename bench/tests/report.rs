//! The report of a small, partly made-up file of results, `report/example.jsonl`, against the text that it must
//! give. To accept a change: run with `UPDATE_GOLDEN=1` and read the difference.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use hybridmig_bench::record::Record;
use hybridmig_bench::report;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/report")
}

/// All files of the report by name.
fn write_report() -> BTreeMap<String, String> {
    let records = Record::read_all(&directory().join("example.jsonl")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let written = report::write(&records, out.path(), "bench run example").unwrap();
    let files: BTreeMap<_, _> = fs::read_dir(out.path())
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read_to_string(entry.path()).unwrap())
        })
        .collect();
    assert_eq!(files.len(), written);
    files
}

#[test]
fn tables_are_as_they_were() {
    let golden = directory().join("results.md.golden");
    let text = write_report().remove("results.md").unwrap();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&golden, &text).unwrap();
    }
    let expected = fs::read_to_string(&golden).unwrap();
    for (number, (line, wanted)) in text.lines().zip(expected.lines()).enumerate() {
        assert_eq!(line, wanted, "line {}", number + 1);
    }
    assert_eq!(text, expected);
}

#[test]
fn the_same_results_give_the_same_files() {
    assert_eq!(write_report(), write_report());
}

#[test]
fn no_result_is_left_out() {
    let records = Record::read_all(&directory().join("example.jsonl")).unwrap();
    let files = write_report();
    let text = &files["results.md"];
    for record in &records {
        assert!(
            text.contains(&format!("| {} ", record.engine)),
            "{}",
            record.engine
        );
        assert!(text.contains(&record.link), "{}", record.link);
    }
    // What failed, what was given up, what was spoilt.
    for word in [
        "**failed**: the guest died",
        "not finished",
        "†",
        "(1 of 2)",
    ] {
        assert!(text.contains(word), "'{word}' is not in the report");
    }
    for (name, plot) in files.iter().filter(|(name, _)| *name != "results.md") {
        assert!(plot.starts_with("<svg"), "{name}");
        assert!(
            text.contains(&format!("({name})")),
            "{name} is shown nowhere"
        );
    }
    for kind in [
        "speed-",
        "downtime-by-rtt-",
        "downtime-by-loss-",
        "fault-latency-",
        "bytes-by-phase-",
    ] {
        assert!(
            files.keys().any(|name| name.starts_with(kind)),
            "no {kind}…"
        );
    }
    let speed = files
        .iter()
        .find(|(name, _)| name.starts_with("speed-") && name.contains("twice"));
    assert!(speed.unwrap().1.contains("NOT FINISHED"));
}

#[test]
fn another_schema_is_refused() {
    let line = fs::read_to_string(directory().join("example.jsonl")).unwrap();
    let line = line
        .lines()
        .next()
        .unwrap()
        .replace("\"schema\":1", "\"schema\":999");
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), line).unwrap();
    let error = format!("{:#}", Record::read_all(file.path()).unwrap_err());
    assert!(error.contains("schema 999"), "{error}");
}
