//! A guest process for the tests: spawned, spoken to by lines, killed at the end.
#![allow(dead_code)] // each test file uses a part of it

pub mod pattern;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use hybridmig_pager::{Features, Region, RegionMemory, Uffd, attach};
use rustix::fs::{MemfdFlags, memfd_create};

pub const PAGE: usize = 4096;
const DEADLINE: Duration = Duration::from_secs(60);
/// The fixture's program; the benchmarks, which are a package of their own, build it as another.
const PROGRAM: &str = match option_env!("CARGO_BIN_EXE_pager-fixture") {
    Some(path) => path,
    None => match option_env!("CARGO_BIN_EXE_bench-guest") {
        Some(path) => path,
        None => panic!("cargo tells this only to tests and benchmarks"),
    },
};

/// A fixture process.
pub struct Fixture {
    child: Child,
    input: ChildStdin,
    output: mpsc::Receiver<String>,
}

impl Fixture {
    pub fn spawn(arguments: &[&str]) -> Self {
        Self::of(PROGRAM, arguments)
    }

    /// Another program that speaks by lines.
    pub fn of(program: &str, arguments: &[&str]) -> Self {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, output) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            input,
            output,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn send(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// The next line that it says.
    pub fn line(&self) -> String {
        self.output
            .recv_timeout(DEADLINE)
            .expect("the fixture did not answer in time, or ended")
    }

    pub fn wait_for(&self, wanted: &str) {
        while self.line() != wanted {}
    }

    /// Whether it has said nothing more for a while.
    pub fn silent_for(&self, time: Duration) -> bool {
        self.output.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout)
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.send(line);
        self.line()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest with a memfd of `pages` pages.
pub struct Guest {
    pub process: Fixture,
    pub memory: Arc<RegionMemory>,
    /// Number of the memfd, here and in the guest.
    pub fd: i32,
}

impl Guest {
    pub fn new(pages: u32) -> Self {
        Self::with_user(pages, 0)
    }

    pub fn with_user(pages: u32, uid: u32) -> Self {
        // Not close-on-exec: the guest inherits it under the same number.
        let file = File::from(memfd_create("guest", MemfdFlags::empty()).unwrap());
        let len = u64::from(pages) * PAGE as u64;
        file.set_len(len).unwrap();
        let fd = file.as_raw_fd();
        let process = Fixture::spawn(&[
            "guest",
            &fd.to_string(),
            &pages.to_string(),
            &uid.to_string(),
        ]);
        assert_eq!(process.line(), "ready");
        Self {
            process,
            memory: Arc::new(RegionMemory::open(file, 0, 0, len).unwrap()),
            fd,
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn region(&self) -> Region {
        Region::find(self.pid(), Arc::clone(&self.memory)).unwrap()
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.process.ask(line)
    }

    pub fn attach(&self, features: Features) -> Uffd {
        let uffd = attach::attach(self.pid(), attach::Method::Syscall)
            .unwrap()
            .uffd;
        uffd.handshake(features).unwrap();
        uffd
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.len() as usize];
        self.memory.read(0, &mut bytes).unwrap();
        bytes
    }
}
