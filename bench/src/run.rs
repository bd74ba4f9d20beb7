//! One run: two hosts, a guest, a migration, and what is to be seen of it from outside. It ends everything that
//! it has started, and treats whatever an engine does wrong as a result.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use hybridmig_tests::console::Who;
use hybridmig_tests::transcript::Transcript;
use hybridmig_tests::{Console, Vm, VmConfig, console, vm};
use serde_json::Value;

use crate::engine::{Engine, Migration, Progress, Stage};
use crate::interrupt::Interrupt;
use crate::link::{Link, LinkFacts, Side, Traffic};
use crate::machine::{self, Machine};
use crate::measure::{Measured, Sample, measure, one_life};
use crate::record::{Checked, Outcome, Record, SCHEMA};
use crate::scenario::{Cell, Times};
use crate::storage::{self, Images, Moments, PhaseLatency, Storage, Ticks, phases};

/// How often an engine is asked how far it is.
const POLL: Duration = Duration::from_millis(20);
/// How long a guest may take to boot; a busy machine emulates slowly.
const BOOT: Duration = Duration::from_secs(120);
/// How long the guest may take to verify all of its pages.
const VERIFY: Duration = Duration::from_secs(60);
/// Lines of a console that are kept where all is well, and elsewhere.
const CONSOLE: (usize, usize) = (3, 30);
/// The same for a guest that was not moved, which may still wait for its pages.
const VERIFY_ELSE: Duration = Duration::from_secs(10);
/// Ticks that a guest must have given before it counts as settled.
const SETTLED: usize = 5;

/// What is to be run.
pub struct Order<'a> {
    /// Name of the scenario.
    pub scenario: &'a str,
    /// Link and guest.
    pub cell: &'a Cell,
    /// Engine.
    pub engine: &'a dyn Engine,
    /// Counted from 0.
    pub repetition: u32,
    /// Counted from 0.
    pub attempt: u32,
    /// Seed of the link and of the guest.
    pub seed: u64,
    /// Times.
    pub times: Times,
    /// The QEMU to run.
    pub qemu: &'a Path,
    /// The machine.
    pub machine: &'a Machine,
    /// Whether to stop.
    pub interrupt: &'a Interrupt,
}

/// Runs it. An error means that there is no result: the machine cannot do it, or somebody wants it to end.
pub fn run(order: &Order<'_>) -> Result<Record> {
    let blank = blank(order)?;
    let link = Link::start(&order.cell.link, order.seed)?;
    if let Some(control) = order.engine.congestion() {
        link.set_congestion(control)?;
    }
    let guest = &order.cell.guest;
    let of_work = guest.work.as_ref().and_then(|work| work.disk_mib);
    let images = match (&guest.disk, of_work) {
        (Some(disk), _) => Some(Images::make(disk, order.seed)?),
        (None, Some(mib)) => Some(Images::file_system(mib)?),
        (None, None) => None,
    };
    let who = guest.who();
    let start = |side, config: &VmConfig| Vm::start_with(config, |qemu| link.place(side, qemu));
    let mut source = start(Side::Source, &config(order, images.as_ref(), Side::Source))?;
    let twin = config(order, images.as_ref(), Side::Destination).incoming("destination");
    let mut destination = start(Side::Destination, &twin)?;
    settle(order, &source)?;

    let mut stage = Stage {
        source: &mut source,
        destination: &mut destination,
        link: &link,
        give_up: order.times.give_up(),
    };
    let watched = watch(order, &mut stage)?;
    let tcp = link.tcp()?;
    let consoles = [source.console(), destination.console()];
    let life_so_far = life(consoles, who, watched.start);
    let from = life_so_far.partition_point(|sample| sample.at < -order.times.before_s);
    let end = (watched.end - watched.start).as_secs_f64();
    let moved = watched.outcome == Outcome::Moved;
    let measured = measure(&life_so_far[from..], end, moved);
    let mut outcome = watched.outcome;
    let checked = check(consoles, who, watched.start, &mut outcome);
    // It may serve pages to the very end.
    drop(watched.migration);
    let measured = match measured {
        Ok(measured) => Some(measured),
        Err(error) => {
            fail(&mut outcome, error.to_string());
            None
        }
    };
    let mut storage = images.as_ref().map(|_| {
        let (bad_blocks, errors) = storage::seen_wrong(consoles);
        let from = -order.times.before_s;
        Storage {
            bad_blocks,
            errors,
            compared: None,
            phases: latencies(consoles, watched.start, from, end, measured.as_ref()),
        }
    });
    let consoles = seam(
        consoles.map(Console::transcript),
        moved && outcome == Outcome::Moved,
    );
    // The whole run has to be sound, the guest's ticks after the end too.
    let invalid = link.traffic().invalid;
    if let (Some(images), Some(storage)) = (&images, &mut storage) {
        source.kill()?;
        destination.kill()?;
        if moved {
            storage.compared = Some(images.compare()?);
        }
        if let Some(trouble) = storage.trouble() {
            fail(&mut outcome, trouble);
        }
    }
    Ok(Record {
        started_unix: watched.started_unix,
        outcome,
        valid: invalid.is_none(),
        invalid,
        measured,
        checked,
        storage,
        traffic: Some(watched.traffic),
        tcp: Some(tcp),
        claimed: watched.claimed,
        consoles,
        ..blank
    })
}

