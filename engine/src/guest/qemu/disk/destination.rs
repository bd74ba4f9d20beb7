//! The disks of a guest that comes. The operator's QEMU has its local images as usual; before the guest
//! runs, its devices are switched to a server of ours, and when every block is in the local image, back
//! again, under the running guest.
//!
//! ```text
//! device ── local (raw ── file)                                    before, and in the end
//! device ── hybridmig-disk-N (raw) ── hybridmig-nbd-N ~~ server    attached
//!           hybridmig-keep-N (raw, read-only) ── local
//! ```
//!
//! The operator's nodes stay as they were made, with all of their options: `hybridmig-keep-N` holds
//! them while no device does. With that they are opened but not written, and QEMU holds no lock on the
//! image; the server may. A node whose name QEMU made up cannot be reopened, which is why the
//! device's root is switched (`qom-set` of `drive`). The device must never get a node of another
//! thread than its own: QEMU 7.2 then hangs, and 10 dies. So `hybridmig-disk-N` begins above the local
//! node, and is switched (`blockdev-reopen`) between that and the server while it is the device's: QEMU
//! then moves what it gets into its thread.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qapi::Any;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::NODE_PREFIX;
use super::commands::{
    BlockdevAdd, BlockdevDel, BlockdevReopen, BlockdevSetActive, Device, Graph, Node, QomSet,
    QueryBlockDevices, QueryGraph, QueryNodes,
};
use super::facts::{is_ours, name_of, object_path};
use crate::guest::qemu::commands::QueryStatus;
use crate::guest::qemu::process::QemuProcess;
use crate::guest::qemu::qmp::{Qmp, QmpError};
use crate::guest::{GuestError, GuestResult};

/// How long the guest's I/O waits for a server that has gone, in seconds: a week. After that the guest
/// would see errors.
const RECONNECT_DELAY: u32 = 7 * 24 * 3600;
/// How long a switch may take: it drains the device, and QEMU's main loop may wait for a page.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(180);
/// More disks than any QEMU takes.
const MOST_DISKS: u32 = 1 << 16;
/// How many nodes of one device are looked at, one below the other.
const DEPTH: usize = 16;

/// A disk of the guest that comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedDisk {
    /// What it is called at the source.
    pub name: String,
    /// What the guest sees of it, in bytes.
    pub bytes: u64,
}

/// A disk of the QEMU that waits. Enough to let go of it from another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalDisk {
    /// What it is called.
    pub name: String,
    /// What the guest sees of it, in bytes.
    pub bytes: u64,
    /// The local image, a raw file, as we can open it.
    pub path: PathBuf,
    /// Whether QEMU opens it so that the page cache is bypassed.
    pub direct: bool,
    /// The device, as `query-block` names it.
    qdev: String,
    /// The operator's node.
    node: String,
    /// Tells our nodes of this disk from those of others.
    number: u32,
}

/// The disks of a QEMU that a guest comes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationDisks {
    disks: Vec<LocalDisk>,
}

impl DestinationDisks {
    /// Finds the disks that the guest needs, in the order in which it needs them. Refuses, by name,
    /// what is missing or cannot be switched. Changes nothing. Finds them as well when they are
    /// attached already, by a process that was killed.
    pub fn find(qmp: &Qmp, process: QemuProcess, wanted: &[WantedDisk]) -> GuestResult<Self> {
        let graph = BlockGraph::read(qmp)
            .map_err(|error| GuestError::caused("cannot ask QEMU about the disks", error))?;
        let mut disks: Vec<LocalDisk> = Vec::new();
        let mut reasons = Vec::new();
        for disk in wanted {
            match graph.find(process, disk, &disks) {
                Ok(found) => disks.push(found),
                Err(why) => reasons.push(why),
            }
        }
        if reasons.is_empty() {
            Ok(Self { disks })
        } else {
            Err(GuestError::new(reasons.join("; ")))
        }
    }

    /// The disks, in the order in which they were wanted.
    pub fn disks(&self) -> &[LocalDisk] {
        &self.disks
    }

    /// Whether the guest's device reads and writes our server.
    pub fn is_attached(&self, qmp: &Qmp, disk: usize) -> GuestResult<bool> {
        let disk = self.get(disk)?;
        let root = disk
            .root(qmp)
            .map_err(|error| disk.failed("cannot ask about", error))?;
        Ok(root.as_deref() == Some(disk.layer().as_str()))
    }

