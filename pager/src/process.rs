//! What `/proc` tells about the guest's process: where it maps a RAM file, which threads it has,
//! which userfaultfds it holds. Reads only.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

use crate::{PAGE_SIZE, PagerError, RegionMemory, Result};

/// One region as the guest's process sees it.
#[derive(Clone, Debug)]
pub struct Region {
    /// The region's file; its index is [`RegionMemory::region`].
    pub memory: Arc<RegionMemory>,
    /// Where the guest's process maps it. Together they must cover the region; a block may be
    /// mapped more than once.
    pub mappings: Vec<Mapping>,
}

impl Region {
    /// Finds the mappings of `memory` in process `pid`.
    pub fn find(pid: u32, memory: Arc<RegionMemory>) -> Result<Self> {
        let mappings = find_mappings(pid, &memory)?;
        Ok(Self { memory, mappings })
    }

    /// The region's index.
    pub fn index(&self) -> u16 {
        self.memory.region()
    }
}

/// A run of blocks mapped at consecutive addresses of the guest's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Address of the first block.
    pub address: u64,
    /// First block of the region that is mapped here.
    pub first: u32,
    /// Number of blocks.
    pub count: u32,
}

impl Mapping {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        u64::from(self.count) * PAGE_SIZE as u64
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// First address behind the mapping.
    pub fn end(&self) -> u64 {
        self.address + self.len()
    }

    /// Address of `block`, if it is mapped here.
    pub fn address_of(&self, block: u32) -> Option<u64> {
        let index = block.checked_sub(self.first)?;
        (index < self.count).then(|| self.address + u64::from(index) * PAGE_SIZE as u64)
    }

    /// Block at `address`, if it lies here.
    pub fn block_at(&self, address: u64) -> Option<u32> {
        let index = address.checked_sub(self.address)? / PAGE_SIZE as u64;
        (index < u64::from(self.count)).then(|| self.first + index as u32)
    }
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapsEntry {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Mapped executable.
    pub executable: bool,
    /// Mapped shared.
    pub shared: bool,
    /// Offset into the file, in bytes.
    pub offset: u64,
    /// Major and minor number of the file's device.
    pub device: (u32, u32),
    /// Inode of the file; 0 for none.
    pub inode: u64,
    /// Path or pseudo-path, as printed.
    pub path: String,
}

/// Parses `/proc/PID/maps`. A line that is not of the form that the kernel documents (proc(5)) is
/// an error: silently overlooking a mapping would be worse.
pub fn parse_maps(text: &str) -> std::result::Result<Vec<MapsEntry>, String> {
    text.lines()
        .map(|line| parse_maps_line(line).ok_or_else(|| format!("unexpected line {line:?}")))
        .collect()
}

fn parse_maps_line(line: &str) -> Option<MapsEntry> {
    let mut rest = line;
    let mut field = || {
        rest = rest.trim_start_matches(' ');
        let (head, tail) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = tail;
        (!head.is_empty()).then_some(head)
    };
    let (start, end) = field()?.split_once('-')?;
    let permissions = field()?.as_bytes();
    let offset = field()?;
    let (major, minor) = field()?.split_once(':')?;
    let inode = field()?;
    let (start, end) = (hex(start)?, hex(end)?);
    if permissions.len() != 4 || end <= start {
        return None;
    }
    Some(MapsEntry {
        start,
        end,
        executable: permissions[2] == b'x',
        shared: permissions[3] == b's',
        offset: hex(offset)?,
        device: (
            u32::try_from(hex(major)?).ok()?,
            u32::try_from(hex(minor)?).ok()?,
        ),
        inode: inode.parse().ok()?,
        path: rest.trim_start_matches(' ').to_owned(),
    })
}

fn hex(text: &str) -> Option<u64> {
    // `from_str_radix` would take a sign.
    text.bytes()
        .all(|byte| byte.is_ascii_hexdigit())
        .then(|| u64::from_str_radix(text, 16).ok())?
}

/// Reads and parses the mappings of a process.
pub fn maps(pid: u32) -> Result<Vec<MapsEntry>> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read_to_string(&path).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => PagerError::GuestGone { pid },
        _ => PagerError::os(format!("reading {path}"), error),
    })?;
    parse_maps(&text).map_err(|what| PagerError::Attach {
        pid,
        reason: format!("{path}: {what}"),
    })
}

/// Where process `pid` maps the file of `memory`, found by device and inode. Every block of the
/// region must be mapped, and shared.
pub fn find_mappings(pid: u32, memory: &RegionMemory) -> Result<Vec<Mapping>> {
    let (dev, inode) = memory.identity()?;
    let device = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let mappings = region_mappings(&maps(pid)?, device, inode, memory)
        .map_err(|what| PagerError::NotMapped { pid, what })?;
    Ok(mappings)
}