/// The record of a run that could not even be set up: it says nothing of the engine.
pub fn not_set_up(order: &Order<'_>, error: &anyhow::Error) -> Result<Record> {
    let why = format!("the run could not be set up: {error:#}");
    Ok(Record {
        outcome: Outcome::Failed { why: why.clone() },
        invalid: Some(why),
        ..blank(order)?
    })
}

/// All that is known before a run.
fn blank(order: &Order<'_>) -> Result<Record> {
    let mut machine = order.machine.clone();
    machine.load = machine::load()?;
    let guest = &order.cell.guest;
    Ok(Record {
        schema: SCHEMA,
        scenario: order.scenario.to_owned(),
        link: order.cell.link.to_string(),
        link_facts: LinkFacts::of(&order.cell.link),
        guest: guest.clone(),
        dirty_mb_s: order.cell.dirty_mb_s,
        // What a program can do nobody tells it.
        told_speed: match guest.work {
            Some(_) => 0.0,
            None => (order.cell.dirty_mb_s + guest.sweep_mb_s) * 1e6 / vm::PAGE as f64,
        },
        engine: order.engine.name(),
        repetition: order.repetition,
        attempt: order.attempt,
        seed: order.seed,
        times: order.times,
        started_unix: unix_time()?,
        machine,
        outcome: Outcome::NotFinished {
            why: "not started".to_owned(),
        },
        valid: false,
        invalid: None,
        measured: None,
        checked: None,
        storage: None,
        traffic: None,
        tcp: None,
        claimed: Value::Null,
        consoles: [String::new(), String::new()],
    })
}

/// Seconds since 1970.
fn unix_time() -> Result<f64> {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(time.context("the clock is before 1970")?.as_secs_f64())
}

fn config(order: &Order<'_>, images: Option<&Images>, side: Side) -> VmConfig {
    let guest = &order.cell.guest;
    let of_disk = images.map_or_else(String::new, Images::kernel_arguments);
    let of_work = guest.work.as_ref().map_or_else(String::new, |work| {
        work.kernel_arguments(guest.tick_ms, order.seed)
    });
    VmConfig {
        name: "source".to_owned(),
        memory_mib: guest.memory_mib,
        cpus: 1,
        checked_mib: guest.checked_mib,
        dirty_rate: order.cell.dirty_mb_s,
        hot_percent: guest.hot_percent,
        kernel_arguments: format!(
            "memcheck.random={} memcheck.sweep={} memcheck.tick={} memcheck.seed={} {of_disk} {of_work}",
            guest.random_percent, guest.sweep_mb_s, guest.tick_ms, order.seed
        ),
        qemu_arguments: images.map_or_else(Vec::new, |images| images.qemu_arguments(side)),
        qemu: order.qemu.to_owned(),
        programs: guest.work.is_some(),
        ..VmConfig::default()
    }
}

