//! The QMP commands that are used here, with the few fields of their answers that are read.
//!
//! The types generated in `qapi` follow one version of QEMU's schema to the letter, so that a newer
//! (or older) QEMU's answer does not parse: `query-machines` of 7.2 lacks a field that is
//! mandatory there, `query-migrate-capabilities` knows names that the other does not. The types
//! here take what they need as strings and ignore the rest. This file must never hold logic.

use qapi::{Any, Command};
use serde::{Deserialize, Serialize};

/// An answer whose contents do not matter (`{}`, or `""` of the human monitor).
pub type Ignored = Any;

/// Declares a command and the type of its answer.
macro_rules! command {
    (
        $(#[$doc:meta])*
        $name:ident = $wire:literal -> $ok:ty {
            $($(#[$field_doc:meta])* $field:ident: $ty:ty),* $(,)?
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $ty),*
        }

        impl Command for $name {
            type Ok = $ok;
            const NAME: &'static str = $wire;
            const ALLOW_OOB: bool = false;
        }
    };
}

pub(crate) use command;

command! {
    /// Stops the vCPUs and drains the I/O.
    Stop = "stop" -> Ignored {}
}
command! {
    /// Runs the vCPUs.
    Cont = "cont" -> Ignored {}
}
command! {
    /// Ends QEMU.
    Quit = "quit" -> Ignored {}
}
command! {
    /// Keeps the descriptor that came with this command under a name.
    GetFd = "getfd" -> Ignored {
        /// The name.
        fdname: String,
    }
}
command! {
    /// Closes a descriptor kept by `getfd`.
    CloseFd = "closefd" -> Ignored {
        /// Its name.
        fdname: String,
    }
}
command! {
    /// Whether the guest runs.
    QueryStatus = "query-status" -> Status {}
}
command! {
    /// The vCPUs and their threads.
    QueryCpusFast = "query-cpus-fast" -> Vec<Cpu> {}
}
command! {
    /// The memory backends.
    QueryMemdev = "query-memdev" -> Vec<Memdev> {}
}
command! {
    /// The instruction set.
    QueryTarget = "query-target" -> Target {}
}
command! {
    /// Whether KVM is used.
    QueryKvm = "query-kvm" -> Kvm {}
}
command! {
    /// The guest's name (`-name`).
    QueryName = "query-name" -> Name {}
}
command! {
    /// The block devices.
    QueryBlock = "query-block" -> Vec<BlockDevice> {}
}
command! {
    /// Initial and hot-plugged memory.
    QueryMemorySizeSummary = "query-memory-size-summary" -> MemorySize {}
}
command! {
    /// Children and properties of an object.
    QomList = "qom-list" -> Vec<Property> {
        /// Its path in the object tree.
        path: String,
    }
}
command! {
    /// The value of a property.
    QomGet = "qom-get" -> Any {
        /// The object's path in the object tree.
        path: String,
        /// The property's name.
        property: String,
    }
}
command! {
    /// A command of the human monitor, for the few facts that QMP does not give.
    HumanMonitorCommand = "human-monitor-command" -> String {
        /// The command.
        #[serde(rename = "command-line")]
        command_line: String,
    }
}
command! {
    /// The migration capabilities and whether they are on.
    QueryMigrateCapabilities = "query-migrate-capabilities" -> Vec<Capability> {}
}
command! {
    /// Turns migration capabilities on or off.
    MigrateSetCapabilities = "migrate-set-capabilities" -> Ignored {
        /// Those to change.
        capabilities: Vec<Capability>,
    }
}
command! {
    /// Sends the guest away.
    Migrate = "migrate" -> Ignored {
        /// Where to, `fd:NAME` here.
        uri: String,
    }
}
command! {
    /// Gives a migration up.
    MigrateCancel = "migrate_cancel" -> Ignored {}
}
command! {
    /// Lets a guest in, in a QEMU that was started with `-incoming defer`.
    MigrateIncoming = "migrate-incoming" -> Ignored {
        /// Where from, `fd:NAME` here.
        uri: String,
        /// Whether QEMU exits when the state cannot be loaded; QEMU 9.1 and later.
        #[serde(skip_serializing_if = "Option::is_none")]
        exit_on_error: Option<bool>,
    }
}
command! {
    /// How far a migration is.
    QueryMigrate = "query-migrate" -> Migration {}
}

/// Answer to [`QueryStatus`].
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// The run state, `running`, `paused`, `inmigrate`, `postmigrate` …
    pub status: String,
}

/// One vCPU.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cpu {
    /// Its number.
    #[serde(rename = "cpu-index")]
    pub index: u32,
    /// Its path in the object tree.
    pub qom_path: String,
    /// The id of its thread, as QEMU sees it.
    pub thread_id: i32,
}

/// One memory backend.
#[derive(Clone, Debug, Deserialize)]
pub struct Memdev {
    /// Its id; absent for a backend without a place in the object tree.
    pub id: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it is mapped shared.
    pub share: bool,
    /// Whether its memory is populated at the start.
    #[serde(default)]
    pub prealloc: bool,
}

/// Answer to [`QueryTarget`].
#[derive(Clone, Debug, Deserialize)]
pub struct Target {
    /// The instruction set, `x86_64`.
    pub arch: String,
}

/// Answer to [`QueryKvm`].
#[derive(Clone, Debug, Deserialize)]
pub struct Kvm {
    /// Whether this guest runs under KVM.
    pub enabled: bool,
}

/// Answer to [`QueryName`].
#[derive(Clone, Debug, Deserialize)]
pub struct Name {
    /// The name, if one was given.
    pub name: Option<String>,
}

/// One block device.
#[derive(Clone, Debug, Deserialize)]
pub struct BlockDevice {
    /// Its name; empty for `-blockdev` nodes.
    #[serde(default)]
    pub device: String,
    /// What is inserted, if anything.
    pub inserted: Option<InsertedMedium>,
    /// Where the device is in the object tree.
    pub qdev: Option<String>,
}

/// The medium of a [`BlockDevice`].
#[derive(Clone, Debug, Deserialize)]
pub struct InsertedMedium {
    /// Its file.
    #[serde(default)]
    pub file: String,
    /// Whether it is read-only.
    #[serde(default)]
    pub ro: bool,
}

/// Answer to [`QueryMemorySizeSummary`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemorySize {
    /// Memory that the guest started with, in bytes.
    pub base_memory: u64,
    /// Memory that was plugged later, in bytes.
    pub plugged_memory: Option<u64>,
}

/// A child or property of an object.
#[derive(Clone, Debug, Deserialize)]
pub struct Property {
    /// Its name.
    pub name: String,
    /// Its type; `child<TYPE>` for a child.
    #[serde(rename = "type")]
    pub kind: String,
}

/// A migration capability.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// Its name.
    pub capability: String,
    /// Whether it is on.
    pub state: bool,
}

/// Answer to [`QueryMigrate`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Migration {
    /// `setup`, `active`, `device`, `completed`, `failed`, `cancelled` …; absent before the first.
    pub status: Option<String>,
    /// What went wrong.
    pub error_desc: Option<String>,
    /// Why the guest may not be migrated at all.
    #[serde(default)]
    pub blocked_reasons: Vec<String>,
}
