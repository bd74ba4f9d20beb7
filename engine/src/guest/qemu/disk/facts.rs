//! Which disks a guest has and what becomes of each when the guest moves: asked of QEMU, decided by what
//! the operator chose. It only asks and changes nothing.

use qapi::Any;

use super::choice::{DiskChoice, DiskTreatment};
use super::commands::{Device, Medium, QueryBlockDevices, QueryBlockJobs};
use super::{BLOCK_SIZE, NODE_PREFIX};
use crate::guest::qemu::commands::QomGet;
use crate::guest::qemu::preflight::{Finding, Level};
use crate::guest::qemu::qmp::{QemuVersion, Qmp, QmpError};
use crate::guest::{GuestError, GuestResult};

/// First QEMU that was seen to survive that an NBD client leaves a disk of an iothread: 7.2.22 dies by an
/// assertion, and the guest with it.
const IOTHREAD_EXPORTS: QemuVersion = QemuVersion {
    major: 10,
    minor: 0,
    micro: 0,
};

/// A disk of the guest, as the operator and the other side know it.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskFacts {
    /// What it is called: the id of its `-device`, else that of its `-drive`, else its node's name.
    pub name: String,
    /// What the guest sees of it, in bytes.
    pub bytes: u64,
    /// Format of the image, `raw` or `qcow2`.
    pub format: String,
    /// Whether the guest can only read it.
    pub read_only: bool,
    /// Its file, as QEMU names it.
    pub file: String,
    /// What the operator wants done with it.
    pub treatment: DiskTreatment,
}

impl DiskFacts {
    /// Number of blocks; the last may be shorter than the others.
    pub fn blocks(&self) -> u32 {
        // Checked when the disk was found.
        self.bytes.div_ceil(u64::from(BLOCK_SIZE)) as u32
    }
}

/// A disk and where it is in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Disk {
    /// What is known outside of QEMU.
    pub facts: DiskFacts,
    /// The device that uses it, as `query-block` names it.
    pub qdev: String,
    /// The node that the device uses.
    pub node: String,
    /// Whether it bypasses the host's page cache.
    pub direct: bool,
}

/// Every disk of the guest, with what becomes of it.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Those that move, by name.
    pub disks: Vec<Disk>,
    /// What was found, of those that do not move as well.
    pub findings: Vec<Finding>,
}

impl Survey {
    /// Asks QEMU. Fails only when QEMU does not answer; what stands in the way is a finding.
    pub fn read(qmp: &Qmp, choice: &DiskChoice) -> Result<Self, QmpError> {
        let jobs: Vec<String> = qmp
            .execute(&QueryBlockJobs {})?
            .into_iter()
            .map(|job| format!("{} '{}'", job.kind, job.device))
            .collect();
        let mut survey = Self::default();
        let mut names = Vec::new();
        for device in qmp.execute(&QueryBlockDevices {})? {
            let user = match &device.qdev {
                Some(qdev) => User {
                    kind: property(qmp, &object_path(qdev), "type")?.unwrap_or_default(),
                    deadly: qmp.version() < IOTHREAD_EXPORTS
                        && has_iothread(qmp, &object_path(qdev))?,
                },
                None => User::default(),
            };
            let name = name_of(&device);
            names.push(name.clone());
            survey.judge(name, device, &user, choice);
        }
        if !survey.disks.is_empty() && !jobs.is_empty() {
            survey.refuse(format!(
                "a block job runs ({}), which changes disks behind the back of a migration: wait \
                 for its end or cancel it (QMP block-job-cancel)",
                jobs.join(", ")
            ));
        }
        for name in choice.names() {
            if !names.iter().any(|known| known == name) {
                survey.refuse(format!(
                    "--disk names '{name}', which the guest does not have; it has {}",
                    names.join(", ")
                ));
            }
        }
        survey.disks.sort_by(|a, b| a.facts.name.cmp(&b.facts.name));
        let doubled = survey
            .disks
            .windows(2)
            .find(|pair| pair[0].facts.name == pair[1].facts.name)
            .map(|pair| pair[0].facts.name.clone());
        if let Some(name) = doubled {
            survey.refuse(format!(
                "two disks are called '{name}': give each -device an id of its own"
            ));
        }
        Ok(survey)
    }

    /// An error that names everything that stands in the way, if anything does.
    pub fn require(&self) -> GuestResult<()> {
        let reasons: Vec<&str> = self
            .findings
            .iter()
            .filter(|finding| finding.level == Level::Refuse)
            .map(|finding| finding.text.as_str())
            .collect();
        if reasons.is_empty() {
            Ok(())
        } else {
            Err(GuestError::new(format!(
                "the guest's disks cannot be moved: {}",
                reasons.join("; ")
            )))
        }
    }

