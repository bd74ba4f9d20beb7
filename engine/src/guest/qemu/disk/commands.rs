//! The QMP commands on block devices that are used here; see [`super::super::commands`]. This file must
//! never hold logic.

use qapi::{Any, Command};
use serde::{Deserialize, Serialize};

use crate::guest::qemu::commands::{Ignored, command};

command! {
    /// The block devices, with what this module reads of each.
    QueryBlockDevices = "query-block" -> Vec<Device> {}
}
command! {
    /// The nodes of the block graph.
    QueryNodes = "query-named-block-nodes" -> Vec<Node> {
        /// Without what is behind each.
        flat: bool,
    }
}
command! {
    /// Which node is a child of which. The only one of its kind, in spite of its name.
    QueryGraph = "x-debug-query-block-graph" -> Graph {}
}
command! {
    /// What the guest did with its block devices.
    QueryBlockStats = "query-blockstats" -> Vec<DeviceStats> {}
}
command! {
    /// The block jobs that run.
    QueryBlockJobs = "query-block-jobs" -> Vec<Job> {}
}
command! {
    /// The exports.
    QueryExports = "query-block-exports" -> Vec<Export> {}
}
command! {
    /// Adds a node.
    BlockdevAdd = "blockdev-add" -> Ignored {
        /// Its options.
        #[serde(flatten)]
        options: Any,
    }
}
command! {
    /// Changes the options of a node, among them its children.
    BlockdevReopen = "blockdev-reopen" -> Ignored {
        /// All options of each node.
        options: Vec<Any>,
    }
}
command! {
    /// Removes a node that nobody uses.
    BlockdevDel = "blockdev-del" -> Ignored {
        /// The node.
        node_name: String,
    }
}
command! {
    /// Activates a node and what is below; QEMU 10 and later.
    BlockdevSetActive = "blockdev-set-active" -> Ignored {
        /// The node.
        node_name: String,
        /// Or inactivates it.
        active: bool,
    }
}
command! {
    /// Changes the property of an object.
    QomSet = "qom-set" -> Ignored {
        /// The object.
        path: String,
        /// The property.
        property: String,
        /// Its new value.
        value: Any,
    }
}
command! {
    /// Starts the NBD server.
    NbdServerStart = "nbd-server-start" -> Ignored {
        /// Where it listens.
        addr: Any,
        /// Most connections at once.
        max_connections: u32,
    }
}
command! {
    /// Stops the NBD server and ends its exports.
    NbdServerStop = "nbd-server-stop" -> Ignored {}
}
command! {
    /// Exports a node.
    BlockExportAdd = "block-export-add" -> Ignored {
        /// What and how.
        #[serde(flatten)]
        options: Any,
    }
}
command! {
    /// Ends an export.
    BlockExportDel = "block-export-del" -> Ignored {
        /// The export.
        id: String,
        /// `safe` if nobody is connected, or `hard`.
        mode: &'static str,
    }
}
command! {
    /// Removes a bitmap.
    BitmapRemove = "block-dirty-bitmap-remove" -> Ignored {
        /// The node.
        node: String,
        /// Name of the bitmap.
        name: String,
    }
}
command! {
    /// Does several things, or none of them.
    Transaction = "transaction" -> Ignored {
        /// What to do.
        actions: Vec<Any>,
    }
}

/// A device of the guest that has, or could have, a medium.
#[derive(Clone, Debug, Deserialize)]
pub struct Device {
    /// Its name, `virtio0`; empty where `-blockdev` is used.
    #[serde(default, rename = "device")]
    pub name: String,
    /// The device's id, or its path in the object tree; absent if no device of the guest uses it.
    pub qdev: Option<String>,
    /// The medium.
    pub inserted: Option<Medium>,
}

/// What the guest did with a device.
#[derive(Clone, Debug, Deserialize)]
pub struct DeviceStats {
    /// See [`Device::qdev`].
    pub qdev: Option<String>,
    /// The counts.
    pub stats: BlockStats,
}

/// Operations that the guest has seen the end of, since QEMU was started.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct BlockStats {
    /// Reads.
    pub rd_operations: u64,
    /// Writes.
    pub wr_operations: u64,
    /// Bytes read.
    pub rd_bytes: u64,
    /// Bytes written.
    pub wr_bytes: u64,
}

/// The medium of a [`Device`].
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Medium {
    /// The node that the device uses.
    pub node_name: Option<String>,
    /// The node's driver, `raw`.
    pub drv: String,
    /// Name of its file.
    pub file: String,
    /// Whether it can only be read.
    pub ro: bool,
    /// How it is cached.
    pub cache: Option<Cache>,
    /// What is in the file.
    pub image: Image,
    /// Its bitmaps.
    #[serde(default)]
    pub dirty_bitmaps: Vec<Bitmap>,
}

/// How a node is cached.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Cache {
    /// Whether the host's page cache is bypassed.
    pub direct: bool,
}

/// An image.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Image {
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// Snapshots inside the image.
    #[serde(default)]
    pub snapshots: Vec<Any>,
}

/// A dirty bitmap.
#[derive(Clone, Debug, Deserialize)]
pub struct Bitmap {
    /// Its name.
    pub name: Option<String>,
    /// Bytes that it has noted as written.
    pub count: u64,
    /// Whether it notes.
    #[serde(default)]
    pub recording: bool,
}

/// A node of the block graph.
#[derive(Clone, Debug, Deserialize)]
pub struct Node {
    /// Its name.
    #[serde(rename = "node-name")]
    pub name: Option<String>,
    /// Its driver.
    pub drv: String,
    /// Name of its file.
    pub file: String,
    /// How it is cached.
    pub cache: Option<Cache>,
    /// Whether it may be used; QEMU 10 and later tell.
    pub active: Option<bool>,
}

/// The block graph.
#[derive(Clone, Debug, Deserialize)]
pub struct Graph {
    /// Its nodes.
    pub nodes: Vec<GraphNode>,
    /// Who is whose child.
    pub edges: Vec<GraphEdge>,
}

/// A node of a [`Graph`].
#[derive(Clone, Debug, Deserialize)]
pub struct GraphNode {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
}

/// An edge of a [`Graph`].
#[derive(Clone, Debug, Deserialize)]
pub struct GraphEdge {
    /// Number of the parent.
    pub parent: u64,
    /// Number of the child.
    pub child: u64,
    /// What the child is to the parent, `file`.
    pub name: String,
}

/// A block job.
#[derive(Clone, Debug, Deserialize)]
pub struct Job {
    /// Its name.
    pub device: String,
    /// `mirror`, `backup` …
    #[serde(rename = "type")]
    pub kind: String,
}

/// An export.
#[derive(Clone, Debug, Deserialize)]
pub struct Export {
    /// Its name.
    pub id: String,
}
