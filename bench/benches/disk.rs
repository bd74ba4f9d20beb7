//! What a disk costs the guest: hybridmig's NBD server and `qemu-nbd` on the same contents, asked in
//! turn by the same clients (`qemu-img bench`, `nbdcopy`). The goal is 0.8 of `qemu-nbd` at least.
//! Then what is ours alone: a read that has to ask for its block, and placing.
//!
//! Wall time: on a machine that has other work single figures mean little, the ratios of what ran
//! in turn more. `ROUNDS` in the environment says how often; 7 unless told.

use std::fmt::Write as _;
use std::hint::black_box;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hybridmig_bench::micro::{Nobody, noise, thread_time};
use hybridmig_pager::disk::{DiskImage, DiskOptions};

const MIB: u64 = 1 << 20;
const BYTES: u64 = 512 * MIB;
/// From one request to the next: no two touch the same MiB, and the disk is walked many times.
const STRIDE: u64 = MIB + 4096;
const PATIENCE: Duration = Duration::from_secs(60);

/// One thing that is measured on both sides.
struct Case {
    name: &'static str,
    unit: &'static str,
    /// How much of the unit one run does.
    amount: f64,
    client: Client,
}

enum Client {
    /// `qemu-img bench` with these options.
    Bench(&'static [&'static str]),
    /// `nbdcopy` of the whole disk to nowhere.
    Copy,
}

const READ_1: &[&str] = &["-c", "20000", "-d", "1", "-s", "4096"];
const READ_16: &[&str] = &["-c", "60000", "-d", "16", "-s", "4096"];
const WRITE_1: &[&str] = &["-w", "-c", "20000", "-d", "1", "-s", "4096"];
const WRITE_16: &[&str] = &["-w", "-c", "60000", "-d", "16", "-s", "4096"];
const READ_LONG: &[&str] = &["-c", "1024", "-d", "8", "-s", "1M"];
const WRITE_LONG: &[&str] = &["-w", "-c", "1024", "-d", "8", "-s", "1M"];

const CASES: [Case; 7] = [
    Case::new("read 4 KiB, depth 1", "kIOPS", 20.0, Client::Bench(READ_1)),
    Case::new(
        "read 4 KiB, depth 16",
        "kIOPS",
        60.0,
        Client::Bench(READ_16),
    ),
    Case::new(
        "write 4 KiB, depth 1",
        "kIOPS",
        20.0,
        Client::Bench(WRITE_1),
    ),
    Case::new(
        "write 4 KiB, depth 16",
        "kIOPS",
        60.0,
        Client::Bench(WRITE_16),
    ),
    Case::new(
        "read 1 MiB, depth 8",
        "MiB/s",
        1024.0,
        Client::Bench(READ_LONG),
    ),
    Case::new(
        "write 1 MiB, depth 8",
        "MiB/s",
        1024.0,
        Client::Bench(WRITE_LONG),
    ),
    Case::new(
        "nbdcopy of all",
        "MiB/s",
        (BYTES / MIB) as f64,
        Client::Copy,
    ),
];

impl Case {
    const fn new(name: &'static str, unit: &'static str, amount: f64, client: Client) -> Self {
        Self {
            name,
            unit,
            amount,
            client,
        }
    }

    /// Amount per second.
    fn run(&self, server: &Server) -> f64 {
        let seconds = match self.client {
            Client::Bench(options) => bench(server, options, STRIDE),
            Client::Copy => {
                let start = Instant::now();
                output(Command::new("nbdcopy").args([&server.uri, "null:"]));
                start.elapsed().as_secs_f64()
            }
        };
        self.amount / seconds
    }
}

/// Seconds that `qemu-img bench` says it took.
fn bench(server: &Server, options: &[&str], stride: u64) -> f64 {
    let stride = stride.to_string();
    // Requests of 1 MiB follow each other.
    let step: &[&str] = if options.contains(&"1M") {
        &[]
    } else {
        &["-S", &stride]
    };
    let mut command = Command::new("qemu-img");
    command
        .args(["bench", "-f", "raw"])
        .args(options)
        .args(step);
    let text = output(command.arg(&server.uri));
    text.split_whitespace()
        .rev()
        .find_map(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("no seconds in {text:?}"))
}

fn output(command: &mut Command) -> String {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error} (Debian: qemu-utils, libnbd-bin)"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A server in a process of its own.
struct Server {
    process: Child,
    uri: String,
}

