//! What QMP tells of a guest: machine, CPU, memory backends, devices, run state. It only asks and
//! changes nothing; what follows from the facts is the business of `preflight`.

use std::collections::BTreeMap;

use hybridmig_transport::message::GuestDescription;
use qapi::Any;

use super::commands::{
    BlockDevice, Cpu, HumanMonitorCommand, QomGet, QomList, QueryBlock, QueryCpusFast, QueryKvm,
    QueryMemdev, QueryMemorySizeSummary, QueryMigrate, QueryName, QueryStatus, QueryTarget,
};
use super::qmp::{QemuVersion, Qmp, QmpError};

/// Facts that must be equal on both sides, with the QEMU option that sets each.
pub const MUST_BE_EQUAL: &[(&str, &str)] = &[
    ("arch", "the qemu-system-… program"),
    ("machine", "-machine"),
    ("cpu", "-cpu"),
    ("vcpus", "-smp"),
    ("ram", "-m"),
    ("ram-blocks", "-object memory-backend-…"),
    ("devices", "-device"),
];

/// A memory backend of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its id, `ram` in `-object memory-backend-file,id=ram`.
    pub id: String,
    /// Its type, `memory-backend-file`.
    pub kind: String,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it is mapped shared.
    pub share: bool,
    /// Whether QEMU populates it at the start.
    pub prealloc: bool,
    /// Its file or the folder of its file.
    pub mem_path: Option<String>,
    /// Whether QEMU names it `/objects/ID` in its migration stream (or just `ID`): the names must
    /// be equal on both sides.
    pub canonical_name: bool,
}

impl Backend {
    /// Its name in QEMU's migration stream.
    pub fn block_name(&self) -> String {
        if self.canonical_name {
            format!("/objects/{}", self.id)
        } else {
            self.id.clone()
        }
    }
}

/// A disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The device or its place in the object tree.
    pub device: String,
    /// Its file.
    pub file: String,
    /// Whether the guest cannot write it.
    pub read_only: bool,
}

/// Everything that QMP tells of a guest.
#[derive(Clone, Debug)]
pub struct QemuFacts {
    /// QEMU's version.
    pub version: QemuVersion,
    /// The guest's name, if it was given one.
    pub name: Option<String>,
    /// Instruction set.
    pub arch: String,
    /// Machine type with its version, `pc-q35-7.2`.
    pub machine: String,
    /// Whether the guest runs under KVM (or is emulated by TCG).
    pub kvm: bool,
    /// CPU model.
    pub cpu: String,
    /// Hash of the CPUID words that the guest sees; absent where QEMU does not tell.
    pub cpu_features: Option<String>,
    /// The vCPUs.
    pub vcpus: Vec<Cpu>,
    /// Memory in bytes, plugged included.
    pub ram: u64,
    /// The memory backends, by id.
    pub backends: Vec<Backend>,
    /// Devices given by `-device` or hot-plugged: (name, type), by name.
    pub devices: Vec<(String, String)>,
    /// Disks with a medium.
    pub disks: Vec<Disk>,
    /// QEMU's own list of network back ends, as text.
    pub network: String,
    /// Run state.
    pub status: String,
    /// Why QEMU itself refuses to migrate.
    pub blocked_reasons: Vec<String>,
}

impl QemuFacts {
    /// Asks for all of them.
    pub fn read(qmp: &Qmp) -> Result<Self, QmpError> {
        let vcpus = qmp.execute(&QueryCpusFast {})?;
        let arch = qmp.execute(&QueryTarget {})?.arch;
        let (cpu, cpu_features) = match vcpus.first() {
            Some(first) => (
                type_name(qmp, &first.qom_path, &format!("-{arch}-cpu"))?,
                optional_property(qmp, &first.qom_path, "feature-words")?
                    .and_then(|words| feature_hash(&words)),
            ),
            None => ("none".to_owned(), None),
        };
        let memory = qmp.execute(&QueryMemorySizeSummary {})?;
        Ok(Self {
            version: qmp.version(),
            name: qmp.execute(&QueryName {})?.name,
            arch,
            machine: type_name(qmp, "/machine", "-machine")?,
            kvm: qmp.execute(&QueryKvm {})?.enabled,
            cpu,
            cpu_features,
            vcpus,
            ram: memory.base_memory + memory.plugged_memory.unwrap_or(0),
            backends: backends(qmp)?,
            devices: devices(qmp)?,
            disks: disks(qmp.execute(&QueryBlock {})?),
            // A QEMU built without networking has no such command.
            network: optional(qmp.execute(&HumanMonitorCommand {
                command_line: "info network".to_owned(),
            }))?
            .unwrap_or_default(),
            status: qmp.execute(&QueryStatus {})?.status,
            blocked_reasons: qmp.execute(&QueryMigrate {})?.blocked_reasons,
        })
    }