    fn judge(&mut self, name: String, device: Device, user: &User, choice: &DiskChoice) {
        let Some(medium) = device.inserted else {
            return self.note(Level::Ok, format!("drive '{name}' is empty"));
        };
        let what = describe(&name, &medium);
        if medium.ro {
            return self.note(
                Level::Note,
                format!("{what} is read-only and not moved: the destination needs the same"),
            );
        }
        if user.kind.starts_with("cfi.pflash") {
            return self.note(
                Level::Note,
                format!(
                    "{what} is flash memory, whose contents travel with the device state: the \
                     destination needs a file of the same size, and QEMU writes it there"
                ),
            );
        }
        let Some(qdev) = device.qdev else {
            return self.note(
                Level::Note,
                format!("{what} is used by no device of the guest and not moved"),
            );
        };
        let treatment = choice.of(&name);
        if treatment == DiskTreatment::Skip {
            return self.note(
                Level::Note,
                format!("{what} is not moved, as told: both hosts must reach the same storage"),
            );
        }
        let skip = format!("leave it out with --disk {name}=skip if both hosts reach its storage");
        if let Some(why) = why_immovable(&medium, user) {
            return self.refuse(format!("{what} {why}, or {skip}"));
        }
        let Some(node) = medium.node_name.clone() else {
            return self.refuse(format!("{what} has no node in QEMU's block graph: {skip}"));
        };
        let snapshots = medium.image.snapshots.len();
        if snapshots > 0 {
            self.note(
                Level::Note,
                format!(
                    "{what} has {snapshots} snapshots inside, which stay behind: only what the \
                     guest sees is moved"
                ),
            );
        }
        self.note(Level::Ok, format!("{what} is moved"));
        self.disks.push(Disk {
            facts: DiskFacts {
                name,
                bytes: medium.image.virtual_size,
                format: medium.drv,
                read_only: false,
                file: medium.file,
                treatment,
            },
            qdev,
            node,
            direct: medium.cache.is_some_and(|cache| cache.direct),
        });
    }

    fn refuse(&mut self, text: String) {
        self.note(Level::Refuse, text);
    }

    fn note(&mut self, level: Level, text: String) {
        self.findings.push(Finding { level, text });
    }
}

/// Why a disk keeps the guest from moving, with what to do about it.
fn why_immovable(medium: &Medium, user: &User) -> Option<String> {
    if let kind @ ("scsi-block" | "scsi-generic") = user.kind.as_str() {
        return Some(format!(
            "is a SCSI device passed through ({kind}), whose writes QEMU does not see: use scsi-hd"
        ));
    }
    if user.deadly {
        return Some(format!(
            "is used by an iothread, and QEMU before {IOTHREAD_EXPORTS} dies when such a disk has \
             been read over NBD: use a newer QEMU, or no iothread for this disk"
        ));
    }
    if medium.drv == "luks" {
        return Some(
            "is encrypted by QEMU and would arrive in the clear: encrypt inside the guest"
                .to_owned(),
        );
    }
    if is_ours(medium) {
        return Some(
            "has not arrived here completely, from the migration that brought the guest: wait for \
             its end"
                .to_owned(),
        );
    }
    let blocks = medium.image.virtual_size.div_ceil(u64::from(BLOCK_SIZE));
    match medium.image.virtual_size {
        0 => Some("has no size: enlarge it (QMP block_resize)".to_owned()),
        _ if blocks > u64::from(u32::MAX) => Some(format!(
            "is larger than {} TiB: copy it by other means",
            (u64::from(u32::MAX) * u64::from(BLOCK_SIZE)) >> 40
        )),
        _ => None,
    }
}

/// Whether a migration to here still pages the disk.
pub fn is_ours(medium: &Medium) -> bool {
    medium
        .node_name
        .as_deref()
        .is_some_and(|node| node.starts_with(NODE_PREFIX))
}

fn describe(name: &str, medium: &Medium) -> String {
    format!(
        "disk '{name}' ({} MiB, {}, {})",
        medium.image.virtual_size.div_ceil(1 << 20),
        medium.drv,
        medium.file
    )
}

/// Where a device is in the object tree. QEMU names it by its id if it has one of its own (a SCSI disk), by
/// its path if not (the inner part of a virtio device).
pub fn object_path(qdev: &str) -> String {
    if qdev.starts_with('/') {
        qdev.to_owned()
    } else {
        format!("/machine/peripheral/{qdev}")
    }
}

/// What an operator, and the other side, call the drive of a device.
pub fn name_of(device: &Device) -> String {
    let path = device.qdev.as_deref().map(object_path).unwrap_or_default();
    if let Some(rest) = path.strip_prefix("/machine/peripheral/") {
        return rest.split('/').next().unwrap_or(rest).to_owned();
    }
    if !device.name.is_empty() {
        return device.name.clone();
    }
    let node = device
        .inserted
        .as_ref()
        .and_then(|medium| medium.node_name.as_deref())
        // A name that QEMU made up is another in every QEMU.
        .filter(|node| !node.starts_with('#') && !node.starts_with(NODE_PREFIX));
    node.unwrap_or(path.trim_start_matches("/machine/"))
        .to_owned()
}

/// The device that uses a disk.
#[derive(Default)]
struct User {
    /// Its type, `virtio-blk-device`.
    kind: String,
    /// Whether this QEMU would not survive that the disk is exported.
    deadly: bool,
}

/// Whether a device, or the controller that it hangs on, has threads of its own for I/O.
fn has_iothread(qmp: &Qmp, path: &str) -> Result<bool, QmpError> {
    let bus = property(qmp, path, "parent_bus")?.unwrap_or_default();
    let controller = bus
        .rsplit_once('/')
        .map_or("", |(controller, _)| controller);
    for path in [path, controller] {
        let thread = property(qmp, path, "iothread")?.unwrap_or_default();
        let mapping = value(qmp, path, "iothread-vq-mapping")?.unwrap_or_default();
        if !thread.is_empty() || mapping.as_array().is_some_and(|queues| !queues.is_empty()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A property that is a text; `None` if the object has none of this name.
fn property(qmp: &Qmp, path: &str, name: &str) -> Result<Option<String>, QmpError> {
    let value = value(qmp, path, name)?;
    Ok(value.and_then(|value| value.as_str().map(str::to_owned)))
}

/// The value of a property; `None` if there is no such object or property.
fn value(qmp: &Qmp, path: &str, name: &str) -> Result<Option<Any>, QmpError> {
    match qmp.execute(&QomGet {
        path: path.to_owned(),
        property: name.to_owned(),
    }) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_refusal() => Ok(None),
        Err(error) => Err(error),
    }
}
