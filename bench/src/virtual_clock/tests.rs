//! Small guests, simulated in every mode.

use hybridmig_engine::blocks::RegionId;
use hybridmig_engine::guest::workload::{ContentClass, Profile};
use hybridmig_engine::predict::Costs;
use hybridmig_engine::session::io::{Lane, Refer};
use hybridmig_netem::LinkSpec;
use hybridmig_transport::message::Mode;

use super::codec::{Codec, Kind};
use super::link::Direction;
use super::sweep::simulate;
use super::*;
use crate::grid::{Grid, Variant};

/// 16 MiB of a web server, with a disk.
fn setting(mode: Mode, link: &str) -> Setting {
    Setting {
        profile: Profile::Web,
        memory_mib: 16,
        disk_mib: 4,
        threads: 2,
        rate_factor: 1.0,
        seed: 7,
        link: link.parse().expect("a link"),
        mode,
        mem_frac: None,
        disk_frac: None,
        observe: false,
    }
}

fn run(setting: Setting) -> Came {
    let costs = Costs::assumed("workload");
    let came = World::new(setting, Steps::default(), costs).run();
    came.expect("it ends").expect("it converges")
}

const LINK: &str = "delay 40ms 500us rate 200mbit loss 0.1% limit 50ms";

#[test]
fn a_seed_decides_everything() {
    let once = || run(setting(Mode::Hybrid, LINK));
    let (one, two) = (once(), once());
    let text = |came: &Came| serde_json::to_string(came).expect("figures are JSON");
    assert_eq!(text(&one), text(&two));
    let other = run(Setting {
        seed: 8,
        ..setting(Mode::Hybrid, LINK)
    });
    assert_ne!(text(&one), text(&other));
}

#[test]
fn precopy_leaves_nothing_behind_and_has_no_faults() {
    let came = run(setting(Mode::Precopy, LINK));
    assert_eq!((came.behind, came.faults), (0, 0));
    assert!((came.lost_work - came.downtime).abs() < 1e-9);
    // Half a round trip, and what the steps take.
    assert!((0.04..0.15).contains(&came.downtime), "{}", came.downtime);
    // 16 MiB, of which two fifths compress, at 25 MB/s.
    assert!((0.4..2.0).contains(&came.total), "{}", came.total);
    assert!(came.sent > came.bytes);
}

#[test]
fn whoever_waits_loses_work_and_nobody_else() {
    let busy = run(setting(Mode::Postcopy, LINK));
    assert!(busy.faults > 5, "{}", busy.faults);
    // Two workers, each fault a round trip of one of them.
    let least = 0.08 * busy.faults as f64 / 4.0;
    assert!(busy.lost_work - busy.downtime > 0.5 * least);
    assert!(busy.t95.is_some_and(|t95| t95 > busy.downtime));
    let still = run(Setting {
        rate_factor: 1e-9,
        ..setting(Mode::Postcopy, LINK)
    });
    assert_eq!((still.faults, still.working_set), (0, 0));
    assert!(still.behind > 1000);
    assert!((still.lost_work - still.downtime).abs() < 1e-9);
}

#[test]
fn a_guest_finds_its_own_writes_on_every_link_and_at_every_share() {
    // Every access at the destination, and the end, compare versions.
    for (link, memory, disk) in [
        (LINK, 0.5, 0.3),
        ("bad-4g", 0.9, 0.0),
        ("continental", 0.0, 1.0),
    ] {
        for profile in Profile::ALL {
            let came = run(Setting {
                profile,
                memory_mib: 16,
                mem_frac: Some(memory),
                disk_frac: Some(disk),
                rate_factor: 0.2,
                ..setting(Mode::Hybrid, link)
            });
            assert!(came.lost_work >= came.downtime - 1e-9, "{profile} {link}");
        }
    }
}

/// L of a cell of the benchmark's grid, moved so.
fn lost_work(cell: &str, seed: u64, variant: Variant) -> f64 {
    let mut grid = Grid::find("default").expect("it is built in");
    grid.keep(cell);
    let cell = grid.cells().next().expect("the grid has this cell");
    let line = simulate(&cell, variant, seed).expect("it ends");
    line.came.expect("it converges").lost_work
}

