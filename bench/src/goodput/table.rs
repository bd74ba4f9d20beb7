//! Tables of transports side by side, the same for the same input.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{Figures, Run};

/// One table for each figure: links down, transports across; medians, with (least–most) where there are several runs.
pub fn markdown(runs: &[Run], made_by: &str) -> String {
    let mut text = format!(
        "# Transports over the emulated link\n\nMade by `{made_by}`. Goodput is what the \
         receiving application got, divided by the link's rate in IP packets: at most 0.958 over \
         QUIC and 0.965 over TCP. `tcp-bbr` has the kernel's own buffers, at most 4 MB to send; \
         `tcp-bbr-tuned` has 64 MB, as an operator of long links sets them. Figures are medians, \
         with (least–most) where there are several runs; † marks runs in which the emulator was \
         too late to be sure.\n"
    );
    let (shared, runs): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| run.rival.is_some());
    let (faulting, bulk): (Vec<&Run>, Vec<&Run>) = runs.into_iter().partition(|run| run.faults);
    let tables: [(&str, &[&Run], Pick, usize); 6] = [
        (
            "Goodput, second half of the transfer",
            &bulk,
            |f| Some(f.steady),
            3,
        ),
        ("Goodput, start included", &bulk, |f| Some(f.whole), 3),
        (
            "Start: round trips until 80 % of the rate",
            &bulk,
            |f| f.startup_rtts,
            1,
        ),
        (
            "Bytes on the wire for every byte received",
            &bulk,
            |f| Some(f.sent_per_received),
            3,
        ),
        (
            "Page fault beside a saturating bulk transfer, median in round trips",
            &faulting,
            |f| Some(f.latencies?.p50_rtts),
            2,
        ),
        (
            "The same, 99th percentile",
            &faulting,
            |f| Some(f.latencies?.p99_rtts),
            2,
        ),
    ];
    for (title, runs, pick, digits) in tables {
        if !runs.is_empty() {
            let _ = write!(text, "\n## {title}\n\n{}", table(runs, pick, digits));
        }
    }
    if !shared.is_empty() {
        text += "\n## Beside another transfer\n\nGoodput of both in the second half, divided by the link's rate.\n\n\
                 | link | transport | goodput | rival | began | its goodput |\n|---|---|---|---|---|---|\n";
    }
    for run in shared {
        let ours = run.figures.as_ref().map_or("failed".to_owned(), |figures| {
            format!("{:.3}", figures.steady)
        });
        let (rival, theirs) = match run.rival {
            Some((rival, theirs)) => (rival, format!("{theirs:.3}")),
            None => continue,
        };
        let began = if rival.first { "first" } else { "later" };
        let _ = writeln!(
            text,
            "| {} | {} | {ours} | {} | {began} | {theirs} |",
            run.link,
            run.transport,
            rival.transport.name(),
        );
    }
    text
}

type Pick = fn(&Figures) -> Option<f64>;

fn table(runs: &[&Run], pick: Pick, digits: usize) -> String {
    let mut links: Vec<&str> = Vec::new();
    let mut transports: Vec<&str> = Vec::new();
    let mut cells: BTreeMap<(&str, &str), Vec<&Run>> = BTreeMap::new();
    for run in runs {
        if !links.contains(&run.link.as_str()) {
            links.push(&run.link);
        }
        if !transports.contains(&run.transport.as_str()) {
            transports.push(&run.transport);
        }
        cells
            .entry((&run.link, &run.transport))
            .or_default()
            .push(run);
    }
    let mut text = format!("| link | {} |\n", transports.join(" | "));
    text += &format!("|---|{}\n", "---|".repeat(transports.len()));
    for link in links {
        text += &format!("| {link} |");
        for transport in &transports {
            let runs = cells.get(&(link, transport)).map_or(&[][..], Vec::as_slice);
            text += &format!(" {} |", cell(runs, pick, digits));
        }
        text.push('\n');
    }
    text
}

fn cell(runs: &[&Run], pick: Pick, digits: usize) -> String {
    let valid: Vec<&&Run> = runs.iter().filter(|run| run.invalid.is_none()).collect();
    let (used, mark) = if valid.is_empty() {
        (runs.iter().collect(), " †")
    } else {
        (valid, "")
    };
    let Some(first) = used.first() else {
        return "–".to_owned();
    };
    if let Some(why) = used.iter().find_map(|run| run.failed.as_ref()) {
        return format!("failed: {why}{mark}");
    }
    if first.figures.is_none() {
        return "failed".to_owned();
    }
    let figures = used.iter().filter_map(|run| run.figures.as_ref());
    let mut values: Vec<f64> = figures.filter_map(pick).collect();
    values.sort_by(f64::total_cmp);
    match values.as_slice() {
        [] => format!("never{mark}"),
        [one] => format!("{one:.digits$}{mark}"),
        many => {
            let middle = many[(many.len() - 1) / 2].midpoint(many[many.len() / 2]);
            let (least, most) = (many[0], many[many.len() - 1]);
            format!("{middle:.digits$} ({least:.digits$}–{most:.digits$}){mark}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::LinkFacts;

    fn run(transport: &str, steady: f64, invalid: bool) -> Run {
        Run {
            schema: super::super::SCHEMA,
            link: "delay 50ms rate 200mbit".to_owned(),
            facts: LinkFacts {
                rtt_ms: 100.0,
                loss_percent: 0.0,
                rate: Some(200_000_000),
            },
            transport: transport.to_owned(),
            faults: false,
            rival: None,
            repetition: 0,
            seed: 1,
            seconds: 10.0,
            invalid: invalid.then(|| "late".to_owned()),
            failed: None,
            figures: Some(Figures {
                whole: steady / 2.0,
                steady,
                startup_rtts: None,
                sent_per_received: 1.05,
                mean_packet: 1400.0,
                latencies: None,
            }),
        }
    }

    #[test]
    fn medians_spread_and_marks() {
        let runs = [
            run("hybridmig", 0.9, false),
            run("hybridmig", 0.95, false),
            run("hybridmig", 0.94, false),
            run("hybridmig", 0.1, true),
            run("tcp-bbr", 0.5, true),
            Run {
                failed: Some("it broke".to_owned()),
                figures: None,
                ..run("tcp-cubic", 0.0, false)
            },
        ];
        let text = markdown(&runs, "bench goodput");
        assert!(
            text.contains("| link | hybridmig | tcp-bbr | tcp-cubic |"),
            "{text}"
        );
        assert!(
            text.contains(
                "| delay 50ms rate 200mbit | 0.940 (0.900–0.950) | 0.500 † | failed: it broke |"
            ),
            "{text}"
        );
        assert!(
            text.contains("| never | never † | failed: it broke |"),
            "{text}"
        );
        assert!(!text.contains("Page fault"), "{text}");
    }
}
