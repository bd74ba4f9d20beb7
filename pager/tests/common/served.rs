//! A disk that is served in the test's process, over an emulated network.
#![allow(dead_code)] // each test file uses a part of it

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hybridmig_pager::disk::{DiskImage, DiskOptions, NbdOptions, NbdServer};
use roaring::RoaringBitmap;

use super::nbd::Request;
use super::network::{self, Network};

pub const MIB: u64 = 1 << 20;
pub const BLOCK: u32 = DiskOptions::BLOCK_SIZE;
pub const SEED: u64 = 11;
/// Not a whole number of blocks or granules.
pub const BYTES: u64 = 24 * MIB + 3 * 4096 + 512;
pub const DELAY: Duration = Duration::from_millis(15);

/// A disk that is served in this process.
pub struct Served {
    pub server: Option<NbdServer>,
    pub disk: Arc<DiskImage>,
    pub network: Network,
    pub options: NbdOptions,
    dir: tempfile::TempDir,
}

impl Served {
    /// With every block missing, and a network that nobody has connected yet.
    pub fn missing() -> Self {
        let served = Self::filling();
        let all: RoaringBitmap = (0..served.disk.blocks()).collect();
        served.disk.arm(&all, served.network.sink.clone()).unwrap();
        served
    }

    /// Before it is armed, with all blocks written.
    pub fn filling() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskImage::create(&DiskOptions {
            region: 0,
            image: dir.path().join("disk.raw"),
            map: dir.path().join("disk.map"),
            bytes: BYTES,
            block_size: BLOCK,
            overwrite: false,
        })
        .unwrap();
        let mut data = vec![0; BLOCK as usize];
        for block in 0..disk.blocks() {
            network::contents(SEED, block, &mut data);
            disk.write(block, &data).unwrap();
        }
        let options = NbdOptions {
            socket: dir.path().join("nbd.sock"),
            export: "disk0".into(),
            read_only: false,
        };
        Self {
            server: Some(NbdServer::start(&options, disk.clone()).unwrap()),
            disk,
            network: Network::new(),
            options,
            dir,
        }
    }

    pub fn connect(&mut self) {
        self.network.connect(self.disk.clone(), SEED, DELAY);
    }

    /// How many times a block was asked for.
    pub fn asked(&self) -> usize {
        self.network.sink.asked.lock().unwrap().len()
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk0?socket={}", self.options.socket.display())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn finish(&self) -> Vec<u8> {
        self.network.sink.push(self.disk.missing());
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.disk.missing().is_empty() {
            assert!(Instant::now() < deadline, "blocks do not come");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.disk.finish().unwrap();
        std::fs::read(self.disk.path()).unwrap()
    }
}

/// Runs a client to its end, which must be a good one.
pub fn run(command: &[&str]) -> String {
    let output = Command::new("timeout")
        .arg("120")
        .args(command)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

pub fn request(command: u16, offset: u64, len: u32) -> Request {
    Request {
        flags: 0,
        command,
        cookie: offset ^ 0x5555,
        offset,
        len,
    }
}
