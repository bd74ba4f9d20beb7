//! A profile for people: tables, and a picture of where the heat lies.

use std::fmt::Write;
use std::time::Duration;

use hybridmig_engine::profile::file::{DiskRates, Saved};
use hybridmig_engine::profile::map::{MAX_CELLS, cells};
use hybridmig_engine::profile::spread::{Spread, WINDOW};
use hybridmig_engine::profile::{HotnessClass, RegionProfile};
use hybridmig_transport::message::RegionKind;

use crate::units::{show_bytes, show_time};

/// Cells of one line of the picture.
const COLUMNS: usize = 96;
/// From the coldest to the hottest. A cell that is not all cold never looks like one that is.
const SHADES: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Classes are shown together from these accesses per second of a page on.
const RATES: [(f64, &str); 6] = [
    (10.0, "10 and more"),
    (1.0, "1 to 10"),
    (0.1, "0.1 to 1"),
    (0.01, "0.01 to 0.1"),
    (0.001, "0.001 to 0.01"),
    (0.0, "less"),
];

/// All of it.
pub fn profile(saved: &Saved) -> String {
    let profile = &saved.profile;
    let mut text = format!(
        "{} ({}), watched for {}\n",
        profile.guest,
        profile.guest_kind,
        time(profile.seconds)
    );
    if let Some(speed) = profile.work_per_second {
        let _ = write!(text, "  speed {speed:.0} operations/s");
        if let Some(cost) = profile.watching_cost {
            let _ = write!(text, "; watching cost {:.1} % of it", 100.0 * cost);
        }
        text.push('\n');
    }
    let accesses = if profile.reads_seen {
        "sampled, reads included"
    } else {
        "assumed from the writes"
    };
    let _ = writeln!(
        text,
        "  {} threads or vCPUs; accesses are {accesses}",
        profile.parallelism
    );
    for note in &profile.notes {
        let _ = writeln!(text, "  note: {note}");
    }
    for (index, region) in profile.regions.iter().enumerate() {
        let disk = saved
            .disk_rates
            .iter()
            .find(|disk| usize::from(disk.region) == index);
        text.push('\n');
        text.push_str(&of_region(region, disk));
    }
    text
}

fn of_region(region: &RegionProfile, disk: Option<&DiskRates>) -> String {
    let kind = match region.kind {
        RegionKind::Memory => "memory",
        RegionKind::Disk => "disk",
    };
    let bytes = u64::from(region.blocks) * u64::from(region.block_size);
    let contents = &region.contents;
    let mut text = format!(
        "{}: {kind} of {}, {} with content\n  contents: {:.1} % zero, {:.1} % duplicate, \
         the rest {:.0} bytes per page on the wire ({} blocks looked at)\n",
        region.name,
        show_bytes(bytes),
        pages(region.content_pages as f64),
        100.0 * contents.zero,
        100.0 * contents.duplicate,
        contents.bytes_per_page,
        contents.sampled
    );
    if let Some(disk) = disk {
        let _ = writeln!(text, "  {}", of_disk(disk));
    }
    // Too little was written at once to tell.
    let told = region.spread != Spread::default();
    if told {
        let _ = writeln!(
            text,
            "  of the {} blocks around one that is written {:.1} are written too; walks {:.0} %",
            WINDOW.0 + WINDOW.1,
            region.spread.near,
            100.0 * region.spread.walk
        );
    }
    if !region.distinct.is_empty() {
        let _ = writeln!(
            text,
            "  {:<18}{:>16}{:>16}",
            "distinct within", "written", "accessed"
        );
        for point in &region.distinct {
            let accessed = point.accessed.map_or("–".to_owned(), pages);
            let _ = writeln!(
                text,
                "  {:<18}{:>16}{accessed:>16}",
                time(point.seconds),
                pages(point.written)
            );
        }
    }
    text.push_str(&of_classes(&region.classes));
    text.push_str(&heat_map(region));
    text
}