/// Waits until the guest ticks.
fn settle(order: &Order<'_>, source: &Vm) -> Result<()> {
    let deadline = Instant::now() + BOOT;
    while source.console().ticks_of(order.cell.guest.who()).len() < SETTLED {
        order.interrupt.check()?;
        let died = source.console().died();
        ensure!(
            died.is_none() && Instant::now() < deadline,
            "the guest does not boot within {BOOT:?}, or died ({died:?}); its console ends with:\n{}",
            source.console().transcript().tail(20)
        );
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// What was seen of a migration.
struct Watched {
    migration: Option<Box<dyn Migration>>,
    start: Instant,
    started_unix: f64,
    end: Instant,
    outcome: Outcome,
    traffic: Traffic,
    claimed: Value,
}

fn watch(order: &Order<'_>, stage: &mut Stage<'_>) -> Result<Watched> {
    let pause = |seconds: f64| -> Result<()> {
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            order.interrupt.check()?;
            std::thread::sleep(left.min(POLL));
        }
        Ok(())
    };
    let mut failure = None;
    let mut migration = match order.engine.prepare(stage) {
        Ok(migration) => Some(migration),
        Err(error) => {
            failure = Some(format!("it cannot be set up: {error:#}"));
            None
        }
    };
    pause(order.times.before_s)?;
    stage.link.restart_timeline();
    let before = stage.link.traffic();
    let started_unix = unix_time()?;
    let start = Instant::now();
    if let Some(migration) = &mut migration
        && let Err(error) = migration.start(stage)
    {
        failure = Some(format!("it cannot be started: {error:#}"));
    }
    let outcome = loop {
        if let (None, Some(migration)) = (&failure, &mut migration) {
            match migration.poll(stage) {
                Ok(Progress::Running) => {}
                Ok(Progress::Moved) => break Outcome::Moved,
                Ok(Progress::GaveUp(why)) => break Outcome::NotFinished { why },
                Err(error) => failure = Some(format!("{error:#}")),
            }
        }
        for vm in [&*stage.source, &*stage.destination] {
            if let Some(last_words) = vm.console().died() {
                failure.get_or_insert(format!("the guest died: {last_words}"));
            }
        }
        if let Some(why) = failure {
            break Outcome::Failed { why };
        }
        if start.elapsed() >= stage.give_up {
            let why = format!("not within {} s", stage.give_up.as_secs_f64());
            break Outcome::NotFinished { why };
        }
        order.interrupt.check()?;
        std::thread::sleep(POLL);
    };
    let end = Instant::now();
    let traffic = stage.link.traffic().since(&before);
    let claimed = match &mut migration {
        Some(migration) => migration.claimed(stage),
        None => Value::Null,
    };
    pause(order.times.after_s)?;
    Ok(Watched {
        migration,
        start,
        started_unix,
        end,
        outcome,
        traffic,
        claimed,
    })
}

/// Seconds from `start` to `at`, negative if it was before.
fn seconds_since(start: Instant, at: Instant) -> f64 {
    match at.checked_duration_since(start) {
        Some(after) => after.as_secs_f64(),
        None => -(start - at).as_secs_f64(),
    }
}

/// What the guest's disk I/O took, by phase: it was watched from `from` on, and the migration ended at `end`.
fn latencies(
    consoles: [&Console; 2],
    start: Instant,
    from: f64,
    end: f64,
    measured: Option<&Measured>,
) -> Vec<PhaseLatency> {
    let ticks: Vec<_> = consoles
        .into_iter()
        .zip([Side::Source, Side::Destination])
        .flat_map(|(console, side)| {
            let lines = console.transcript().lines().into_iter();
            lines.filter_map(move |line| {
                Ticks::parse(&line.text, seconds_since(start, line.at), side)
            })
        })
        .collect();
    let moments = Moments {
        from,
        freeze: measured.and_then(|measured| measured.freeze),
        up: measured.and_then(|measured| measured.destination_up),
        end,
        until: start.elapsed().as_secs_f64(),
    };
    phases(&ticks, &moments)
}

/// The guest's ticks on both consoles, in the order of its life.
fn life(consoles: [&Console; 2], who: Who, start: Instant) -> Vec<Sample> {
    let mut samples: Vec<_> = consoles
        .into_iter()
        .zip([Side::Source, Side::Destination])
        .flat_map(|(console, side)| {
            console
                .ticks_of(who)
                .into_iter()
                .map(move |tick| (tick, side))
        })
        .map(|(tick, side)| Sample {
            at: seconds_since(start, tick.at),
            guest_ms: tick.guest_ms,
            operations: tick.operations,
            side,
        })
        .collect();
    // Each console has a thread that reads it. A tick that one read late came before the next all the same.
    for index in (1..samples.len()).rev() {
        samples[index - 1].at = samples[index - 1].at.min(samples[index].at);
    }
    samples
}

/// What the two consoles said where the guest changed hosts.
fn seam([source, destination]: [&Transcript; 2], moved: bool) -> [String; 2] {
    if !moved {
        return [source.tail(CONSOLE.1), destination.tail(CONSOLE.1)];
    }
    let first = destination.lines().into_iter().take(CONSOLE.0);
    let first: Vec<_> = first.map(|line| line.text).collect();
    [source.tail(CONSOLE.0), first.join("\n")]
}

/// Has the guest verify its memory where it runs; what is wrong with it becomes the outcome.
fn check(
    consoles: [&Console; 2],
    who: Who,
    start: Instant,
    outcome: &mut Outcome,
) -> Option<Checked> {
    let patience = match outcome {
        Outcome::Moved => VERIFY,
        _ => VERIFY_ELSE,
    };
    let side = match outcome {
        Outcome::Moved => 1,
        // Where it was heard last.
        _ => usize::from(!consoles[1].ticks().is_empty()),
    };
    let verified = consoles[side].verify(patience);
    let one_life = [Who::Checker, who]
        .into_iter()
        .try_for_each(|who| one_life(&life(consoles, who, start)));
    let wrong = console::bad(&consoles, Who::Work);
    if wrong > 0 {
        fail(
            outcome,
            format!("the program in the guest was given {wrong} wrong answers"),
        );
    }
    if let Err(error) = &one_life {
        fail(outcome, error.to_string());
    }
    match verified {
        Ok(verified) => {
            let bad = verified.bad.max(console::bad_pages(&consoles));
            if bad > 0 {
                fail(outcome, format!("{bad} pages are wrong"));
            }
            Some(Checked {
                pages: verified.pages,
                bad,
                one_life: one_life.is_ok(),
            })
        }
        Err(error) => {
            if *outcome == Outcome::Moved {
                let why = format!("the guest does not verify its memory: {error:#}");
                fail(outcome, why);
            }
            None
        }
    }
}

/// Nothing makes a failure better; the first one is kept.
fn fail(outcome: &mut Outcome, why: String) {
    if !matches!(outcome, Outcome::Failed { .. }) {
        *outcome = Outcome::Failed { why };
    }
}
