//! Starts the destination's QEMU from the operator's command line (`recv --exec`): adds what the
//! engine needs (a monitor of its own, `-incoming defer`, shared RAM), keeps what QEMU says on
//! standard error for error texts, and ends only what it started.
//!
//! Words that come from the peer (names of RAM blocks) become part of a command line here: they
//! must never be taken over unchecked.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};

use super::qmp::{Qmp, QmpError};
use crate::guest::folder::{make_folder, remove_folder};
use crate::guest::{GuestError, GuestResult};

/// How long QEMU may take until its monitor answers.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a starting QEMU is asked.
const START_POLL: Duration = Duration::from_millis(20);
/// How long QEMU may take to end after SIGTERM.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of QEMU's standard error goes into an error text, in bytes.
const LOG_TAIL: usize = 2000;

/// A RAM block that the started QEMU has to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name in QEMU's migration stream.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
}

/// A QEMU that we started.
pub struct Launched {
    child: Child,
    folder: PathBuf,
    /// What was added to the command line, for the operator.
    pub added: Vec<String>,
}

impl Launched {
    /// Starts `command` and waits until its monitor answers.
    pub fn start(command: &str, blocks: &[RamBlock]) -> GuestResult<(Self, Qmp)> {
        let words = split_command(command)?;
        let folder = make_folder("hybridmig-qemu-")?;
        let result = Self::start_in(&folder, &words, blocks);
        if result.is_err() {
            remove_folder(&folder);
        }
        result
    }

    fn start_in(folder: &Path, words: &[String], blocks: &[RamBlock]) -> GuestResult<(Self, Qmp)> {
        let socket = folder.join("qmp");
        let plan = Additions::plan(words, blocks)?;
        let ram = plan
            .ram
            .as_ref()
            .map(|block| make_ram_file(block.size))
            .transpose()?;
        let added = plan.arguments(&socket, ram.as_ref().map(AsRawFd::as_raw_fd));
        let log = open_log(folder)?;
        let clone_log = || {
            log.try_clone()
                .map_err(|error| GuestError::caused("cannot duplicate a file descriptor", error))
        };
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .args(&added)
            .stdin(Stdio::null())
            .stdout(clone_log()?)
            .stderr(clone_log()?);
        let inherited = ram.as_ref().map(AsRawFd::as_raw_fd);
        // SAFETY: between fork and exec the closure makes two system calls that are
        // async-signal-safe and touches nothing but its own copies of two integers.
        unsafe {
            command.pre_exec(move || {
                // A session of its own: QEMU outlives us and does not get our Ctrl-C.
                rustix::process::setsid()?;
                if let Some(fd) = inherited
                    && libc::fcntl(fd, libc::F_SETFD, 0) < 0
                {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command
            .spawn()
            .map_err(|error| GuestError::caused(format!("cannot start '{}'", words[0]), error))?;
        let mut launched = Self {
            child,
            folder: folder.to_owned(),
            added,
        };
        match launched.wait_for_monitor(&socket) {
            Ok(qmp) => Ok((launched, qmp)),
            Err(error) => {
                launched.end();
                Err(error)
            }
        }
    }

    /// What QEMU last said on standard output and standard error.
    pub fn last_words(&self) -> String {
        last_words(&self.folder)
    }

    /// Whether QEMU has exited, and how.
    pub fn exit(&mut self) -> Option<String> {
        match self.child.try_wait() {
            Ok(Some(status)) => Some(status.to_string()),
            Ok(None) => None,
            Err(error) => Some(format!("cannot be waited for: {error}")),
        }
    }

    /// The folder with the monitor's socket (`qmp`) and QEMU's output (`qemu.log`). It stays when
    /// the guest does.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Ends QEMU and removes what was made for it.
    pub fn end(&mut self) {
        let deadline = Instant::now() + END_TIMEOUT;
        // The child has not been waited for, so its id is still its own.
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        if matches!(self.child.try_wait(), Ok(None)) {
            // A failure means that it ended just now; the wait below will tell.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        }
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(START_POLL);
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            if let Err(error) = self.child.kill() {
                tracing::warn!(pid = self.child.id(), %error, "cannot kill QEMU");
            }
            if let Err(error) = self.child.wait() {
                tracing::warn!(pid = self.child.id(), %error, "cannot wait for QEMU");
            }
        }
        remove_folder(&self.folder);
    }

    fn wait_for_monitor(&mut self, socket: &Path) -> GuestResult<Qmp> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Some(status) = self.exit() {
                return Err(GuestError::new(format!(
                    "QEMU ended at once ({status}) and said: {}",
                    self.last_words()
                )));
            }
            match Qmp::connect(socket) {
                Ok(qmp) => return Ok(qmp),
                // Not there yet.
                Err(error @ QmpError::Connect { .. }) if Instant::now() > deadline => {
                    return Err(GuestError::caused(
                        format!(
                            "QEMU did not open its monitor within {} s and said: {}",
                            START_TIMEOUT.as_secs(),
                            self.last_words()
                        ),
                        error,
                    ));
                }
                Err(QmpError::Connect { .. }) => thread::sleep(START_POLL),
                Err(error) => {
                    return Err(GuestError::caused(
                        "the monitor of the QEMU just started cannot be used",
                        error,
                    ));
                }
            }
        }
    }
}

/// What has to be added to the operator's command line.
struct Additions<'a> {
    incoming: bool,
    ram: Option<&'a RamBlock>,
}

impl<'a> Additions<'a> {
    fn plan(words: &[String], blocks: &'a [RamBlock]) -> GuestResult<Self> {
        if has_option(words, "daemonize") {
            return Err(GuestError::new(
                "leave -daemonize out of --exec: QEMU is detached from the terminal anyway",
            ));
        }
        let incoming = match option_values(words, "incoming").next() {
            None => true,
            Some("defer") => false,
            Some(other) => {
                return Err(GuestError::new(format!(
                    "--exec has -incoming {other}: leave it out, or use -incoming defer"
                )));
            }
        };
        let has_backend =
            option_values(words, "object").any(|object| object.contains("memory-backend-"));
        let ram = match (has_backend, blocks) {
            (true, _) => None,
            (false, [one]) => {
                backend_id(one)?;
                Some(one)
            }
            (false, _) => {
                return Err(GuestError::new(format!(
                    "the guest has {} RAM blocks: name them in --exec with -object \
                     memory-backend-file,…,share=on, as on the source",
                    blocks.len()
                )));
            }
        };
        Ok(Self { incoming, ram })
    }

