//! A disk pager under test, for this crate's tests and benchmarks: serves a disk whose blocks are
//! missing, or all here, until its standard input ends or somebody kills it. Not for users.

#[path = "../../tests/common/network.rs"]
mod network;
#[path = "../../tests/common/pattern.rs"]
mod pattern;

use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::time::Duration;

use hybridmig_pager::disk::{DiskImage, DiskOptions, NbdOptions, NbdServer};
use network::Network;
use roaring::RoaringBitmap;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [how, directory, bytes, seed, delay_ms] = arguments[..] else {
        panic!("usage: missing|here|adopt DIRECTORY BYTES SEED DELAY_MS");
    };
    let directory = PathBuf::from(directory);
    let (bytes, seed, delay_ms): (u64, u64, u64) = (number(bytes), number(seed), number(delay_ms));
    let options = DiskOptions {
        region: 1,
        image: directory.join("disk.raw"),
        map: directory.join("disk.map"),
        bytes,
        block_size: DiskOptions::BLOCK_SIZE,
        overwrite: false,
    };
    let mut network = Network::new();
    let disk = match how {
        "adopt" => DiskImage::adopt(&options.map, network.sink.clone()),
        _ => DiskImage::create(&options),
    }
    .unwrap();
    let mut missing = RoaringBitmap::new();
    match how {
        "missing" => {
            missing.insert_range(0..disk.blocks());
        }
        "here" => {
            let mut data = vec![0; disk.block_size() as usize];
            for block in 0..disk.blocks() {
                network::contents(seed, block, &mut data);
                // Zeroes stay holes.
                if data.iter().any(|byte| *byte != 0) {
                    disk.write(block, &data).unwrap();
                }
            }
        }
        _ => {}
    }
    if how != "adopt" {
        disk.arm(&missing, network.sink.clone()).unwrap();
    }
    network.connect(disk.clone(), seed, Duration::from_millis(delay_ms));
    let server = NbdServer::start(
        &NbdOptions {
            socket: directory.join("nbd.sock"),
            export: "disk".into(),
            read_only: false,
        },
        disk.clone(),
    )
    .unwrap();
    say("ready");
    for line in io::stdin().lock().lines() {
        match line.unwrap().as_str() {
            "push" => network.sink.push(disk.missing()),
            "missing" => say(&disk.missing().len().to_string()),
            "finish" => {
                disk.finish().unwrap();
                say("finished");
            }
            other => panic!("not a command: {other:?}"),
        }
    }
    server.stop();
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.parse()
        .unwrap_or_else(|_| panic!("not a number: {text:?}"))
}

fn say(line: &str) {
    println!("{line}");
    io::stdout().flush().expect("the test reads our output");
}