fn of_disk(disk: &DiskRates) -> String {
    let bytes = |bytes: Option<f64>| {
        bytes.map_or(String::new(), |bytes| {
            format!(" ({}/s)", show_bytes(bytes as u64))
        })
    };
    format!(
        "{:.1} reads/s{}, {:.1} writes/s{}",
        disk.reads,
        bytes(disk.read_bytes),
        disk.writes,
        bytes(disk.written_bytes)
    )
}

/// Pages by how often each is accessed.
fn of_classes(classes: &[HotnessClass]) -> String {
    let mut text = format!(
        "  {:<18}{:>16}{:>9}{:>16}\n",
        "accesses/s of one", "pages", "share", "writes/s of all"
    );
    let all: f64 = classes.iter().map(|class| class.pages).sum();
    let mut above = f64::INFINITY;
    for (least, name) in RATES {
        let own = || {
            let within = |class: &&HotnessClass| class.accesses >= least && class.accesses < above;
            classes.iter().filter(within)
        };
        let count: f64 = own().map(|class| class.pages).sum();
        let writes: f64 = own().map(|class| class.pages * class.writes).sum();
        if count > 0.0 {
            let _ = writeln!(
                text,
                "  {name:<18}{:>16}{:>7.1} %{writes:>16.1}",
                pages(count),
                100.0 * count / all
            );
        }
        above = least;
    }
    text
}

/// One line of block characters for each slice of the region; empty where all is cold.
fn heat_map(region: &RegionProfile) -> String {
    if region.heat.is_empty() {
        return "  nothing was written or used lately\n".to_owned();
    }
    let lines = (region.blocks as usize).min(MAX_CELLS) / COLUMNS;
    let wanted = lines.max(1) * COLUMNS;
    let cells = cells(&region.heat, region.blocks, wanted);
    let per_cell = f64::from(region.blocks) / cells.len() as f64 * f64::from(region.block_size);
    let mut text = String::new();
    for (line, cells) in cells.chunks(COLUMNS).enumerate() {
        let at = show_bytes(((line * COLUMNS) as f64 * per_cell) as u64);
        let shades: String = cells.iter().map(|heat| shade(*heat)).collect();
        let _ = writeln!(text, "  {at:>10} │{shades}│");
    }
    text
}

fn shade(level: f64) -> char {
    let most = (SHADES.len() - 1) as f64;
    SHADES[(level / 255.0 * most).ceil().clamp(0.0, most) as usize]
}

fn pages(pages: f64) -> String {
    show_bytes((pages * 4096.0) as u64)
}

fn time(seconds: f64) -> String {
    show_time(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use hybridmig_engine::profile::Contents;

    use super::*;

    #[test]
    fn the_picture_shows_where_the_heat_is() {
        let region = RegionProfile {
            name: "ram".into(),
            kind: RegionKind::Memory,
            block_size: 4096,
            blocks: 9600,
            content_pages: 9600,
            contents: Contents::default(),
            classes: Vec::new(),
            distinct: Vec::new(),
            spread: Spread::default(),
            // The first tenth as hot as can be, one block in the last.
            heat: vec![(0, 960, 255), (9599, 1, 1)],
        };
        let map = heat_map(&region);
        let lines: Vec<&str> = map.lines().collect();
        assert_eq!(lines.len(), 10);
        assert!(lines[0].contains(&"█".repeat(96)), "{map}");
        assert!(
            lines[1..9]
                .iter()
                .all(|line| line.contains(&" ".repeat(96))),
            "{map}"
        );
        assert!(lines[9].ends_with("▁│"), "{map}");
        assert!(lines[9].trim_start().starts_with("33.8 MiB"), "{map}");
        assert!(map.lines().all(|line| line.chars().count() <= 120));
    }

    #[test]
    fn shades_go_from_cold_to_hot() {
        assert_eq!((shade(0.0), shade(0.1), shade(255.0)), (' ', '▁', '█'));
    }
}
