//! Whether a guest can be moved, found out without touching it: QMP questions and `/proc` only.
//! `check`, `send` and `recv` all use [`inspect`], so that they find the same things and say them
//! in the same words. It must never change the guest, not even for a moment.

use std::fs::File;
use std::sync::Arc;

use hybridmig_pager::{PAGE_SIZE, RegionMemory, kernel};
use hybridmig_transport::message::{GuestDescription, RegionId, RegionInfo, RegionKind};

use super::facts::{Backend, QemuFacts};
use super::process::{FileKind, Mapping, QemuProcess};
use super::qmp::{QemuVersion, Qmp};
use crate::guest::{GuestError, GuestResult};

/// First QEMU whose `x-ignore-shared` skips only RAM in *named* files.
const NAMED_FILES_ONLY: QemuVersion = QemuVersion {
    major: 8,
    minor: 0,
    micro: 0,
};
/// First QEMU that is known to work.
const OLDEST_TRIED: QemuVersion = QemuVersion {
    major: 7,
    minor: 2,
    micro: 0,
};

/// How much a [`Finding`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it has to be.
    Ok,
    /// Works, but someone should know.
    Note,
    /// The guest cannot be moved like this.
    Refuse,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// What was found and, where it is refused, what to do about it.
    pub text: String,
}

/// Which end of a migration a QEMU is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its guest leaves.
    Source,
    /// It waits with `-incoming defer`.
    Destination,
}

/// A RAM backend and its file.
#[derive(Debug)]
pub struct RamFile {
    /// The backend.
    pub backend: Backend,
    /// Where QEMU maps it.
    pub mapping: Mapping,
    /// Its file, open for reading and writing.
    pub file: File,
}

/// What [`inspect`] found.
#[derive(Debug)]
pub struct Inspection {
    /// What QMP tells.
    pub facts: QemuFacts,
    /// The process; absent if it could not be found (that is then a refusal).
    pub process: Option<QemuProcess>,
    /// The RAM that can be paged. Complete unless there is a refusal.
    pub ram: Vec<RamFile>,
    /// Files that QEMU has open with O_DIRECT.
    pub direct_io: Vec<String>,
    /// Everything that was looked at, in the order of looking.
    pub findings: Vec<Finding>,
    socket: String,
}

impl Inspection {
    /// The texts of one level.
    pub fn texts(&self, level: Level) -> Vec<String> {
        self.findings
            .iter()
            .filter(|finding| finding.level == level)
            .map(|finding| finding.text.clone())
            .collect()
    }

    /// An error that names everything that stands in the way, if anything does.
    pub fn require(&self) -> GuestResult<()> {
        let reasons = self.texts(Level::Refuse);
        if reasons.is_empty() {
            Ok(())
        } else {
            Err(GuestError::new(format!(
                "the guest behind {} cannot be moved: {}",
                self.socket,
                reasons.join("; ")
            )))
        }
    }

    /// The guest, as the other side is told.
    pub fn describe(&self) -> GuestDescription {
        self.facts.describe(&self.socket)
    }

    /// The guest's regions: one for each RAM backend, in the order of their ids.
    pub fn regions(&self) -> Vec<RegionInfo> {
        self.ram
            .iter()
            .enumerate()
            .map(|(index, ram)| RegionInfo {
                id: RegionId(index as u16),
                kind: RegionKind::Memory,
                name: ram.backend.block_name(),
                blocks: (ram.backend.size / PAGE_SIZE as u64) as u32,
                block_size: PAGE_SIZE as u32,
            })
            .collect()
    }

    /// The memory of each region, by region. Takes the files.
    pub fn into_memory(self) -> GuestResult<Vec<Arc<RegionMemory>>> {
        self.ram
            .into_iter()
            .enumerate()
            .map(|(index, ram)| {
                RegionMemory::open(ram.file, index as u16, ram.mapping.offset, ram.backend.size)
                    .map(Arc::new)
                    .map_err(|error| {
                        GuestError::caused(
                            format!("cannot use the file of RAM backend '{}'", ram.backend.id),
                            error,
                        )
                    })
            })
            .collect()
    }

    fn add(&mut self, level: Level, text: impl Into<String>) {
        self.findings.push(Finding {
            level,
            text: text.into(),
        });
    }
}

/// Looks at everything that decides whether the guest behind `qmp` can be moved. Fails only when
/// QEMU does not answer; what stands in the way is a finding.
pub fn inspect(qmp: &Qmp, side: Side) -> GuestResult<Inspection> {
    let facts = QemuFacts::read(qmp)
        .map_err(|error| GuestError::caused("cannot ask QEMU about the guest", error))?;
    let mut inspection = Inspection {
        facts,
        process: None,
        ram: Vec::new(),
        direct_io: Vec::new(),
        findings: Vec::new(),
        socket: qmp.socket().display().to_string(),
    };
    check_version(&mut inspection);
    check_run_state(&mut inspection, side);
    check_kernel(&mut inspection, side);
    check_devices(&mut inspection);
    check_ram(&mut inspection, qmp);
    check_direct_io(&mut inspection, side);
    Ok(inspection)
}

