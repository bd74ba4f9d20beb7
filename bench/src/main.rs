//! `bench`: runs scenarios and makes tables and plots of their results. Only the command line.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use hybridmig_bench::goodput::{self, Plan, Rival, Transport};
use hybridmig_bench::grid::{self, Grid};
use hybridmig_bench::interrupt::Interrupt;
use hybridmig_bench::record::Record;
use hybridmig_bench::scenario::{EMBEDDED, Scenario};
use hybridmig_bench::{engine, report, series, virtual_clock};
use hybridmig_netem::LinkSpec;
use hybridmig_tests::profile_dir;

/// Migrations side by side over an emulated link: hybridmig and what people use today.
#[derive(Parser)]
#[command(name = "bench")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a scenario, as root; every run is appended to the results as a line of JSON.
    Run {
        /// A scenario's name (`bench list`) or file.
        scenario: String,
        /// Only this engine; may be given several times.
        #[arg(long)]
        engine: Vec<String>,
        /// Only the cells whose text (`bench list SCENARIO`) contains this.
        #[arg(long, default_value = "")]
        cell: String,
        /// Repetitions, instead of the scenario's.
        #[arg(long)]
        repetitions: Option<u32>,
        /// Seconds until a run is given up, instead of the scenario's.
        #[arg(long)]
        give_up: Option<f64>,
        /// File of the results [default: bench/NAME.jsonl in cargo's target directory].
        #[arg(long)]
        out: Option<PathBuf>,
        /// Remove former results of this file first.
        #[arg(long)]
        fresh: bool,
    },
    /// Make tables and plots of results.
    Report {
        /// Results of `bench run`.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Directory of the tables and plots; made if it is missing.
        #[arg(long)]
        out: PathBuf,
        /// The command that made the results, for the reader.
        #[arg(long, default_value = "bench run")]
        made_by: String,
    },
    /// Measure what transports make of links, as root: goodput, start-up, page faults beside it.
    Goodput {
        /// Links, in the words of `hybridmig netem`; the goals' when none is named.
        link: Vec<LinkSpec>,
        /// Only this transport; may be given several times.
        #[arg(long)]
        transport: Vec<String>,
        /// Ask for pages meanwhile.
        #[arg(long)]
        faults: bool,
        /// Let this transport use the link as well, from 5 s after the measured one on.
        #[arg(long)]
        rival: Option<String>,
        /// Let it begin 5 s before.
        #[arg(long, requires = "rival")]
        rival_first: bool,
        /// Length of a run.
        #[arg(long, default_value_t = 12.0)]
        seconds: f64,
        /// Rounds over everything.
        #[arg(long, default_value_t = 1)]
        repetitions: u32,
        /// Seed of the emulator.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// File of the results, appended to.
        #[arg(long)]
        out: PathBuf,
        /// Make a table of all results of that file.
        #[arg(long)]
        table: Option<PathBuf>,
    },
    /// Judge the planner: the embedded guest under it and under everything that could have been chosen instead.
    Grid {
        /// `default`, or a file.
        #[arg(default_value = "default")]
        grid: String,
        /// Only cells whose text (`transatlantic | web`) contains this.
        #[arg(long, default_value = "")]
        cell: String,
        /// Only this variant: planned, observe, precopy, postcopy, `0.95 × 1`.
        #[arg(long)]
        variant: Option<String>,
        /// Repetitions, instead of the grid's.
        #[arg(long)]
        repetitions: Option<u32>,
        /// File of the results, appended to [default: bench/NAME.jsonl in cargo's target directory].
        #[arg(long)]
        out: Option<PathBuf>,
        /// Remove former results of this file first.
        #[arg(long)]
        fresh: bool,
        /// Run nothing, only make tables and plots of the results in this directory.
        #[arg(long)]
        report: Option<PathBuf>,
    },
    /// The same under a virtual clock: a fine sweep of fixed shares in some minutes.
    Virtual {
        /// `default`, or a file.
        #[arg(default_value = "default")]
        grid: String,
        /// Only cells whose text contains this.
        #[arg(long, default_value = "")]
        cell: String,
        /// Seeds of each.
        #[arg(long, default_value_t = 3)]
        seeds: u64,
        /// File of the results, one line of JSON a run.
        #[arg(long)]
        out: Option<PathBuf>,
        /// Instead: hold it against real runs, results of `bench grid`.
        #[arg(long)]
        against: Option<PathBuf>,
    },
    /// List engines and scenarios, or the cells of a scenario.
    List {
        /// A scenario's name or file.
        scenario: Option<String>,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Run {
            scenario,
            engine,
            cell,
            repetitions,
            give_up,
            out,
            fresh,
        } => {
            let mut scenario = Scenario::find(&scenario)?;
            if !engine.is_empty() {
                scenario.engines = engine;
                scenario.check_engines()?;
            }
            scenario.repetitions = repetitions.unwrap_or(scenario.repetitions);
            scenario.times.give_up_s = give_up.unwrap_or(scenario.times.give_up_s);
            let out = match out {
                Some(out) => out,
                None => default_out(&scenario.name)?,
            };
            if fresh && out.exists() {
                std::fs::remove_file(&out)
                    .with_context(|| format!("cannot remove {}", out.display()))?;
            }
            series::run_all(&scenario, &cell, &out, &Interrupt::catch()?)?;
            eprintln!("results are in {}", out.display());
        }
        Command::Report {
            files,
            out,
            made_by,
        } => {
            let mut records = Vec::new();
            for file in &files {
                records.extend(Record::read_all(file)?);
            }
            ensure!(!records.is_empty(), "there are no results in these files");
            let written = report::write(&records, &out, &made_by)?;
            eprintln!("wrote {written} files to {}", out.display());
        }
        Command::Goodput {
            link,
            transport,
            faults,
            rival,
            rival_first,
            seconds,
            repetitions,
            seed,
            out,
            table,
        } => {
            let links = if link.is_empty() {
                goodput::default_links()?
            } else {
                link
            };
            let transports = if transport.is_empty() {
                Transport::ALL.map(|(_, transport)| transport).to_vec()
            } else {
                let named = transport.iter().map(|name| Transport::by_name(name));
                named.collect::<Result<_>>()?
            };
            let rival = rival.map(|name| -> Result<Rival> {
                Ok(Rival {
                    transport: Transport::by_name(&name)?,
                    first: rival_first,
                })
            });
            let plan = Plan {
                links,
                transports,
                faults,
                rival: rival.transpose()?,
                seconds,
                repetitions,
                seed,
                retries: 2,
            };
            goodput::run_all(&plan, &out, &Interrupt::catch()?)?;
            if let Some(table) = table {
                let text = goodput::markdown(&goodput::read(&out)?, "bench goodput");
                std::fs::write(&table, text)
                    .with_context(|| format!("cannot write {}", table.display()))?;
            }
        }
        Command::Virtual {
            grid,
            cell,
            seeds,
            out,
            against,
        } => {
            if let Some(real) = against {
                let mut runs = grid::read(&real)?;
                runs.retain(|run| run.cell.to_string().contains(&cell));
                print!("{}", virtual_clock::compare(&runs)?);
                return Ok(());
            }
            let mut grid = Grid::find(&grid)?;
            grid.keep(&cell);
            let lines = virtual_clock::sweep(&grid, seeds)?;
            if let Some(out) = out {
                let lines: Result<Vec<String>, _> =
                    lines.iter().map(serde_json::to_string).collect();
                std::fs::write(&out, lines?.join("\n") + "\n")
                    .with_context(|| format!("cannot write {}", out.display()))?;
            }
            print!("{}", virtual_clock::table(&lines));
        }
        Command::Grid {
            grid,
            cell,
            variant,
            repetitions,
            out,
            fresh,
            report,
        } => {
            let mut grid = Grid::find(&grid)?;
            grid.repetitions = repetitions.unwrap_or(grid.repetitions);
            let out = match out {
                Some(out) => out,
                None => default_out(&grid.name)?,
            };
            if let Some(directory) = report {
                let count = grid::write(&grid::read(&out)?, &directory, "make bench-plan")?;
                println!("{count} runs in {}", directory.display());
                return Ok(());
            }
            if fresh && out.exists() {
                std::fs::remove_file(&out)
                    .with_context(|| format!("cannot remove {}", out.display()))?;
            }
            let program = profile_dir()?.join("hybridmig");
            let interrupt = Interrupt::catch()?;
            grid::series(&grid, &program, &cell, variant.as_deref(), &out, &interrupt)?;
        }
        Command::List { scenario: None } => {
            println!("Engines:");
            for engine in engine::all() {
                println!("  {}", series::describe(engine.as_ref()));
            }
            println!("Scenarios:");
            for (name, text) in EMBEDDED {
                let scenario = Scenario::parse(text)?;
                println!(
                    "  {name:34} {} cells × {} engines × {}",
                    scenario.cells()?.len(),
                    scenario.engines.len(),
                    scenario.repetitions
                );
            }
        }
        Command::List {
            scenario: Some(name),
        } => {
            for cell in Scenario::find(&name)?.cells()? {
                println!("{cell}   ({}, dirties {} MB/s)", cell.link, cell.dirty_mb_s);
            }
        }
    }
    Ok(())
}

fn default_out(name: &str) -> Result<PathBuf> {
    let profile = profile_dir()?;
    let directory = profile
        .parent()
        .context("a profile is within a target")?
        .join("bench");
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory.join(format!("{name}.jsonl")))
}