/// The guest rewrites its memory faster than the link carries it. What its memory and its disks ask for share the
/// link: whoever takes that for more than it is expects too much of post-copy, and leaves half of it for then.
#[test]
fn a_guest_that_outruns_the_link_loses_no_more_than_by_postcopy() {
    let of = |variant| lost_work("bad-4g | scan", 1, variant);
    let (planned, postcopy) = (of(Variant::Planned), of(Variant::Postcopy));
    assert!(planned < postcopy, "{planned} and {postcopy} s");
}

/// A round that moves what was not used of the disks leaves as much of memory stale as it found: no reason to freeze.
#[test]
fn a_round_that_moves_the_disks_is_not_the_last() {
    let of = |variant| lost_work("continental | db", 3, variant);
    let (planned, precopy) = (of(Variant::Planned), of(Variant::Precopy));
    assert!(planned < 1.1 * precopy, "{planned} and {precopy} s");
}

/// When something of so many bytes has arrived, with a time for it alone.
fn arrival(link: &LinkSpec, bytes: f64, guarded: bool) -> f64 {
    let [mut there, _] = Direction::pair(link, 3);
    there.give(1, Lane::Freeze, bytes, guarded);
    let mut now = Duration::ZERO;
    while let Some(at) = there.next() {
        now = now.max(at);
        if let Some((arrived, id)) = there.step(now) {
            assert_eq!(id, 1);
            return arrived.as_secs_f64();
        }
    }
    panic!("it never arrives");
}

#[test]
fn a_batch_takes_the_links_time_and_a_loss_a_round_trip_unless_it_has_parity() {
    let clean: LinkSpec = "delay 50ms rate 80mbit".parse().expect("a link");
    // A megabyte at 10 MB/s, and headers.
    let took = arrival(&clean, 1e6, false);
    assert!((0.15..0.158).contains(&took), "{took}");
    let lossy: LinkSpec = "delay 50ms rate 80mbit loss 3%".parse().expect("a link");
    let (bare, guarded) = (arrival(&lossy, 1e6, false), arrival(&lossy, 1e6, true));
    assert!(bare > took + 0.08, "{bare}");
    assert!(guarded < took + 0.02, "{guarded}");
}

#[test]
fn urgent_pages_overtake_bulk() {
    let link: LinkSpec = "delay 50ms rate 80mbit".parse().expect("a link");
    let [mut there, _] = Direction::pair(&link, 3);
    there.give(1, Lane::Bulk, 1e6, false);
    for _ in 0..100 {
        let at = there.next().expect("it has more to send");
        assert_eq!(there.step(at), None);
    }
    let asked = there.next().expect("it has more to send");
    there.give(2, Lane::Urgent, 4096.0, true);
    let (at, id) = std::iter::from_fn(|| there.next().map(|at| there.step(at)))
        .flatten()
        .next()
        .expect("both arrive");
    assert_eq!(id, 2);
    let took = at.saturating_sub(asked).as_secs_f64();
    assert!((0.05..0.06).contains(&took), "{took}");
}

#[test]
fn what_is_known_to_be_there_is_named_or_goes_as_a_difference() {
    let mut codec = Codec::new(Profile::Web, 1, 1);
    let page = |number, version, kind| [((RegionId(0), number), version, kind)];
    let mut batch = |id, refer, block: &[_]| codec.batch(id, Lane::Bulk, refer, block);
    let random = Kind::Page(ContentClass::Random);
    let full = batch(0, Refer::Anything, &page(1, 1, random));
    assert!((4096.0..4250.0).contains(&full), "{full}");
    let text = batch(
        1,
        Refer::Anything,
        &page(2, 1, Kind::Page(ContentClass::Text)),
    );
    assert!((800.0..2000.0).contains(&text), "{text}");
    batch(2, Refer::Anything, &page(3, 1, Kind::Shared(5)));
    // Not acknowledged yet.
    assert!(batch(3, Refer::Anything, &page(1, 2, random)) >= full);
    codec.acknowledge(&[(2, 4)]);
    let mut batch = |id, refer, block: &[_]| codec.batch(id, Lane::Bulk, refer, block);
    let delta = batch(4, Refer::Itself, &page(1, 3, random));
    assert!((400.0..800.0).contains(&delta), "{delta}");
    let named = batch(5, Refer::Anything, &page(4, 1, Kind::Shared(5)));
    assert!(named < 100.0, "{named}");
    assert!(batch(6, Refer::Nothing, &page(5, 1, Kind::Shared(5))) > 4000.0);
}