fn region_mappings(
    entries: &[MapsEntry],
    device: (u32, u32),
    inode: u64,
    memory: &RegionMemory,
) -> std::result::Result<Vec<Mapping>, String> {
    const PAGE: u64 = PAGE_SIZE as u64;
    let (begin, end) = (memory.offset(), memory.offset() + memory.len());
    let mut found: Vec<Mapping> = Vec::new();
    for entry in entries {
        if entry.device != device || entry.inode != inode {
            continue;
        }
        let from = entry.offset.max(begin);
        let to = (entry.offset + (entry.end - entry.start)).min(end);
        if from >= to {
            continue;
        }
        if !entry.shared {
            return Err(format!(
                "its RAM file shared (private mapping at {:#x}): use share=on",
                entry.start
            ));
        }
        let mapping = Mapping {
            address: entry.start + (from - entry.offset),
            first: ((from - begin) / PAGE) as u32,
            count: ((to - from) / PAGE) as u32,
        };
        // The kernel splits a mapping where flags differ; to us it is still one.
        match found.last_mut() {
            Some(last)
                if last.end() == mapping.address && last.first + last.count == mapping.first =>
            {
                last.count += mapping.count;
            }
            _ => found.push(mapping),
        }
    }
    let mut covered: Vec<(u32, u32)> = found.iter().map(|map| (map.first, map.count)).collect();
    covered.sort_unstable();
    let reached = covered.iter().fold(0, |reached, &(first, count)| {
        if first <= reached {
            reached.max(first + count)
        } else {
            reached
        }
    });
    if reached < memory.blocks() {
        return Err(format!(
            "block {reached} of region {} (file inode {inode})",
            memory.region()
        ));
    }
    Ok(found)
}

/// A thread of the guest's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadInfo {
    /// Thread id.
    pub tid: u32,
    /// Its name (`comm`).
    pub name: String,
    /// Whether it sits in a system call just now.
    pub in_syscall: bool,
}

/// The threads of a process.
pub fn threads(pid: u32) -> Result<Vec<ThreadInfo>> {
    let path = format!("/proc/{pid}/task");
    let entries = fs::read_dir(&path).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => PagerError::GuestGone { pid },
        _ => PagerError::os(format!("listing {path}"), error),
    })?;
    let mut threads = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| PagerError::os(format!("listing {path}"), error))?;
        let Some(tid) = entry.file_name().to_str().and_then(|tid| tid.parse().ok()) else {
            continue;
        };
        // A thread that ends meanwhile is no thread.
        let Some(name) = thread_name(pid, tid) else {
            continue;
        };
        let in_syscall = fs::read_to_string(format!("{path}/{tid}/syscall"))
            .is_ok_and(|text| text.as_bytes().first().is_some_and(u8::is_ascii_digit));
        threads.push(ThreadInfo {
            tid,
            name,
            in_syscall,
        });
    }
    Ok(threads)
}

/// Name of a thread, if it exists.
pub fn thread_name(pid: u32, tid: u32) -> Option<String> {
    let mut name = fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).ok()?;
    name.truncate(name.trim_end().len());
    Some(name)
}

/// Numbers of the userfaultfds that process `pid` holds: how a new pager finds the copy that its
/// predecessor left in the guest.
pub fn find_userfaultfds(pid: u32) -> Result<Vec<RawFd>> {
    let path = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&path).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => PagerError::GuestGone { pid },
        _ => PagerError::os(format!("listing {path}"), error),
    })?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| PagerError::os(format!("listing {path}"), error))?;
        let is_uffd = fs::read_link(entry.path())
            .is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]");
        if let (true, Some(number)) = (
            is_uffd,
            entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok()),
        ) {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// A process that cannot be mistaken for a later one with the same id.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
}

impl Process {
    /// Opens a running process.
    pub fn open(pid: u32) -> Result<Self> {
        let raw = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(PagerError::GuestGone { pid })?;
        let pidfd =
            rustix::process::pidfd_open(raw, PidfdFlags::empty()).map_err(|error| match error {
                Errno::SRCH => PagerError::GuestGone { pid },
                _ => PagerError::os(format!("pidfd_open of process {pid}"), error),
            })?;
        Ok(Self { pid, pidfd })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// [`PagerError::GuestGone`] if it has ended (a zombie has).
    pub fn check_alive(&self) -> Result<()> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let zero = rustix::time::Timespec::default();
        match rustix::event::poll(&mut fds, Some(&zero)) {
            Ok(0) => Ok(()),
            Ok(_) => Err(PagerError::GuestGone { pid: self.pid }),
            Err(error) => Err(PagerError::os("poll of a pidfd", error)),
        }
    }

