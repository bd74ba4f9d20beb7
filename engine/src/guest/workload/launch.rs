//! The process of a guest that comes: how it is started and how it is seen to its end.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::control::Control;
use super::options::GuestOptions;
use crate::guest::{GuestError, GuestResult};

/// How long a guest that was started may take until it answers.
const START: Duration = Duration::from_secs(20);
/// How long a guest that was told to stop may take.
const STOP: Duration = Duration::from_secs(10);

/// Where the guest comes to life.
#[derive(Clone, Debug)]
pub enum Launch {
    /// Start a process for it.
    Start {
        /// The program.
        program: PathBuf,
        /// Arguments before those of [`GuestOptions::to_args`]; `guest` for `hybridmig` itself.
        args: Vec<OsString>,
        /// Where the guest is to listen.
        control: PathBuf,
        /// Folder for the guest's disk, if one comes; beside the control socket if none.
        disk_dir: Option<PathBuf>,
    },
    /// Use a guest that waits there (`hybridmig guest --incoming`).
    Waiting {
        /// Its control socket.
        control: PathBuf,
    },
}

impl Launch {
    /// Where the guest listens.
    pub fn control(&self) -> &Path {
        match self {
            Self::Start { control, .. } | Self::Waiting { control } => control,
        }
    }
}

/// The options of a guest that is started at `control`, with `bytes` of memory and `disk_bytes` of
/// disk.
pub fn options(
    control: &Path,
    disk_dir: Option<&Path>,
    bytes: u64,
    disk_bytes: u64,
) -> GuestOptions {
    let in_folder = |folder: &Path| {
        let name = control.file_name().unwrap_or_default();
        let mut name = name.to_owned();
        name.push(".disk");
        folder.join(name)
    };
    GuestOptions {
        incoming: true,
        detach: true,
        end_when_abandoned: true,
        disk_bytes,
        disk: disk_dir.filter(|_| disk_bytes > 0).map(in_folder),
        ..GuestOptions::new(control, bytes)
    }
}

/// Starts a guest process that waits for a state, and connects to it.
pub fn start(
    program: &Path,
    args: &[OsString],
    options: &GuestOptions,
) -> GuestResult<(Control, Child)> {
    let failed = |error: std::io::Error| {
        GuestError::caused(format!("cannot start {}", program.display()), error)
    };
    // A file, not a pipe: the guest outlives this process and may still have something to say.
    let mut said = tempfile::tempfile().map_err(failed)?;
    let mut child = Command::new(program)
        .args(args)
        .args(options.to_args())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said.try_clone().map_err(failed)?)
        .spawn()
        .map_err(failed)?;
    // Should another guest listen there, the new one ends and says so.
    let alive = || matches!(child.try_wait(), Ok(None));
    match Control::wait(&options.control, START, alive) {
        Ok(client) => Ok((client, child)),
        Err(error) => {
            let said = last_words(&mut said);
            reap(child)?;
            Err(GuestError::caused(
                format!("the guest did not start; it said: {said}"),
                error,
            ))
        }
    }
}

fn last_words(said: &mut File) -> String {
    let mut text = String::new();
    match said
        .rewind()
        .and_then(|()| said.take(2048).read_to_string(&mut text))
    {
        Ok(0) => "nothing".into(),
        Ok(_) => text.trim().into(),
        Err(error) => format!("something that cannot be read ({error})"),
    }
}

/// Waits for a guest process that is about to end, and ends it if it does not.
pub fn reap(mut child: Child) -> GuestResult<()> {
    let failed = |error| GuestError::caused("the guest's process cannot be waited for", error);
    let deadline = Instant::now() + STOP;
    while child.try_wait().map_err(failed)?.is_none() {
        if Instant::now() >= deadline {
            child.kill().map_err(failed)?;
            child.wait().map_err(failed)?;
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// `MemAvailable` in bytes.
pub fn available_memory() -> std::io::Result<u64> {
    std::fs::read_to_string("/proc/meminfo")?
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .ok_or_else(|| std::io::Error::other("it has no line MemAvailable"))
}
