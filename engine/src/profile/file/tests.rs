//! What is saved is read again; what cannot be is refused by name.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::profile::spread::Spread;
use crate::profile::{Contents, Distinct, HotnessClass};

fn saved() -> Saved {
    let region = |name: &str, kind, block_size| RegionProfile {
        name: name.into(),
        kind,
        block_size,
        blocks: 1000,
        content_pages: 900,
        contents: Contents {
            sampled: 500,
            zero: 0.25,
            duplicate: 0.125,
            bytes_per_page: 1500.5,
        },
        classes: vec![
            HotnessClass {
                level: 255,
                pages: 100.0,
                writes: 3.5,
                accesses: 7.0,
            },
            HotnessClass {
                level: 0,
                pages: 800.0,
                writes: 0.0,
                accesses: 0.001,
            },
        ],
        distinct: vec![
            Distinct {
                seconds: 0.5,
                written: 90.0,
                accessed: Some(95.0),
            },
            Distinct {
                seconds: 5.0,
                written: 120.0,
                accessed: None,
            },
        ],
        spread: Spread {
            near: 12.5,
            walk: 0.25,
        },
        heat: vec![(0, 100, 255), (500, 1, 3)],
    };
    Saved {
        profile: Profile {
            profile_version: PROFILE_VERSION,
            guest: "a guest".into(),
            guest_kind: "qemu".into(),
            taken_unix: 1_700_000_000.0,
            seconds: 20.5,
            parallelism: 2,
            work_per_second: Some(1000.0),
            watching_cost: Some(0.005),
            reads_seen: true,
            regions: vec![
                region("ram", RegionKind::Memory, 4096),
                region("disk0", RegionKind::Disk, 65_536),
            ],
            notes: vec!["40 scans took 0.05 % of the time".into()],
        },
        disk_rates: vec![DiskRates {
            region: 1,
            reads: 10.0,
            writes: 2.5,
            read_bytes: Some(40_960.0),
            written_bytes: None,
        }],
    }
}

/// The form that other versions of this program, and others' programs, read.
#[test]
fn the_json_is_this() {
    let text = to_json(&saved()).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let region = |name: &str, kind: &str, block_size: u32| {
        json!({
            "name": name, "kind": kind, "block_size": block_size, "blocks": 1000, "content_pages": 900,
            "contents": {"sampled": 500, "zero": 0.25, "duplicate": 0.125, "bytes_per_page": 1500.5},
            "classes": [
                {"level": 255, "pages": 100.0, "writes": 3.5, "accesses": 7.0},
                {"level": 0, "pages": 800.0, "writes": 0.0, "accesses": 0.001},
            ],
            "distinct": [
                {"seconds": 0.5, "written": 90.0, "accessed": 95.0},
                {"seconds": 5.0, "written": 120.0, "accessed": null},
            ],
            "spread": {"near": 12.5, "walk": 0.25},
            "heat": [[0, 100, 255], [500, 1, 3]],
        })
    };
    let expected = json!({
        "profile_version": 1, "guest": "a guest", "guest_kind": "qemu", "taken_unix": 1_700_000_000.0,
        "seconds": 20.5, "parallelism": 2, "work_per_second": 1000.0, "watching_cost": 0.005,
        "reads_seen": true,
        "regions": [region("ram", "memory", 4096), region("disk0", "disk", 65_536)],
        "notes": ["40 scans took 0.05 % of the time"],
        "disk_rates": [
            {"region": 1, "reads": 10.0, "writes": 2.5, "read_bytes": 40_960.0, "written_bytes": null},
        ],
    });
    assert_eq!(value, expected);
    assert_eq!(parse(&text, "it").unwrap(), saved());
}

/// The saved profile's JSON with one value replaced.
fn with(pointer: &str, value: Value) -> String {
    let mut json = serde_json::to_value(saved()).unwrap();
    *json.pointer_mut(pointer).expect("a field") = value;
    json.to_string()
}

