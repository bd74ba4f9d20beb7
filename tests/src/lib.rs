//! Fixtures of the whole-system tests: a real Linux guest under QEMU, its console, the `hybridmig`
//! program. They start, watch and end things; what must hold is said by the tests.
//!
//! Whatever a fixture starts dies with it, and with the test process however that ends.

pub mod console;
pub mod disk;
pub mod guest;
pub mod image;
pub mod keeper;
pub mod migration;
pub mod process;
pub mod qmp;
pub mod transcript;
pub mod vm;

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use console::{Console, Tick, Verified};
pub use image::{Image, image};
pub use process::{HybridmigProcess, hybridmig_binary};
pub use qmp::Qmp;
pub use vm::{Vm, VmConfig};

/// The root of the source tree.
pub fn source_root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The directory of the build profile that the running test or program was built with, `target/debug`.
/// Tests lie in its `deps`, programs in itself.
pub fn profile_dir() -> Result<PathBuf> {
    let program = std::env::current_exe().context("this program has no path")?;
    let directory = program.parent();
    let profile = match directory {
        Some(directory) if directory.ends_with("deps") => directory.parent(),
        other => other,
    };
    let profile = profile.map(Path::to_owned);
    profile.with_context(|| format!("{} is in no directory of cargo's", program.display()))
}

/// A UDP address on loopback that was free a moment ago. For what must be told a port in advance;
/// everything else should bind port 0 and say what it got.
pub fn free_udp_address() -> Result<SocketAddr> {
    let socket = UdpSocket::bind("127.0.0.1:0").context("no free UDP port")?;
    socket.local_addr().context("a bound socket has an address")
}