    /// Switches the guest's device to the export of the server at `socket`, which must answer. The
    /// guest must not run. From here on QEMU does not write the local image. A server that goes and
    /// comes back at the same path costs the guest time, not errors.
    pub fn attach(&self, qmp: &Qmp, disk: usize, socket: &Path, export: &str) -> GuestResult<()> {
        let disk = self.get(disk)?;
        let cannot = |error| disk.failed("cannot put our server under", error);
        let status = qmp.execute(&QueryStatus {}).map_err(cannot)?.status;
        if status == "running" {
            return Err(GuestError::new(format!(
                "the guest runs with its local image of disk '{}', which is not switched any more",
                disk.name
            )));
        }
        // What another process may have left.
        disk.let_go(qmp)?;
        let result = disk.switch(qmp, socket, export);
        result.map_err(|error| {
            let reach = error.to_string().contains("Permission denied");
            // What failed is said; what this finds to undo is less.
            if let Err(error) = disk.let_go(qmp) {
                tracing::warn!(error = error.chain(), "cannot undo a switch");
            }
            let error = cannot(error);
            if reach {
                GuestError::caused(
                    format!("QEMU's user has to be able to reach {}", socket.display()),
                    error,
                )
            } else {
                error
            }
        })
    }

    /// Switches the guest's device back to the local image, under the running guest if it runs, and
    /// removes every node of ours. The local image must be complete, and the server still answer: QEMU
    /// waits for what is under way. May be called again, and when nothing is attached.
    pub fn detach(&self, qmp: &Qmp, disk: usize) -> GuestResult<()> {
        self.get(disk)?.let_go(qmp)
    }

    fn get(&self, disk: usize) -> GuestResult<&LocalDisk> {
        self.disks
            .get(disk)
            .ok_or_else(|| GuestError::new(format!("the guest has no disk {disk}")))
    }
}

impl LocalDisk {
    fn layer(&self) -> String {
        format!("{NODE_PREFIX}disk-{}", self.number)
    }

    fn nbd(&self) -> String {
        format!("{NODE_PREFIX}nbd-{}", self.number)
    }

    fn keep(&self) -> String {
        format!("{NODE_PREFIX}keep-{}", self.number)
    }

    fn switch(&self, qmp: &Qmp, socket: &Path, export: &str) -> Result<(), QmpError> {
        add(
            qmp,
            json!({
                "driver": "raw",
                "node-name": self.keep(),
                "file": self.node,
                "read-only": true,
            }),
        )?;
        add(
            qmp,
            json!({
                "driver": "nbd",
                "node-name": self.nbd(),
                "server": { "type": "unix", "path": socket.to_string_lossy() },
                "export": export,
                "reconnect-delay": RECONNECT_DELAY,
                "discard": "unmap",
            }),
        )?;
        // First over the local node, whose thread it takes: the device's.
        add(qmp, self.layer_over(&self.node))?;
        self.set_root(qmp, &self.layer())?;
        self.reopen_over(qmp, &self.nbd())?;
        self.check_holder(qmp)
    }

    fn reopen_over(&self, qmp: &Qmp, node: &str) -> Result<(), QmpError> {
        let options = vec![self.layer_over(node)];
        qmp.execute_within(&BlockdevReopen { options }, SWITCH_TIMEOUT)
            .map(drop)
    }

    fn layer_over(&self, node: &str) -> Any {
        json!({
            "driver": "raw",
            "node-name": self.layer(),
            "file": node,
            "discard": "unmap",
        })
    }

    /// Makes sure that nobody but our own node holds the operator's.
    fn check_holder(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let graph = qmp.execute(&QueryGraph {})?;
        match other_parent(&graph, &self.node, &self.keep()) {
            None => Ok(()),
            Some(parent) => Err(QmpError::Refused {
                socket: qmp.socket().to_owned(),
                command: "qom-set",
                message: format!("'{parent}' uses the image '{}' as well", self.node),
            }),
        }
    }

    /// Switches back and removes our nodes; see [`DestinationDisks::detach`].
    fn let_go(&self, qmp: &Qmp) -> GuestResult<()> {
        self.release(qmp).map_err(|error| {
            self.failed(
                "cannot give the local image back to the guest, which goes on with ours, for",
                error,
            )
        })
    }