#[test]
fn another_version_is_refused_as_such() {
    let error = parse(&with("/profile_version", json!(2)), "old.json").unwrap_err();
    assert!(matches!(error, ProfileError::Version { version: 2, .. }));
    let text = error.to_string();
    assert!(
        text.contains("old.json") && text.contains("version 2"),
        "{text}"
    );
    // Even if nothing else in it is known here.
    let error = parse(r#"{"profile_version": 7, "x": []}"#, "x").unwrap_err();
    assert!(matches!(error, ProfileError::Version { version: 7, .. }));
    for text in [
        "",
        "{}",
        "[]",
        "null",
        r#"{"profile_version": 1}"#,
        "\u{1f}",
    ] {
        let error = parse(text, "x").unwrap_err();
        assert!(
            matches!(error, ProfileError::Format { .. }),
            "{text}: {error}"
        );
    }
}

#[test]
fn hostile_values_are_refused() {
    let hostile = [
        ("/seconds", json!(-1.0)),
        ("/taken_unix", json!(1e300)),
        ("/parallelism", json!(0)),
        ("/work_per_second", json!(-5)),
        ("/watching_cost", json!(1.5)),
        ("/guest", json!("a\u{1b}[2Jb")),
        ("/notes/0", json!("x".repeat(5000))),
        ("/notes", json!(vec!["x"; 1000])),
        ("/regions/0/name", json!("a\nb")),
        ("/regions/0/block_size", json!(4095)),
        ("/regions/0/block_size", json!(0)),
        ("/regions/0/blocks", json!(0)),
        ("/regions/0/content_pages", json!(1001)),
        ("/regions/0/contents/zero", json!(1.01)),
        ("/regions/0/contents/duplicate", json!(0.9)),
        ("/regions/0/contents/bytes_per_page", json!(1e9)),
        ("/regions/0/contents/sampled", json!(100_000)),
        ("/regions/0/classes/0/pages", json!(-1)),
        ("/regions/0/classes/0/pages", json!(500)),
        ("/regions/0/classes/0/writes", json!(1e9)),
        ("/regions/0/classes/0/accesses", json!(-0.5)),
        ("/regions/0/classes/0/level", json!(0)),
        ("/regions/0/distinct/1/seconds", json!(0.5)),
        ("/regions/0/distinct/0/written", json!(1e6)),
        ("/regions/0/distinct/0/accessed", json!(-1)),
        ("/regions/0/spread/walk", json!(2)),
        ("/regions/0/heat/0", json!([0, 0, 1])),
        ("/regions/0/heat/0", json!([400, 200, 1])),
        ("/regions/0/heat/1", json!([999, 2, 1])),
        (
            "/regions/0/heat/1",
            json!([4_294_967_295_u32, 4_294_967_295_u32, 1]),
        ),
        ("/disk_rates/0/region", json!(0)),
        ("/disk_rates/0/region", json!(9)),
        ("/disk_rates/0/reads", json!(-1)),
    ];
    for (pointer, value) in hostile {
        let error = parse(&with(pointer, value.clone()), "x").unwrap_err();
        assert!(
            matches!(error, ProfileError::Value { .. }),
            "{pointer} {value}: {error}"
        );
    }
    // Not even numbers, or not of the type.
    for (pointer, value) in [
        ("/seconds", json!(null)),
        ("/seconds", json!("NaN")),
        ("/regions/0/blocks", json!(-1)),
        ("/regions/0/classes/0/level", json!(256)),
        ("/regions/0/heat/0", json!([0, 1])),
    ] {
        let error = parse(&with(pointer, value.clone()), "x").unwrap_err();
        assert!(
            matches!(error, ProfileError::Format { .. }),
            "{pointer} {value}: {error}"
        );
    }
    let text = serde_json::to_string(&saved()).unwrap();
    for number in ["NaN", "1e999", "-Infinity"] {
        assert!(
            parse(&text.replace("20.5", number), "x").is_err(),
            "{number}"
        );
    }
}

#[test]
fn what_would_not_be_read_is_not_written() {
    let mut bad = saved();
    bad.profile.seconds = f64::NAN;
    assert!(to_json(&bad).is_err());
    bad.profile.seconds = f64::INFINITY;
    assert!(to_json(&bad).is_err());
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("none.json");
    let error = load(&missing).unwrap_err();
    assert!(error.to_string().contains("none.json"), "{error}");
    let path = directory.path().join("p.json");
    std::fs::write(&path, to_json(&saved()).unwrap()).unwrap();
    assert_eq!(load(&path).unwrap(), saved());
    let file = File::options().write(true).open(&path).unwrap();
    // Sparse.
    file.set_len(MAX_BYTES + 1).unwrap();
    assert!(load(&path).is_err());
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,300}") {
        let _ = parse(&text, "x");
    }

    #[test]
    fn any_numbers_are_read_or_refused(
        seconds: f64, pages: f64, writes: f64, near: f64, first: u32, count: u32, level: u8,
    ) {
        let mut saved = saved();
        saved.profile.seconds = seconds;
        let region = &mut saved.profile.regions[0];
        region.classes[0].pages = pages;
        region.classes[0].writes = writes;
        region.spread.near = near;
        region.heat.push((first, count, level));
        if let Ok(text) = to_json(&saved) {
            prop_assert!(parse(&text, "x").is_ok());
        }
    }
}