    fn arguments(&self, socket: &Path, ram_fd: Option<i32>) -> Vec<String> {
        // A comma would begin the next key of an option; QEMU takes a doubled one as itself.
        let socket = socket.display().to_string().replace(',', ",,");
        let mut arguments = vec![
            "-qmp".to_owned(),
            format!("unix:{socket},server=on,wait=off"),
        ];
        if self.incoming {
            arguments.extend(["-incoming".to_owned(), "defer".to_owned()]);
        }
        if let (Some(block), Some(fd)) = (self.ram, ram_fd) {
            let (id, canonical) = block
                .name
                .strip_prefix("/objects/")
                .map_or((block.name.as_str(), false), |id| (id, true));
            // What it is without this depends on the machine type.
            let naming = if canonical { "on" } else { "off" };
            arguments.extend([
                "-object".to_owned(),
                format!(
                    "memory-backend-file,id={id},size={},mem-path=/proc/self/fd/{fd},share=on,\
                     x-use-canonical-path-for-ramblock-id={naming}",
                    block.size
                ),
                "-machine".to_owned(),
                format!("memory-backend={id}"),
            ]);
        }
        arguments
    }
}

/// The id of a block's backend. The name is the peer's: only what QEMU takes as an id passes.
fn backend_id(block: &RamBlock) -> GuestResult<&str> {
    let id = block.name.strip_prefix("/objects/").unwrap_or(&block.name);
    let well_formed = id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
        && id.len() <= 64;
    if well_formed {
        Ok(id)
    } else {
        Err(GuestError::new(format!(
            "the source names a RAM block {:?}, which is no QEMU id: name the backend in --exec \
             with -object memory-backend-file,…,share=on",
            block.name
        )))
    }
}

fn has_option(words: &[String], option: &str) -> bool {
    words.iter().any(|word| is_option(word, option))
}

/// Values of an option that takes one.
fn option_values<'a>(words: &'a [String], option: &str) -> impl Iterator<Item = &'a str> {
    words
        .windows(2)
        .filter(move |pair| is_option(&pair[0], option))
        .map(|pair| pair[1].as_str())
}

fn is_option(word: &str, option: &str) -> bool {
    // QEMU takes one dash or two.
    word.strip_prefix("--").or_else(|| word.strip_prefix('-')) == Some(option)
}

/// Splits a command line into words as a shell does, with quotes and backslashes but without
/// variables, patterns or pipes.
fn split_command(command: &str) -> GuestResult<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = command.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\n' => words.extend(word.take()),
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some(next) if next == c => break,
                        Some('\\') if c == '"' => match chars.next() {
                            Some(next @ ('"' | '\\' | '$' | '`')) => word.push(next),
                            Some('\n') => {}
                            Some(next) => word.extend(['\\', next]),
                            None => break,
                        },
                        Some(next) => word.push(next),
                        None => {
                            return Err(GuestError::new(format!(
                                "--exec has an opening {c} without a closing one: {command}"
                            )));
                        }
                    }
                }
            }
            '\\' => match chars.next() {
                Some('\n') => {}
                Some(next) => word.get_or_insert_default().push(next),
                None => return Err(GuestError::new("--exec ends in a backslash")),
            },
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    if words.is_empty() {
        return Err(GuestError::new(
            "--exec is empty: give the command line of QEMU, \"qemu-system-x86_64 …\"",
        ));
    }
    Ok(words)
}