fn check_version(inspection: &mut Inspection) {
    let facts = &inspection.facts;
    let text = format!(
        "QEMU {}, machine {}, CPU {} ({}), {} vCPUs, {} MiB",
        facts.version,
        facts.machine,
        facts.cpu,
        facts.accelerator(),
        facts.vcpus.len(),
        facts.ram >> 20
    );
    inspection.add(Level::Ok, text);
    if inspection.facts.version < OLDEST_TRIED {
        let text = format!(
            "QEMU {} is older than any that was tried ({OLDEST_TRIED})",
            inspection.facts.version
        );
        inspection.add(Level::Note, text);
    }
}

fn check_run_state(inspection: &mut Inspection, side: Side) {
    let status = inspection.facts.status.clone();
    match (side, status.as_str()) {
        (Side::Source, "running") => inspection.add(Level::Ok, "the guest runs"),
        (Side::Source, "postmigrate") => inspection.add(
            Level::Refuse,
            "the guest has already been migrated away (run state postmigrate); if it did not \
             arrive there, `hybridmig resolve` tells what is known",
        ),
        (Side::Source, "inmigrate") => inspection.add(
            Level::Refuse,
            "this QEMU waits for an incoming guest (run state inmigrate): it is a destination",
        ),
        (Side::Source, other) => inspection.add(
            Level::Refuse,
            format!("the guest does not run (run state {other}): run it first, QMP `cont`"),
        ),
        (Side::Destination, "inmigrate") => {
            inspection.add(Level::Ok, "QEMU waits for an incoming guest");
        }
        (Side::Destination, other) => inspection.add(
            Level::Refuse,
            format!(
                "QEMU does not wait for a guest (run state {other}): start it with -incoming defer"
            ),
        ),
    }
}

fn check_kernel(inspection: &mut Inspection, side: Side) {
    let support = kernel::probe();
    let result = match side {
        Side::Source => support.check_source(),
        Side::Destination => support.check_destination(),
    };
    match result {
        Ok(()) => inspection.add(
            Level::Ok,
            format!("Linux {} has what is needed", support.release),
        ),
        Err(error) => inspection.add(Level::Refuse, error.to_string()),
    }
}

fn check_devices(inspection: &mut Inspection) {
    for reason in inspection.facts.blocked_reasons.clone() {
        inspection.add(
            Level::Refuse,
            format!("QEMU itself refuses to migrate: {reason}"),
        );
    }
    for (name, kind) in inspection.facts.devices.clone() {
        if let Some(why) = why_immovable(&kind) {
            inspection.add(
                Level::Refuse,
                format!("device '{name}' ({kind}) {why}: unplug it first (QMP device_del)"),
            );
        }
    }
    let network = inspection.facts.network.clone();
    for line in network.lines() {
        for backend in ["vhost-user", "vhost-vdpa"] {
            if line.contains(&format!("type={backend}")) {
                let name = line.trim().trim_start_matches("\\ ");
                let name = name.split(':').next().unwrap_or(name);
                inspection.add(
                    Level::Refuse,
                    format!(
                        "network back end '{name}' is {backend}, which writes guest memory from \
                         outside QEMU: use -netdev tap (vhost=on is fine)"
                    ),
                );
            }
        }
    }
}

/// Why a device of this type keeps the guest from moving.
fn why_immovable(kind: &str) -> Option<&'static str> {
    if kind.starts_with("vfio-") {
        Some("passes a host device through, whose DMA cannot be tracked or paged")
    } else if kind.starts_with("vhost-user-") || kind.starts_with("vhost-vdpa-") {
        Some("writes guest memory from outside QEMU, which cannot be tracked or paged")
    } else if kind.starts_with("ivshmem-") {
        Some("shares memory with other guests of this host")
    } else {
        None
    }
}

