//! What `/proc` tells of a QEMU process: which process is behind a QMP socket, where its RAM
//! backends are mapped, which of its files bypass the page cache. It only reads, and opens the
//! RAM files; it must never guess: a backend that could be one of two mappings is an error.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hybridmig_pager::PagerError;
use hybridmig_pager::process::{self, MapsEntry};
use serde::{Deserialize, Serialize};

use super::facts::Backend;
use super::qmp::Qmp;
use crate::guest::GuestError;

const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// A stretch of a process's address space that maps one file without a gap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Offset into the file in bytes.
    pub offset: u64,
    /// Whether writes reach the file.
    pub shared: bool,
    /// Device number of the file's file system.
    pub device: (u32, u32),
    /// Inode number of the file.
    pub inode: u64,
    /// The file's name as the kernel has it.
    pub path: String,
    /// End of the first of the kernel's areas that make it up: `map_files` is named by areas.
    first_area_end: u64,
}

impl Mapping {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Never true: the kernel has no empty areas.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

/// What kind of file memory is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// tmpfs or memfd: can be paged.
    Shmem,
    /// Huge pages.
    Hugetlbfs,
    /// Some other file system.
    Other,
}

/// A running QEMU, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuProcess {
    /// Its process id.
    pub pid: i32,
}

impl QemuProcess {
    /// Finds the process behind a monitor by one of its vCPU threads. The process that listens on
    /// the socket is taken if it has that thread; when a manager has opened the socket for QEMU,
    /// the owner of the thread is.
    pub fn behind(qmp: &Qmp, vcpu_thread: i32) -> Result<Self, GuestError> {
        let has_thread = |pid: &i32| Path::new(&format!("/proc/{pid}/task/{vcpu_thread}")).exists();
        if let Some(pid) = qmp.peer_pid().filter(has_thread) {
            return Ok(Self { pid });
        }
        match thread_group(vcpu_thread) {
            Some(pid) if is_qemu(pid) => Ok(Self { pid }),
            _ => Err(GuestError::new(format!(
                "cannot find the process of the QEMU behind {}: process {} listens on the socket, \
                 vCPU 0 is thread {vcpu_thread}, and no QEMU here has both; run hybridmig on the \
                 same host and in the same PID namespace as QEMU",
                qmp.socket().display(),
                qmp.peer_pid().map_or("?".to_owned(), |pid| pid.to_string()),
            ))),
        }
    }

    /// Its file mappings, areas that continue each other joined.
    pub fn mappings(self) -> Result<Vec<Mapping>, PagerError> {
        Ok(join(process::maps(self.pid as u32)?))
    }

    /// Where a shared backend is mapped, or why that cannot be told.
    pub fn mapping_of(self, backend: &Backend, mappings: &[Mapping]) -> Result<Mapping, String> {
        let known_file = backend
            .mem_path
            .as_deref()
            .and_then(|path| self.identity(path));
        let fits = |mapping: &&Mapping| {
            mapping.shared
                && mapping.len() >= backend.size
                && match (&known_file, &backend.mem_path) {
                    (Some(identity), _) => (mapping.device, mapping.inode) == *identity,
                    // A folder: QEMU makes a file there and unlinks it.
                    (None, Some(_)) => mapping
                        .path
                        .contains(&format!("qemu_back_mem.{}.", backend.id)),
                    (None, None) => mapping.path.starts_with("/memfd:memory-backend-memfd"),
                }
        };
        let mut candidates: Vec<&Mapping> = mappings.iter().filter(fits).collect();
        if candidates.is_empty() && backend.mem_path.as_deref().is_some_and(is_descriptor) {
            // The inherited descriptor was closed after QEMU had opened it again by name.
            candidates = mappings
                .iter()
                .filter(|mapping| mapping.shared && mapping.path.starts_with("/memfd:"))
                .filter(|mapping| mapping.len() == backend.size)
                .collect();
        }
        if candidates.len() > 1 {
            candidates.retain(|mapping| mapping.len() == backend.size);
        }
        match candidates[..] {
            [one] => Ok(one.clone()),
            [] => Err(format!(
                "RAM backend '{}' ({} MiB) has no shared mapping in QEMU (process {}): it must be \
                 part of the machine, -machine memory-backend={} or -numa node,memdev={}",
                backend.id,
                backend.size >> 20,
                self.pid,
                backend.id,
                backend.id
            )),
            _ => Err(format!(
                "RAM backend '{}' ({} MiB) could be any of {} mappings of QEMU (process {}): give \
                 every backend a file of its own, -object memory-backend-file,id={},mem-path=FILE,…",
                backend.id,
                backend.size >> 20,
                candidates.len(),
                self.pid,
                backend.id
            )),
        }
    }

