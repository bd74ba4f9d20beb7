//! A scenario from beginning to end. Repetitions are the outer loop and engines the inner one, cell by cell, so
//! that whatever changes slowly on the machine meets all engines alike.

use std::path::Path;

use anyhow::Result;

use crate::congestion::Allowed;
use crate::engine::{self, Engine};
use crate::interrupt::Interrupt;
use crate::machine::{self, Machine};
use crate::record::{Outcome, Record};
use crate::run::{Order, not_set_up, run};
use crate::scenario::{Cell, Scenario};

/// Runs all of `scenario` whose cell's text contains `cell`, and appends every run to `out` at once.
pub fn run_all(scenario: &Scenario, cell: &str, out: &Path, interrupt: &Interrupt) -> Result<()> {
    let qemu = machine::qemu()?;
    let machine = Machine::look(&qemu)?;
    let engines = scenario
        .engines
        .iter()
        .map(|name| engine::by_name(name))
        .collect::<Result<Vec<_>>>()?;
    let controls: Vec<_> = engines
        .iter()
        .filter_map(|engine| engine.congestion())
        .collect();
    let _allowed = Allowed::extend(&controls)?;
    let cells: Vec<Cell> = scenario
        .cells()?
        .into_iter()
        .filter(|one| one.to_string().contains(cell))
        .collect();
    let total = cells.len() * engines.len() * scenario.repetitions as usize;
    let mut number = 0;
    for repetition in 0..scenario.repetitions {
        for cell in &cells {
            for engine in &engines {
                number += 1;
                let order = Order {
                    scenario: &scenario.name,
                    cell,
                    engine: engine.as_ref(),
                    repetition,
                    attempt: 0,
                    seed: scenario.seed + u64::from(repetition),
                    times: scenario.times,
                    qemu: &qemu,
                    machine: &machine,
                    interrupt,
                };
                eprint!("{number}/{total} {cell} | {} ", engine.name());
                until_valid(order, scenario.invalid_retries, number > 1, out)?;
            }
        }
    }
    Ok(())
}

/// Runs it again, a few times, if the emulator was late; all tries are kept.
fn until_valid(mut order: Order<'_>, retries: u32, has_begun: bool, out: &Path) -> Result<()> {
    loop {
        let record = match run(&order) {
            Ok(record) => record,
            // A series is not lost to one boot that took too long; one that cannot even begin is.
            Err(error) if has_begun && !order.interrupt.is_set() => not_set_up(&order, &error)?,
            Err(error) => return Err(error),
        };
        record.append(out)?;
        eprintln!("{}", summary(&record));
        if record.valid || order.attempt == retries {
            return Ok(());
        }
        order.attempt += 1;
        order.interrupt.check()?;
        eprint!("  again ");
    }
}

/// A run in a line.
fn summary(record: &Record) -> String {
    let mut text = match &record.outcome {
        Outcome::Moved => "moved".to_owned(),
        Outcome::NotFinished { why } => format!("NOT FINISHED ({why})"),
        Outcome::Failed { why } => {
            let first = why.lines().next().unwrap_or_default();
            format!("FAILED ({first})")
        }
    };
    if let Some(measured) = &record.measured {
        if let Some(total) = measured.total {
            text.push_str(&format!(", total {total:.2} s"));
        }
        text.push_str(&format!(
            ", downtime {:.3} s, lost work {:.2} s",
            measured.downtime, measured.lost_work
        ));
    }
    if let Some(traffic) = &record.traffic {
        text.push_str(&format!(", {:.1} MB", traffic.bytes() as f64 / 1e6));
    }
    if let Some(why) = &record.invalid {
        text.push_str(&format!(", INVALID: {why}"));
    }
    text
}

/// An engine in a line.
pub fn describe(engine: &dyn Engine) -> String {
    format!("{:34} {}", engine.name(), engine.about())
}