    fn release(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let nodes = nodes(qmp)?;
        if self.root(qmp)?.as_deref() == Some(&self.layer()) {
            // From 10 on what no device held stays inactive when the guest's state is loaded.
            let is_active = |name: &str| nodes.get(name).and_then(|node| node.active);
            if is_active(&self.layer()) == Some(true) && is_active(&self.keep()) == Some(false) {
                qmp.execute_within(
                    &BlockdevSetActive {
                        node_name: self.keep(),
                        active: true,
                    },
                    SWITCH_TIMEOUT,
                )?;
            }
            self.reopen_over(qmp, &self.node)?;
            self.set_root(qmp, &self.node)?;
        }
        for name in [self.layer(), self.nbd(), self.keep()] {
            if nodes.contains_key(&name) {
                qmp.execute_within(&BlockdevDel { node_name: name }, SWITCH_TIMEOUT)?;
            }
        }
        Ok(())
    }

    fn set_root(&self, qmp: &Qmp, node: &str) -> Result<(), QmpError> {
        qmp.execute_within(
            &QomSet {
                path: object_path(&self.qdev),
                property: "drive".to_owned(),
                value: node.into(),
            },
            SWITCH_TIMEOUT,
        )
        .map(drop)
    }

    /// The node that the device uses.
    fn root(&self, qmp: &Qmp) -> Result<Option<String>, QmpError> {
        let devices = qmp.execute_within(&QueryBlockDevices {}, SWITCH_TIMEOUT)?;
        Ok(devices
            .into_iter()
            .find(|device| device.qdev.as_deref() == Some(&self.qdev))
            .and_then(|device| device.inserted?.node_name))
    }

    fn failed(&self, what: &str, error: QmpError) -> GuestError {
        GuestError::caused(format!("{what} disk '{}'", self.name), error)
    }
}

/// What QEMU tells of its devices and nodes.
struct BlockGraph {
    devices: Vec<Device>,
    nodes: HashMap<String, Node>,
    graph: Graph,
}

impl BlockGraph {
    fn read(qmp: &Qmp) -> Result<Self, QmpError> {
        Ok(Self {
            devices: qmp.execute(&QueryBlockDevices {})?,
            nodes: nodes(qmp)?,
            graph: qmp.execute(&QueryGraph {})?,
        })
    }

    /// The local disk for a wanted one, or why there is none. `taken` are those found before.
    fn find(
        &self,
        process: QemuProcess,
        wanted: &WantedDisk,
        taken: &[LocalDisk],
    ) -> Result<LocalDisk, String> {
        let what = format!(
            "the guest's disk '{}' ({} bytes)",
            wanted.name, wanted.bytes
        );
        let Some(device) = self
            .devices
            .iter()
            .find(|device| self.name(device) == wanted.name)
        else {
            let known: Vec<String> = self
                .devices
                .iter()
                .map(|device| self.name(device))
                .collect();
            return Err(format!(
                "{what} is missing here (there are: {}): give QEMU the same -device and -drive as at \
                 the source, with a raw image of that size, truncate -s {} FILE",
                known.join(", "),
                wanted.bytes
            ));
        };
        let Some(medium) = &device.inserted else {
            return Err(format!("{what}: the drive is empty here"));
        };
        let (Some(qdev), Some(root)) = (&device.qdev, &medium.node_name) else {
            return Err(format!("{what}: no device uses the drive here"));
        };
        if medium.ro {
            return Err(format!(
                "{what} is read-only here ({}): leave readonly=on out",
                medium.file
            ));
        }
        if medium.image.virtual_size != wanted.bytes {
            return Err(format!(
                "{what} has {} bytes here ({}): make it as large, truncate -s {} FILE",
                medium.image.virtual_size, medium.file, wanted.bytes
            ));
        }
        let (node, number) = if is_ours(medium) {
            self.attached(root).ok_or_else(|| {
                format!("{what} is in a state here that nobody has left: start QEMU anew")
            })?
        } else {
            (root.clone(), self.free_number(taken))
        };
        let file = self.file_below(&node).map_err(|why| {
            format!(
                "{what} {why}: the image at the destination has to be a raw file: truncate -s {} FILE, \
                 and format=raw",
                wanted.bytes
            )
        })?;
        Ok(LocalDisk {
            name: wanted.name.clone(),
            bytes: wanted.bytes,
            path: local_path(process, &file.file)
                .map_err(|why| format!("{what}: {why}: name the image by its path"))?,
            direct: file.cache.is_some_and(|cache| cache.direct),
            qdev: qdev.clone(),
            node,
            number,
        })
    }

