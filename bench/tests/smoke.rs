//! The bench itself: one small migration with hybridmig and one with QEMU's pre-copy over the emulated link
//! between two namespaces, by the real program, and whether what it writes down makes sense.

use std::process::Command;
use std::time::Duration;

use hybridmig_bench::record::{Outcome, Record};
use hybridmig_bench::{report, scenario};
use hybridmig_tests::keeper::Kept;

/// Two runs of some ten seconds; the first ever also unpacks QEMU.
const PATIENCE: Duration = Duration::from_secs(200);

#[test]
fn both_engines_move_a_guest_over_the_emulated_link() {
    let directory = tempfile::tempdir().unwrap();
    let results = directory.path().join("smoke.jsonl");
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args(["run", "smoke", "--out"]).arg(&results);
    let mut bench = Kept::start("bench", command).unwrap();
    assert!(bench.wait(PATIENCE).unwrap().success());

    let records = Record::read_all(&results).unwrap();
    let scenario = scenario::Scenario::find("smoke").unwrap();
    for engine in &scenario.engines {
        let last = records.iter().rfind(|record| record.engine == *engine);
        makes_sense(last.unwrap_or_else(|| panic!("{engine} has no result")));
    }
    let out = directory.path().join("report");
    assert!(report::write(&records, &out, "a test").unwrap() > 3);
    let text = std::fs::read_to_string(out.join("results.md")).unwrap();
    for engine in &scenario.engines {
        assert!(text.contains(engine), "{engine} is not in the report");
    }
}

fn makes_sense(record: &Record) {
    let name = &record.engine;
    println!(
        "{name}: {:?}, invalid: {:?}",
        record.outcome, record.invalid
    );
    assert_eq!(record.outcome, Outcome::Moved, "{name}");
    let checked = record.checked.unwrap();
    assert_eq!((checked.bad, checked.one_life), (0, true), "{name}");
    assert_eq!(checked.pages, record.guest.checked_mib * 256, "{name}");

    let measured = record.measured.as_ref().unwrap();
    // What it was told to do is what it did: (2 + 8) MB/s in pages.
    let told = record.told_speed;
    assert!(
        measured.v0 > 0.5 * told && measured.v0 < 1.2 * told,
        "{name}: v0 {}",
        measured.v0
    );
    let total = measured.total.unwrap();
    let (freeze, up) = (measured.freeze.unwrap(), measured.destination_up.unwrap());
    assert!(
        0.0 < freeze && freeze < up && up <= total && total < record.times.give_up_s,
        "{name}"
    );
    // Device state and ownership have to cross the link: 10 ms at the least.
    assert!(up - freeze > 0.01, "{name}: gone for {} s", up - freeze);
    assert!(
        measured.downtime > 0.0 && measured.downtime < total,
        "{name}"
    );
    assert!(measured.lost_work_from_freeze.unwrap() > 0.0, "{name}");
    assert!(measured.lost_work < total, "{name}");
    assert!(measured.speed.len() > 20, "{name}");

    let traffic = record.traffic.as_ref().unwrap();
    // Half of what the checker holds does not compress, and the link carries no more than it can.
    let least = record.guest.checked_mib * (1 << 20) / 2;
    assert!(
        traffic.forward.bytes > least,
        "{name}: {} bytes",
        traffic.forward.bytes
    );
    let most = record.link_facts.rate.unwrap() as f64 / 8.0 * (total + 1.0);
    assert!(
        (traffic.forward.delivered_bytes as f64) < most,
        "{name}: {traffic:?}"
    );
    assert!(traffic.back.packets > 0, "{name}");
    assert_eq!(
        traffic.forward.dropped_loss, 0,
        "{name}: this link loses nothing"
    );
    assert!(!record.claimed.is_null(), "{name}");
    assert!(record.machine.qemu.contains("version"), "{name}");
}