    /// Copies file descriptor `number` of the process into ours, close-on-exec.
    pub fn fetch_fd(&self, number: RawFd) -> Result<OwnedFd> {
        rustix::process::pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty()).map_err(
            |error| {
                PagerError::os(
                    format!("pidfd_getfd of descriptor {number} of process {}", self.pid),
                    error,
                )
            },
        )
    }
}

impl AsFd for Process {
    /// The pidfd: readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    const SAMPLE: &str = "\
7f0000000000-7f0000100000 rw-s 00001000 00:01 1234                       /memfd:guest (deleted)
7f0000100000-7f0000200000 r--p 00000000 fd:10 99  /lib/x y.so
7ffd1f5f2000-7ffd1f5f4000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
7f0000300000-7f0000301000 rw-p 00000000 00:00 0 
";

    #[test]
    fn maps_of_the_documented_form() {
        let entries = parse_maps(SAMPLE).unwrap();
        assert_eq!(entries.len(), 5);
        assert_eq!(entries[0].path, "/memfd:guest (deleted)");
        assert!(entries[0].shared && !entries[0].executable);
        assert_eq!((entries[0].offset, entries[0].inode), (0x1000, 1234));
        assert_eq!(entries[1].device, (0xfd, 0x10));
        assert_eq!(entries[1].path, "/lib/x y.so");
        assert!(entries[2].executable);
        assert_eq!(entries[4].path, "");
    }

    #[test]
    fn our_own_maps() {
        let entries = maps(std::process::id()).unwrap();
        assert!(entries.iter().any(|entry| entry.executable));
    }

    #[test]
    fn mappings_are_joined_clipped_and_complete() {
        let file = fs::File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(64 * 4096).unwrap();
        let memory = RegionMemory::open(file, 0, 8 * 4096, 16 * 4096).unwrap();
        let entry = |start: u64, pages: u64, offset: u64, shared| MapsEntry {
            start,
            end: start + pages * 4096,
            executable: false,
            shared,
            offset: offset * 4096,
            device: (0, 1),
            inode: 5,
            path: String::new(),
        };
        let find = |entries: &[MapsEntry]| region_mappings(entries, (0, 1), 5, &memory);
        // Two neighbouring pieces, reaching over both ends of the region, and an alias.
        let found = find(&[
            entry(0x10_0000, 10, 4, true),
            entry(0x10_0000 + 10 * 4096, 50, 14, true),
            entry(0x90_0000, 2, 9, true),
        ])
        .unwrap();
        assert_eq!(
            found,
            [
                Mapping {
                    address: 0x10_4000,
                    first: 0,
                    count: 16
                },
                Mapping {
                    address: 0x90_0000,
                    first: 1,
                    count: 2
                },
            ]
        );
        assert_eq!(found[1].address_of(2), Some(0x90_1000));
        assert_eq!(found[1].block_at(0x90_1fff), Some(2));
        assert_eq!(found[1].block_at(0x90_2000), None);
        assert_eq!(found[1].address_of(0), None);
        // A hole, a private mapping, no mapping at all.
        assert!(find(&[entry(0x10_0000, 10, 8, true), entry(0x90_0000, 5, 19, true)]).is_err());
        assert!(find(&[entry(0x10_0000, 16, 8, false)]).is_err());
        assert!(find(&[]).is_err());
    }

    #[test]
    fn a_process_that_ended_is_gone() {
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        child.wait().unwrap();
        assert!(matches!(
            process.check_alive(),
            Err(PagerError::GuestGone { .. })
        ));
        Process::open(std::process::id())
            .unwrap()
            .check_alive()
            .unwrap();
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,200}") {
            let _ = parse_maps(&text);
        }

        #[test]
        fn printed_entries_are_read_back(
            start in 0_u64..1 << 47, pages in 1_u64..1 << 20, offset: u32, inode: u64,
            major in 0_u32..1 << 12, minor in 0_u32..1 << 20, shared: bool, executable: bool,
            path in "(/[a-z (]{1,20}[a-z)])?",
        ) {
            let entry = MapsEntry {
                start, end: start + pages * 4096, executable, shared,
                offset: u64::from(offset) << 12, device: (major, minor), inode, path,
            };
            let line = format!(
                "{:08x}-{:08x} rw{}{} {:08x} {:02x}:{:02x} {} {:>20}",
                entry.start, entry.end,
                if executable { 'x' } else { '-' }, if shared { 's' } else { 'p' },
                entry.offset, major, minor, inode, entry.path,
            );
            prop_assert_eq!(parse_maps(&line), Ok(vec![entry]));
        }
    }
}