    /// What a device's disk is called, whether ours is under it or not.
    fn name(&self, device: &Device) -> String {
        let mut device = device.clone();
        if let Some(medium) = &mut device.inserted
            && is_ours(medium)
        {
            let below = medium
                .node_name
                .as_deref()
                .and_then(|node| self.attached(node));
            medium.node_name = below.map(|(node, _)| node);
        }
        name_of(&device)
    }

    /// The operator's node and the number of a disk whose root is ours.
    fn attached(&self, root: &str) -> Option<(String, u32)> {
        let number = root
            .strip_prefix(&format!("{NODE_PREFIX}disk-"))?
            .parse()
            .ok()?;
        let node = self.child(&format!("{NODE_PREFIX}keep-{number}"))?;
        Some((node, number))
    }

    fn free_number(&self, taken: &[LocalDisk]) -> u32 {
        let in_use = |number: &u32| {
            taken.iter().any(|disk| disk.number == *number)
                || self
                    .nodes
                    .contains_key(&format!("{NODE_PREFIX}keep-{number}"))
        };
        (0..MOST_DISKS)
            .find(|number| !in_use(number))
            .unwrap_or(MOST_DISKS)
    }

    /// The node of the file under a raw node, or what is in the way.
    fn file_below(&self, node: &str) -> Result<&Node, String> {
        let mut name = node.to_owned();
        for _ in 0..DEPTH {
            let Some(node) = self.nodes.get(&name) else {
                return Err(format!("has no node '{name}'"));
            };
            match node.drv.as_str() {
                "file" => return Ok(node),
                "raw" => {}
                other => return Err(format!("is {other} here ({})", node.file)),
            }
            name = self
                .child(&name)
                .ok_or_else(|| format!("has nothing under node '{name}'"))?;
        }
        Err("lies under too many nodes here".to_owned())
    }

    /// The `file` child of a node.
    fn child(&self, name: &str) -> Option<String> {
        let named = |id| self.graph.nodes.iter().find(|node| node.id == id);
        let parent = self.graph.nodes.iter().find(|node| node.name == name)?.id;
        let edge = self
            .graph
            .edges
            .iter()
            .find(|edge| edge.parent == parent && edge.name == "file")?;
        named(edge.child).map(|node| node.name.clone())
    }
}

/// A parent of `node` other than `expected`.
fn other_parent(graph: &Graph, node: &str, expected: &str) -> Option<String> {
    let name = |id: u64| {
        let node = graph.nodes.iter().find(|node| node.id == id);
        node.map_or_else(String::new, |node| node.name.clone())
    };
    graph
        .edges
        .iter()
        .filter(|edge| name(edge.child) == node)
        .map(|edge| name(edge.parent))
        .find(|parent| parent != expected)
}

fn nodes(qmp: &Qmp) -> Result<HashMap<String, Node>, QmpError> {
    let nodes = qmp.execute_within(&QueryNodes { flat: true }, SWITCH_TIMEOUT)?;
    Ok(nodes
        .into_iter()
        .filter_map(|node| Some((node.name.clone()?, node)))
        .collect())
}

fn add(qmp: &Qmp, options: Any) -> Result<(), QmpError> {
    qmp.execute_within(&BlockdevAdd { options }, SWITCH_TIMEOUT)
        .map(drop)
}

/// Where we can open a file that QEMU names so.
fn local_path(process: QemuProcess, file: &str) -> Result<PathBuf, String> {
    // Options that have no place in a file name make QEMU write all of them.
    let name = match file.strip_prefix("json:") {
        Some(options) => serde_json::from_str(options)
            .ok()
            .and_then(|options| file_name(&options))
            .ok_or_else(|| format!("QEMU names its image {file}"))?,
        None => file.to_owned(),
    };
    let seen = process.path_of(&name);
    let there =
        fs::metadata(&seen).map_err(|error| format!("cannot find its image {name}: {error}"))?;
    // The plain path is good for another process as well, but only if it means the same file.
    let plain = fs::canonicalize(&seen).unwrap_or_else(|_| seen.clone());
    let same = fs::metadata(&plain)
        .is_ok_and(|here| (here.dev(), here.ino()) == (there.dev(), there.ino()));
    Ok(if same { plain } else { seen })
}

/// The `filename` among a node's options.
fn file_name(options: &Any) -> Option<String> {
    let object = options.as_object()?;
    match object.get("filename").and_then(Any::as_str) {
        Some(name) => Some(name.to_owned()),
        None => object.values().find_map(file_name),
    }
}