/// An anonymous file for the guest's RAM, which vanishes with the last process that holds it.
fn make_ram_file(size: u64) -> GuestResult<OwnedFd> {
    let fd = memfd_create("hybridmig-ram", MemfdFlags::CLOEXEC)
        .map_err(|error| GuestError::caused("cannot create a memory file", error))?;
    rustix::fs::ftruncate(&fd, size).map_err(|error| {
        GuestError::caused(
            format!("cannot create a memory file of {} MiB", size >> 20),
            error,
        )
    })?;
    Ok(fd)
}

fn log_path(folder: &Path) -> PathBuf {
    folder.join("qemu.log")
}

fn open_log(folder: &Path) -> GuestResult<File> {
    let path = log_path(folder);
    OpenOptions::new()
        .create_new(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| GuestError::caused(format!("cannot create {}", path.display()), error))
}

fn last_words(folder: &Path) -> String {
    let text = fs::read(log_path(folder)).unwrap_or_default();
    let tail = &text[text.len().saturating_sub(LOG_TAIL)..];
    let text = String::from_utf8_lossy(tail);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    if lines.is_empty() {
        "nothing".to_owned()
    } else {
        lines.join("; ")
    }
}

/// Makes `OsStr` arguments printable for an operator to repeat.
pub fn printable<S: AsRef<OsStr>>(words: &[S]) -> String {
    words
        .iter()
        .map(|word| word.as_ref().to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        split_command(text).unwrap()
    }

    fn block(name: &str) -> RamBlock {
        RamBlock {
            name: name.to_owned(),
            size: 64 << 20,
        }
    }

    #[test]
    fn splits_as_a_shell_does() {
        assert_eq!(
            words(r#"qemu -append "console=ttyS0 a=\"b\"" -name 'it is' x\ y ''"#),
            [
                "qemu",
                "-append",
                "console=ttyS0 a=\"b\"",
                "-name",
                "it is",
                "x y",
                ""
            ]
        );
        assert!(split_command("qemu 'open").is_err());
        assert!(split_command("qemu \\").is_err());
        assert!(split_command("  ").is_err());
    }

    #[test]
    fn adds_only_what_is_missing() {
        let blocks = [block("/objects/ram")];
        let plain = words("qemu-system-x86_64 -m 64");
        let added = Additions::plan(&plain, &blocks)
            .unwrap()
            .arguments(Path::new("/run/q,x/qmp"), Some(7))
            .join(" ");
        assert_eq!(
            added,
            "-qmp unix:/run/q,,x/qmp,server=on,wait=off -incoming defer -object \
             memory-backend-file,id=ram,size=67108864,mem-path=/proc/self/fd/7,share=on,\
             x-use-canonical-path-for-ramblock-id=on -machine memory-backend=ram"
        );
        let full = words(
            "qemu -m 64 -incoming defer -object memory-backend-file,id=ram,size=64M,share=on,mem-path=/dev/shm",
        );
        let plan = Additions::plan(&full, &blocks).unwrap();
        assert!(plan.ram.is_none() && !plan.incoming);
    }

    #[test]
    fn a_plain_block_name_is_kept_plain() {
        let blocks = [block("pc.ram")];
        let plain = words("qemu -m 64");
        let added = Additions::plan(&plain, &blocks)
            .unwrap()
            .arguments(Path::new("/q"), Some(3))
            .join(" ");
        assert!(
            added.contains("id=pc.ram,") && added.contains("ramblock-id=off"),
            "{added}"
        );
    }

    #[test]
    fn refuses_what_cannot_work() {
        let blocks = [block("/objects/ram")];
        for bad in ["qemu -daemonize", "qemu -incoming tcp:0:4444"] {
            assert!(Additions::plan(&words(bad), &blocks).is_err(), "{bad}");
        }
        let two = [block("/objects/a"), block("/objects/b")];
        assert!(Additions::plan(&words("qemu"), &two).is_err());
    }

    #[test]
    fn a_block_name_cannot_carry_options() {
        for name in [
            "ram,mem-path=/etc/passwd",
            "/objects/",
            "/objects/../x",
            "9ram",
            "a b",
        ] {
            assert!(
                Additions::plan(&words("qemu"), &[block(name)]).is_err(),
                "{name}"
            );
        }
    }

    #[test]
    fn a_program_that_ends_at_once_is_quoted() {
        let error = Launched::start("sh -c 'echo no such machine >&2; exit 3'", &[block("ram")])
            .map(drop)
            .unwrap_err();
        assert!(
            error.chain().contains("no such machine"),
            "{}",
            error.chain()
        );
    }
}