impl Server {
    fn ours(how: &str, directory: &Path) -> Self {
        std::fs::create_dir(directory).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_bench-disk"))
            .args([
                how,
                directory.to_str().unwrap(),
                &BYTES.to_string(),
                "1",
                "0",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line.trim(), "ready");
        Self::at(process, &directory.join("nbd.sock"))
    }

    fn qemu(image: &Path, socket: &Path) -> Self {
        let process = Command::new("qemu-nbd")
            .args([
                "--persistent",
                "--shared=8",
                "--format=raw",
                "--export-name=disk",
            ])
            .arg("--socket")
            .args([socket, image])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd (Debian: qemu-utils)");
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < PATIENCE, "qemu-nbd does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self::at(process, socket)
    }

    fn at(process: Child, socket: &Path) -> Self {
        Self {
            process,
            uri: format!("nbd+unix:///disk?socket={}", socket.display()),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values
}

/// Low, middle and high.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let values = sorted(values);
    (
        values[0],
        values[values.len() / 2],
        values[values.len() - 1],
    )
}

fn compare(directory: &Path, rounds: usize) -> String {
    let ours = Server::ours("here", &directory.join("ours"));
    let image = directory.join("qemu.raw");
    let from = directory.join("ours/disk.raw");
    // With the same holes.
    output(
        Command::new("cp")
            .arg("--sparse=always")
            .args([&from, &image]),
    );
    let theirs = Server::qemu(&image, &directory.join("qemu.sock"));
    let mut figures = vec![(Vec::new(), Vec::new()); CASES.len()];
    for round in 0..rounds {
        for (case, (our, their)) in CASES.iter().zip(&mut figures) {
            // Each side is first in every other round.
            if round % 2 == 0 {
                our.push(case.run(&ours));
                their.push(case.run(&theirs));
            } else {
                their.push(case.run(&theirs));
                our.push(case.run(&ours));
            }
        }
    }
    let mut table = String::from(
        "| what | unit | hybridmig (low / middle / high) | qemu-nbd | ratio of the middles | \
         ratio by round (low / middle / high) |\n|---|---|---|---|---|---|\n",
    );
    for (case, (our, their)) in CASES.iter().zip(&figures) {
        let ratios: Vec<f64> = our
            .iter()
            .zip(their)
            .map(|(our, their)| our / their)
            .collect();
        let (low, middle, high) = spread(our);
        let (their_low, their_middle, their_high) = spread(their);
        let (ratio_low, ratio, ratio_high) = spread(&ratios);
        let digits = usize::from(middle < 1000.0);
        writeln!(
            table,
            "| {} | {} | {low:.digits$} / {middle:.digits$} / {high:.digits$} \
             | {their_low:.digits$} / {their_middle:.digits$} / {their_high:.digits$} \
             | {:.2} | {ratio_low:.2} / {ratio:.2} / {ratio_high:.2} |",
            case.name,
            case.unit,
            middle / their_middle
        )
        .expect("a string takes everything");
    }
    table
}

/// Microseconds of a read at depth 1: of blocks that are here, and of missing ones that the other
/// thread of the same process has at once.
fn faults(directory: &Path, rounds: usize) -> String {
    let mut here = Vec::new();
    let mut missing = Vec::new();
    let blocks = BYTES / u64::from(DiskOptions::BLOCK_SIZE);
    let count = blocks.to_string();
    let options = ["-c", &count, "-d", "1", "-s", "4096"];
    for round in 0..rounds {
        let directory: PathBuf = directory.join(format!("missing-{round}"));
        let server = Server::ours("missing", &directory);
        for figures in [&mut missing, &mut here] {
            let seconds = bench(&server, &options, u64::from(DiskOptions::BLOCK_SIZE));
            figures.push(seconds * 1e6 / blocks as f64);
        }
        drop(server);
        std::fs::remove_dir_all(&directory).unwrap();
    }
    let (low, middle, high) = spread(&missing);
    let (here_low, here_middle, here_high) = spread(&here);
    format!(
        "read of 4 KiB of a missing block of 64 KiB, asked for, placed and answered: \
         {low:.0} / {middle:.0} / {high:.0} µs; of a block that is here: \
         {here_low:.0} / {here_middle:.0} / {here_high:.0} µs\n"
    )
}

/// GB/s of core time, by blocks and by runs of 16.
fn placing(directory: &Path, rounds: usize) -> String {
    let mut text = String::new();
    for (name, run) in [("one block of 64 KiB", 1), ("16 blocks", 16)] {
        let mut figures = Vec::new();
        for _ in 0..rounds {
            let options = DiskOptions {
                region: 0,
                image: directory.join("placed.raw"),
                map: directory.join("placed.map"),
                bytes: BYTES,
                block_size: DiskOptions::BLOCK_SIZE,
                overwrite: true,
            };
            let disk = DiskImage::create(&options).unwrap();
            let blocks = disk.blocks();
            disk.arm(&(0..blocks).collect(), Arc::new(Nobody)).unwrap();
            let data = noise(1, run as usize * DiskOptions::BLOCK_SIZE as usize);
            let start = thread_time();
            for first in (0..blocks).step_by(run as usize) {
                disk.place(first, black_box(&data)).unwrap();
            }
            let took = thread_time().saturating_sub(start);
            figures.push(BYTES as f64 / took.as_secs_f64() / 1e9);
        }
        let (low, middle, high) = spread(&figures);
        writeln!(
            text,
            "placing, {name} at a time, core time: {low:.2} / {middle:.2} / {high:.2} GB/s"
        )
        .expect("a string takes everything");
    }
    text
}

fn main() {
    let rounds = std::env::var("ROUNDS").map_or(7, |text| {
        text.parse().expect("ROUNDS is a number of rounds")
    });
    let directory = tempfile::tempdir().unwrap();
    let load = || std::fs::read_to_string("/proc/loadavg").unwrap();
    println!("rounds: {rounds}; load before: {}", load().trim());
    println!("{}", compare(directory.path(), rounds));
    println!("{}", faults(directory.path(), rounds));
    println!("{}", placing(directory.path(), rounds));
    println!("load after: {}", load().trim());
}