fn check_ram(inspection: &mut Inspection, qmp: &Qmp) {
    if inspection.facts.backends.is_empty() {
        let text = no_backend(inspection.facts.ram);
        inspection.add(Level::Refuse, text);
        return;
    }
    let Some(vcpu) = inspection.facts.vcpus.first().map(|cpu| cpu.thread_id) else {
        inspection.add(Level::Refuse, "the guest has no vCPU");
        return;
    };
    let process = match QemuProcess::behind(qmp, vcpu) {
        Ok(process) => process,
        Err(error) => {
            inspection.add(Level::Refuse, error.chain());
            return;
        }
    };
    inspection.process = Some(process);
    let mappings = match process.mappings() {
        Ok(mappings) => mappings,
        Err(error) => {
            inspection.add(
                Level::Refuse,
                format!(
                    "cannot look into QEMU (process {}): {error}; run hybridmig as root or with \
                     CAP_SYS_PTRACE",
                    process.pid
                ),
            );
            return;
        }
    };
    let version = inspection.facts.version;
    for backend in inspection.facts.backends.clone() {
        match ram_file(process, &backend, &mappings, version) {
            Ok(ram) => {
                inspection.add(
                    Level::Ok,
                    format!(
                        "RAM backend '{}': {} MiB, shared, {}",
                        backend.id,
                        backend.size >> 20,
                        ram.mapping.path
                    ),
                );
                inspection.ram.push(ram);
            }
            Err(why) => inspection.add(Level::Refuse, why),
        }
    }
    let total: u64 = inspection.facts.backends.iter().map(|b| b.size).sum();
    if total < inspection.facts.ram {
        let text = format!(
            "the guest has {} MiB but its RAM backends hold {} MiB: give all of it backends with \
             share=on",
            inspection.facts.ram >> 20,
            total >> 20
        );
        inspection.add(Level::Refuse, text);
    }
}

fn no_backend(ram: u64) -> String {
    format!(
        "the guest's RAM has no backend: start QEMU with {}",
        ram_options("ram", ram)
    )
}

/// The options that give a guest RAM that can be paged.
fn ram_options(id: &str, size: u64) -> String {
    format!(
        "-object memory-backend-file,id={id},size={}M,mem-path=/dev/shm,share=on -machine \
         memory-backend={id}",
        size >> 20
    )
}

fn ram_file(
    process: QemuProcess,
    backend: &Backend,
    mappings: &[Mapping],
    version: QemuVersion,
) -> Result<RamFile, String> {
    // A default backend has the machine's name for RAM, which no option can reuse.
    let id = if backend.kind == "memory-backend-ram" {
        "ram"
    } else {
        &backend.id
    };
    let remedy = ram_options(id, backend.size);
    let named = format!("RAM backend '{}'", backend.id);
    match backend.kind.as_str() {
        "memory-backend-file" => {}
        "memory-backend-memfd" if version < NAMED_FILES_ONLY => {}
        "memory-backend-memfd" => {
            return Err(format!(
                "{named} is a memfd, which QEMU {version} would send itself: start it with {remedy}"
            ));
        }
        other => {
            return Err(format!(
                "{named} ({other}) is private memory of QEMU: start it with {remedy}"
            ));
        }
    }
    if !backend.share {
        return Err(format!(
            "{named} is not shared (share=off): start QEMU with {remedy}"
        ));
    }
    if !backend.size.is_multiple_of(PAGE_SIZE as u64)
        || u32::try_from(backend.size / PAGE_SIZE as u64).is_err()
    {
        return Err(format!(
            "{named} has {} bytes: only whole pages, and less than 16 TiB, can be moved",
            backend.size
        ));
    }
    let mapping = process.mapping_of(backend, mappings)?;
    let file = process.open_mapped_file(&mapping).map_err(|error| {
        format!(
            "cannot open the file of {named} ({}): {error}; run hybridmig as root or as QEMU's user",
            mapping.path
        )
    })?;
    match QemuProcess::file_kind(&file) {
        Ok(FileKind::Shmem) => Ok(RamFile {
            backend: backend.clone(),
            mapping,
            file,
        }),
        Ok(FileKind::Hugetlbfs) => Err(format!(
            "{named} is in huge pages (hugetlbfs), which cannot be paged here: start QEMU with \
             {remedy}"
        )),
        Ok(FileKind::Other) => Err(format!(
            "{named} is in {}, which is neither tmpfs nor memfd, and only those can be paged: \
             start QEMU with {remedy}",
            mapping.path
        )),
        Err(error) => Err(format!(
            "cannot tell what file system {named} ({}) is in: {error}",
            mapping.path
        )),
    }
}

fn check_direct_io(inspection: &mut Inspection, side: Side) {
    let Some(process) = inspection.process else {
        return;
    };
    match process.direct_io_files() {
        Ok(files) => {
            if side == Side::Source && !files.is_empty() {
                inspection.add(
                    Level::Note,
                    format!(
                        "{} opened with O_DIRECT (cache=none): pages that it writes are sent \
                         again after a time of grace",
                        files.join(", ")
                    ),
                );
            }
            inspection.direct_io = files;
        }
        Err(error) => inspection.add(
            Level::Refuse,
            format!(
                "cannot see the open files of QEMU (process {}): {error}; run hybridmig as root or \
                 with CAP_SYS_PTRACE",
                process.pid
            ),
        ),
    }
}