    /// `kvm` or `tcg`.
    pub fn accelerator(&self) -> &'static str {
        if self.kvm { "kvm" } else { "tcg" }
    }

    /// What the other side is told. Besides the facts of [`MUST_BE_EQUAL`] it holds some that are
    /// compared with more judgement.
    pub fn describe(&self, fallback_name: &str) -> GuestDescription {
        let blocks: Vec<String> = self
            .backends
            .iter()
            .map(|backend| format!("{}:{}", backend.block_name(), backend.size))
            .collect();
        let mut devices: Vec<&str> = self.devices.iter().map(|(_, kind)| kind.as_str()).collect();
        devices.sort_unstable();
        let mut facts = BTreeMap::from([
            ("arch".to_owned(), self.arch.clone()),
            ("machine".to_owned(), self.machine.clone()),
            ("cpu".to_owned(), self.cpu.clone()),
            ("vcpus".to_owned(), self.vcpus.len().to_string()),
            ("ram".to_owned(), self.ram.to_string()),
            ("ram-blocks".to_owned(), blocks.join(",")),
            ("devices".to_owned(), devices.join(",")),
            ("accelerator".to_owned(), self.accelerator().to_owned()),
            ("qemu".to_owned(), self.version.to_string()),
        ]);
        if let Some(features) = &self.cpu_features {
            facts.insert("cpu-features".to_owned(), features.clone());
        }
        GuestDescription {
            kind: "qemu".to_owned(),
            name: self
                .name
                .clone()
                .unwrap_or_else(|| fallback_name.to_owned()),
            facts,
        }
    }
}

/// Name of the fact that tells a disk's length in bytes: its region tells blocks only.
pub fn disk_fact(name: &str) -> String {
    format!("disk-bytes:{name}")
}

/// A refusal (no such object, property or command in this QEMU) is no answer; all else is an error.
fn optional<T>(result: Result<T, QmpError>) -> Result<Option<T>, QmpError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_refusal() => Ok(None),
        Err(error) => Err(error),
    }
}

fn optional_property(qmp: &Qmp, path: &str, property: &str) -> Result<Option<Any>, QmpError> {
    optional(qmp.execute(&QomGet {
        path: path.to_owned(),
        property: property.to_owned(),
    }))
}

/// The type of an object, without what every type of its family ends in.
fn type_name(qmp: &Qmp, path: &str, suffix: &str) -> Result<String, QmpError> {
    let value = qmp.execute(&QomGet {
        path: path.to_owned(),
        property: "type".to_owned(),
    })?;
    let name = value.as_str().unwrap_or_default();
    Ok(name.strip_suffix(suffix).unwrap_or(name).to_owned())
}

/// A short hash of the CPUID words that are not zero: a newer QEMU lists more of them, and those
/// that it adds for an older machine type are zero.
fn feature_hash(words: &Any) -> Option<String> {
    let mut set: Vec<String> = words
        .as_array()?
        .iter()
        .filter(|word| word.get("features").and_then(Any::as_u64) != Some(0))
        .map(Any::to_string)
        .collect();
    set.sort_unstable();
    let hash = blake3::hash(set.join("\n").as_bytes());
    Some(hash.to_hex()[..16].to_owned())
}

fn backends(qmp: &Qmp) -> Result<Vec<Backend>, QmpError> {
    let kinds: BTreeMap<String, String> = children(qmp, "/objects")?.into_iter().collect();
    let mut backends = Vec::new();
    for memdev in qmp.execute(&QueryMemdev {})? {
        let id = memdev.id.unwrap_or_default();
        let path = format!("/objects/{id}");
        backends.push(Backend {
            kind: kinds.get(&id).cloned().unwrap_or_default(),
            size: memdev.size,
            share: memdev.share,
            prealloc: memdev.prealloc,
            mem_path: optional_property(qmp, &path, "mem-path")?
                .and_then(|value| value.as_str().map(str::to_owned)),
            canonical_name: optional_property(qmp, &path, "x-use-canonical-path-for-ramblock-id")?
                .and_then(|value| value.as_bool())
                .unwrap_or(false),
            id,
        });
    }
    backends.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(backends)
}

fn devices(qmp: &Qmp) -> Result<Vec<(String, String)>, QmpError> {
    let mut devices = children(qmp, "/machine/peripheral")?;
    devices.extend(children(qmp, "/machine/peripheral-anon")?);
    devices.sort();
    Ok(devices)
}

/// Children of a container: (name, type).
fn children(qmp: &Qmp, path: &str) -> Result<Vec<(String, String)>, QmpError> {
    let properties = optional(qmp.execute(&QomList {
        path: path.to_owned(),
    }))?;
    Ok(properties
        .unwrap_or_default()
        .into_iter()
        .filter_map(|property| {
            let kind = property.kind.strip_prefix("child<")?.strip_suffix('>')?;
            Some((property.name, kind.to_owned()))
        })
        .collect())
}

fn disks(devices: Vec<BlockDevice>) -> Vec<Disk> {
    devices
        .into_iter()
        .filter_map(|device| {
            let medium = device.inserted?;
            Some(Disk {
                device: if device.device.is_empty() {
                    device.qdev.unwrap_or_default()
                } else {
                    device.device
                },
                file: medium.file,
                read_only: medium.ro,
            })
        })
        .collect()
}