    /// Opens the file that a mapping is of: through a descriptor that QEMU holds, else through the
    /// mapping itself (which takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN).
    pub fn open_mapped_file(self, mapping: &Mapping) -> io::Result<File> {
        let options = {
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            options
        };
        let mut refused = None;
        for entry in fs::read_dir(self.proc("fd"))? {
            let path = entry?.path();
            let Ok(metadata) = fs::metadata(&path) else {
                continue; // closed meanwhile
            };
            if metadata.ino() == mapping.inode && device_of(&metadata) == mapping.device {
                match options.open(&path) {
                    Ok(file) => return Ok(file),
                    Err(error) => refused = Some(error),
                }
            }
        }
        let area = format!("map_files/{:x}-{:x}", mapping.start, mapping.first_area_end);
        options
            .open(self.proc(&area))
            .map_err(|error| refused.unwrap_or(error))
    }

    /// What kind of file system a file is in.
    pub fn file_kind(file: &File) -> io::Result<FileKind> {
        let magic = nix::sys::statfs::fstatfs(file)?.filesystem_type().0;
        Ok(match magic {
            HUGETLBFS_MAGIC => FileKind::Hugetlbfs,
            TMPFS_MAGIC => FileKind::Shmem,
            _ => FileKind::Other,
        })
    }

    /// Files that are open with O_DIRECT: their I/O reaches guest memory behind the back of dirty
    /// tracking.
    pub fn direct_io_files(self) -> io::Result<Vec<String>> {
        let mut files = HashSet::new();
        for entry in fs::read_dir(self.proc("fdinfo"))? {
            let entry = entry?;
            let Ok(info) = fs::read_to_string(entry.path()) else {
                continue; // closed meanwhile
            };
            if has_direct_io(&info) {
                let link = self.proc("fd").join(entry.file_name());
                files.insert(fs::read_link(link).map_or_else(
                    |_| format!("descriptor {}", entry.file_name().to_string_lossy()),
                    |target| target.display().to_string(),
                ));
            }
        }
        let mut files: Vec<String> = files.into_iter().collect();
        files.sort();
        Ok(files)
    }

    /// Whether the process still exists.
    pub fn is_alive(self) -> bool {
        // A process that has exited and was not waited for keeps its folder but has no memory.
        fs::read_to_string(self.proc("status")).is_ok_and(|status| status.contains("\nVmSize:"))
    }

    /// When it was started, in clock ticks since the host was (field 22 of proc(5) `stat`); `None`
    /// once it has ended.
    pub fn started(self) -> Option<u64> {
        let stat = fs::read_to_string(self.proc("stat")).ok()?;
        // The name, in parentheses, may contain anything.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        (state != "Z").then(|| fields.nth(18)?.parse().ok())?
    }

    fn proc(self, entry: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{entry}", self.pid))
    }

    /// Where we see a file that QEMU has opened by this name, from its root and its working directory.
    pub fn path_of(self, path: &str) -> PathBuf {
        if let Some(rest) = path.strip_prefix("/proc/self/") {
            self.proc(rest)
        } else if path.starts_with('/') {
            PathBuf::from(format!("/proc/{}/root{path}", self.pid))
        } else {
            self.proc("cwd").join(path)
        }
    }

    /// Device and inode of a file that QEMU has opened by this name; `None` for a folder or a file
    /// that is gone.
    fn identity(self, path: &str) -> Option<((u32, u32), u64)> {
        let metadata = fs::metadata(self.path_of(path)).ok()?;
        metadata
            .is_file()
            .then(|| (device_of(&metadata), metadata.ino()))
    }
}

fn is_descriptor(path: &str) -> bool {
    path.starts_with("/proc/self/fd/") || path.starts_with("/dev/fd/")
}

fn device_of(metadata: &fs::Metadata) -> (u32, u32) {
    let device = metadata.dev();
    (
        nix::sys::stat::major(device) as u32,
        nix::sys::stat::minor(device) as u32,
    )
}

fn thread_group(thread: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok()
}

fn is_qemu(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe"))
        .is_ok_and(|exe| exe.to_string_lossy().contains("qemu"))
}

fn has_direct_io(fdinfo: &str) -> bool {
    fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok())
        .is_some_and(|flags| flags & libc::O_DIRECT != 0)
}

/// Areas of files, those that continue each other joined.
fn join(areas: Vec<MapsEntry>) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for area in areas.into_iter().filter(|area| area.inode != 0) {
        match mappings.last_mut() {
            Some(last)
                if last.end == area.start
                    && last.inode == area.inode
                    && last.device == area.device
                    && last.shared == area.shared
                    && last.offset + last.len() == area.offset =>
            {
                last.end = area.end;
            }
            _ => mappings.push(Mapping {
                start: area.start,
                end: area.end,
                offset: area.offset,
                shared: area.shared,
                device: area.device,
                inode: area.inode,
                path: area.path,
                first_area_end: area.end,
            }),
        }
    }
    mappings
}
