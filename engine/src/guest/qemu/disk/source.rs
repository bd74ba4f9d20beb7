//! The disks of a guest that leaves: QEMU exports them over NBD to us alone, and notes in dirty bitmaps
//! what the guest writes.
//!
//! A write may be under way while its block is read; QEMU notes it when it is complete, so a later
//! round tells of the block again. A bitmap is read only when another has taken its place in the same
//! transaction, and forgotten only when it has been read: no write is ever missed, some are told of
//! twice. What is changed in QEMU must go again with [`SourceDisks::stop`].

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use qapi::Any;
use serde_json::json;

use super::choice::DiskChoice;
use super::commands::{
    BitmapRemove, BlockExportAdd, BlockExportDel, BlockStats, BlockdevSetActive, Device,
    DeviceStats, NbdServerStart, NbdServerStop, QueryBlockDevices, QueryBlockStats, QueryExports,
    Transaction,
};
use super::facts::{Disk, DiskFacts, Survey};
use super::page_cache::CacheWatch;
use super::pool::{self, Pool};
use super::{BLOCK_SIZE, NODE_PREFIX};
use crate::blocks::BlockSet;
use crate::guest::folder::{folder_base, make_folder, remove_folder};
use crate::guest::qemu::preflight::Finding;
use crate::guest::qemu::process::QemuProcess;
use crate::guest::qemu::qmp::{QemuVersion, Qmp, QmpError};
use crate::guest::{GuestError, GuestResult};
use crate::nbd::{Extent, NbdError};

/// First QEMU whose exports have to be told that reading goes on when a migration has completed.
const INACTIVE_EXPORTS: QemuVersion = QemuVersion {
    major: 10,
    minor: 0,
    micro: 0,
};
/// What the folder of the server's socket is called, with more behind it.
const FOLDER_PREFIX: &str = "hybridmig-nbd-";
/// Name of the listening socket while QEMU is given it.
const LISTENER_FD: &str = "hybridmig-nbd";
/// Longest a command may take that waits for the guest's I/O.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the block status of what is allocated is told, and its flag for what reads as zero.
const ALLOCATION: &str = "base:allocation";
const FLAG_ZERO: u32 = 2;
/// Where a bitmap is told, and its flag for what was written.
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
const FLAG_DIRTY: u32 = 1;

/// The disks of a guest that is to leave.
pub struct SourceDisks {
    qmp: Arc<Qmp>,
    disks: Vec<Disk>,
    facts: Vec<DiskFacts>,
    findings: Vec<Finding>,
    state: Mutex<State>,
    /// Apart from the rest: reading goes on beside a round.
    server: Mutex<Option<Arc<Server>>>,
}

#[derive(Default)]
struct State {
    /// By disk, while tracking is on.
    tracking: Vec<Tracking>,
    /// Number of the last bitmap.
    last: u64,
    /// Bitmaps that have been read and could not be removed yet: (disk, bitmap).
    retired: Vec<(usize, u64)>,
}

/// What is known of the writes to one disk.
#[derive(Default)]
struct Tracking {
    /// The bitmap that notes.
    active: u64,
    /// Bitmaps that note no more and have not been read.
    frozen: Vec<u64>,
    /// What has been read and not been told.
    found: BlockSet,
}

/// The NBD server in QEMU.
struct Server {
    folder: PathBuf,
    socket: PathBuf,
    /// By disk.
    pools: Vec<Pool>,
    /// By disk: what the guest uses of it, where that can be told.
    watches: Vec<Option<CacheWatch>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        remove_folder(&self.folder);
    }
}

impl SourceDisks {
    /// Finds the disks that move and refuses, by name, what cannot. Changes nothing.
    pub fn open(qmp: &Arc<Qmp>, choice: &DiskChoice) -> GuestResult<Self> {
        let survey = Survey::read(qmp, choice)
            .map_err(|error| GuestError::caused("cannot ask QEMU about the disks", error))?;
        survey.require()?;
        Ok(Self {
            qmp: Arc::clone(qmp),
            facts: survey.disks.iter().map(|disk| disk.facts.clone()).collect(),
            disks: survey.disks,
            findings: survey.findings,
            state: Mutex::default(),
            server: Mutex::default(),
        })
    }

    /// The disks that move, by name.
    pub fn disks(&self) -> &[DiskFacts] {
        &self.facts
    }

    /// What was found when they were opened, of disks that do not move as well.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Starts tracking and the export of every disk. Returns, by disk, the blocks that have content;
    /// all others read as zero until a round tells of them. What a killed process has left of its own
    /// start is removed first.
    pub fn start(&self) -> GuestResult<Vec<BlockSet>> {
        self.stop();
        if self.disks.is_empty() {
            return Ok(Vec::new());
        }
        let mut state = self.lock();
        let started = self.start_server().and_then(|()| self.track(&mut state));
        drop(state);
        let content = started.and_then(|()| {
            let server = self.server()?;
            (0..self.disks.len())
                .map(|disk| {
                    self.status(&server, disk, &export_name(disk), ALLOCATION, |flags| {
                        flags & FLAG_ZERO == 0
                    })
                })
                .collect()
        });
        if content.is_err() {
            self.stop();
        }
        content
    }

    /// By disk: blocks that the guest has read or written lately, as the host's page cache tells. None
    /// where that cannot be had: `cache=none`, formats other than raw, storage that is no file.
    pub fn accessed(&self) -> Vec<BlockSet> {
        let Ok(server) = self.server() else {
            return Vec::new();
        };
        let look = |(watch, disk): (&Option<CacheWatch>, &Disk)| {
            let Some(watch) = watch else {
                return BlockSet::new();
            };
            watch.look().unwrap_or_else(|error| {
                let disk = &disk.facts.name;
                tracing::debug!(disk, %error, "cannot tell what is in the page cache");
                BlockSet::new()
            })
        };
        server.watches.iter().zip(&self.disks).map(look).collect()
    }

    /// By disk, what the guest has done with it since QEMU was started. Our own reads are not among it: they are
    /// those of an export.
    pub fn counts(&self) -> Result<Vec<Option<BlockStats>>, QmpError> {
        if self.disks.is_empty() {
            return Ok(Vec::new());
        }
        let devices = self.qmp.execute(&QueryBlockStats {})?;
        let of = |disk: &Disk| {
            let own = |device: &&DeviceStats| device.qdev.as_deref() == Some(disk.qdev.as_str());
            devices.iter().find(own).map(|device| device.stats)
        };
        Ok(self.disks.iter().map(of).collect())
    }

    /// By disk, the blocks written since the last call. May tell of one that was not written, never
    /// misses one: a write that is under way is told of when it is complete. Final on a stopped guest.
    pub fn take_dirty(&self) -> GuestResult<Vec<BlockSet>> {
        if self.disks.is_empty() {
            return Ok(Vec::new());
        }
        let mut state = self.lock();
        if state.tracking.is_empty() {
            return Err(GuestError::new(
                "tracking of the disks has not been started",
            ));
        }
        self.remove_retired(&mut state);
        let written = self.written(&state)?;
        self.switch_bitmaps(&mut state, &written)?;
        let server = self.server()?;
        for disk in 0..self.disks.len() {
            while let Some(bitmap) = state.tracking[disk].frozen.first().copied() {
                let dirty = self.read_bitmap(&server, disk, bitmap)?;
                let tracking = &mut state.tracking[disk];
                tracking.found |= dirty;
                tracking.frozen.remove(0);
                state.retired.push((disk, bitmap));
            }
        }
        self.remove_retired(&mut state);
        Ok(state
            .tracking
            .iter_mut()
            .map(|tracking| std::mem::take(&mut tracking.found))
            .collect())
    }

    /// Copies one block into `buf`, whose length is [`BLOCK_SIZE`]. Behind the end of the disk it is
    /// zero. May be called by several threads at once.
    pub fn read(&self, disk: usize, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        let facts = self
            .facts
            .get(disk)
            .filter(|facts| block < facts.blocks() && buf.len() == BLOCK_SIZE as usize)
            .ok_or_else(|| {
                GuestError::new(format!("disk {disk} of the guest has no block {block}"))
            })?;
        let offset = u64::from(block) * u64::from(BLOCK_SIZE);
        let present = (facts.bytes - offset).min(u64::from(BLOCK_SIZE)) as usize;
        let server = self.server()?;
        if let Some(watch) = &server.watches[disk] {
            watch.we_read(block);
        }
        server.pools[disk]
            .read(offset, &mut buf[..present])
            .map_err(|error| self.failed("cannot read", disk, error))?;
        buf[present..].fill(0);
        Ok(())
    }

    /// Makes sure that the disks can still be read when QEMU has handed over the guest's state, and
    /// with it the images. Nobody writes them here any more.
    pub fn after_state_saved(&self) -> GuestResult<()> {
        let mut block = vec![0; BLOCK_SIZE as usize];
        for (index, disk) in self.disks.iter().enumerate() {
            let server = self.server()?;
            let len = block.len().min(disk.facts.bytes as usize);
            match server.pools[index].read(0, &mut block[..len]) {
                Ok(()) => continue,
                Err(error) if error.is_not_permitted() => {}
                Err(error) => return Err(self.failed("cannot read", index, error)),
            }
            let activate = BlockdevSetActive {
                node_name: disk.node.clone(),
                active: true,
            };
            self.qmp
                .execute_within(&activate, DRAIN_TIMEOUT)
                .map_err(|error| self.failed("QEMU has let go of", index, error))?;
            server.pools[index]
                .read(0, &mut block[..len])
                .map_err(|error| self.failed("cannot read", index, error))?;
        }
        Ok(())
    }

    /// Removes everything of ours from QEMU: exports, server, bitmaps. What cannot be removed is only
    /// told: the guest comes first. May be called at any time, and again.
    pub fn stop(&self) {
        let mut state = self.lock();
        let server = self
            .server
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        state.tracking.clear();
        state.retired.clear();
        if let Some(server) = &server {
            server.pools.iter().for_each(Pool::close);
        }
        match self.remove_ours(server.is_some()) {
            Ok(()) => {}
            // With QEMU, all of it is gone.
            Err(error) if error.is_closed() => {}
            Err(error) => tracing::warn!(
                error = GuestError::caused("cannot remove", error).chain(),
                "the guest's QEMU may keep an NBD server, exports and dirty bitmaps named \
                 {NODE_PREFIX}…, which cost it some memory: QMP nbd-server-stop, \
                 block-dirty-bitmap-remove"
            ),
        }
    }

    /// Starts the NBD server on a socket that only we can reach, and exports every disk.
    fn start_server(&self) -> GuestResult<()> {
        let folder = make_folder(FOLDER_PREFIX)?;
        let server = Server {
            socket: folder.join("nbd"),
            pools: (0..self.disks.len())
                .map(|disk| Pool::new(folder.join("nbd"), export_name(disk)))
                .collect(),
            watches: self
                .disks
                .iter()
                .map(|disk| self.watch_cache(disk))
                .collect(),
            folder: folder.clone(),
        };
        let cannot = |error: io::Error| {
            GuestError::caused(
                format!(
                    "cannot make the socket {} for QEMU",
                    server.socket.display()
                ),
                error,
            )
        };
        // QEMU need not be able to reach the path: it is given the socket itself.
        let listener = UnixListener::bind(&server.socket).map_err(cannot)?;
        let begin = || {
            self.qmp.send_fd(LISTENER_FD, listener.as_fd())?;
            let started = self.qmp.execute(&NbdServerStart {
                addr: json!({ "type": "fd", "data": { "str": LISTENER_FD } }),
                max_connections: (self.disks.len() as u32 + 1) * (pool::CONNECTIONS + 2),
            });
            if started.is_err() {
                // Used up by the server otherwise.
                self.qmp.close_fd(LISTENER_FD)?;
            }
            started.map(drop)
        };
        begin().map_err(|error: QmpError| {
            let busy = error.to_string().contains("already running");
            let why = if busy {
                "this QEMU has an NBD server of its own already, and can have only one: stop it \
                 first (QMP nbd-server-stop); or move the disks by other means, with --disk all=skip"
            } else {
                "cannot start QEMU's NBD server, by which the disks are read"
            };
            GuestError::caused(why, error)
        })?;
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(server));
        for disk in 0..self.disks.len() {
            self.export(disk, &export_id(disk, &folder), &export_name(disk), None)
                .map_err(|error| self.failed("cannot export", disk, error))?;
        }
        Ok(())
    }

    /// Turns a dirty bitmap on for every disk.
    fn track(&self, state: &mut State) -> GuestResult<()> {
        let mut actions = Vec::new();
        let mut tracking = Vec::new();
        for disk in &self.disks {
            state.last += 1;
            actions.push(add_bitmap(&disk.node, state.last));
            tracking.push(Tracking {
                active: state.last,
                ..Tracking::default()
            });
        }
        self.qmp
            .execute_within(&Transaction { actions }, DRAIN_TIMEOUT)
            .map_err(|error| {
                GuestError::caused("cannot track what the guest writes to its disks", error)
            })?;
        state.tracking = tracking;
        Ok(())
    }

    /// Numbers of the disks that have been written since the last round. Makes sure that nobody has
    /// changed the disks in a way that bitmaps do not see.
    fn written(&self, state: &State) -> GuestResult<Vec<usize>> {
        let devices = self
            .qmp
            .execute(&QueryBlockDevices {})
            .map_err(|error| GuestError::caused("cannot ask QEMU about the disks", error))?;
        let mut written = Vec::new();
        for (index, (disk, tracking)) in self.disks.iter().zip(&state.tracking).enumerate() {
            let count = noted(&devices, disk, &bitmap_name(tracking.active)).map_err(|why| {
                GuestError::new(format!(
                    "disk '{}' was changed during the migration ({why}): start the migration anew",
                    disk.facts.name
                ))
            })?;
            if count > 0 {
                written.push(index);
            }
        }
        Ok(written)
    }

    /// Has other bitmaps note what is written to these disks, from one moment on.
    fn switch_bitmaps(&self, state: &mut State, written: &[usize]) -> GuestResult<()> {
        if written.is_empty() {
            return Ok(());
        }
        let mut actions = Vec::new();
        let mut next = Vec::new();
        for &disk in written {
            let node = &self.disks[disk].node;
            state.last += 1;
            next.push((disk, state.last));
            // Added first: for a moment both note, never none.
            actions.push(add_bitmap(node, state.last));
            actions.push(json!({
                "type": "block-dirty-bitmap-disable",
                "data": { "node": node, "name": bitmap_name(state.tracking[disk].active) },
            }));
        }
        self.qmp
            .execute_within(&Transaction { actions }, DRAIN_TIMEOUT)
            .map_err(|error| GuestError::caused("cannot begin a round of disk tracking", error))?;
        for (disk, bitmap) in next {
            let tracking = &mut state.tracking[disk];
            tracking.frozen.push(tracking.active);
            tracking.active = bitmap;
        }
        Ok(())
    }

    fn read_bitmap(&self, server: &Server, disk: usize, bitmap: u64) -> GuestResult<BlockSet> {
        let name = bitmap_name(bitmap);
        let cannot = |error| self.failed("cannot tell what was written to", disk, error);
        self.export(disk, &name, &name, Some(&name))
            .map_err(cannot)?;
        let context = format!("{DIRTY_BITMAP}{name}");
        let dirty = self.status(server, disk, &name, &context, |flags| {
            flags & FLAG_DIRTY != 0
        });
        let ended = self.qmp.execute(&BlockExportDel {
            id: name,
            mode: "hard",
        });
        let dirty = dirty?;
        ended.map_err(cannot)?;
        Ok(dirty)
    }

    /// Blocks of an export with an extent whose flags are `wanted`.
    fn status(
        &self,
        server: &Server,
        disk: usize,
        export: &str,
        context: &str,
        wanted: impl Fn(u32) -> bool,
    ) -> GuestResult<BlockSet> {
        let failed = |error: NbdError| self.failed("cannot ask about", disk, error);
        let mut client = pool::connect(&server.socket, export, Some(context)).map_err(failed)?;
        if client.size() != self.facts[disk].bytes {
            return Err(GuestError::new(format!(
                "disk '{}' has {} bytes but QEMU exports {}",
                self.facts[disk].name,
                self.facts[disk].bytes,
                client.size()
            )));
        }
        let mut blocks = BlockSet::new();
        client
            .block_status(|extent| {
                if wanted(extent.flags) {
                    insert(&mut blocks, extent);
                }
            })
            .map_err(failed)?;
        client.disconnect();
        Ok(blocks)
    }

    fn export(
        &self,
        disk: usize,
        id: &str,
        name: &str,
        bitmap: Option<&str>,
    ) -> Result<(), QmpError> {
        let mut options = json!({
            "type": "nbd",
            "id": id,
            "node-name": self.disks[disk].node,
            "name": name,
            "writable": false,
        });
        if let Some(bitmap) = bitmap {
            options["bitmaps"] = json!([bitmap]);
        }
        if self.qmp.version() >= INACTIVE_EXPORTS {
            options["allow-inactive"] = json!(true);
        }
        self.qmp
            .execute_within(&BlockExportAdd { options }, DRAIN_TIMEOUT)
            .map(drop)
    }

    /// Removes bitmaps that have been read; one that is still in use waits for the next time.
    fn remove_retired(&self, state: &mut State) {
        state.retired.retain(|(disk, bitmap)| {
            let removed = self.qmp.execute(&BitmapRemove {
                node: self.disks[*disk].node.clone(),
                name: bitmap_name(*bitmap),
            });
            match removed {
                Ok(_) => false,
                Err(error) => {
                    tracing::debug!(%error, "a dirty bitmap stays for now");
                    true
                }
            }
        });
    }

    /// Removes all that bears our name in QEMU, of this process or of one that was killed.
    fn remove_ours(&self, server_is_ours: bool) -> Result<(), QmpError> {
        let exports = self.qmp.execute(&QueryExports {})?;
        let ours = |name: &str| name.starts_with(NODE_PREFIX);
        if server_is_ours || exports.iter().any(|export| ours(&export.id)) {
            // Waits until its exports are gone.
            self.qmp.execute_within(&NbdServerStop {}, DRAIN_TIMEOUT)?;
        }
        for folder in exports.iter().filter_map(|export| folder_of(&export.id)) {
            remove_folder(&folder);
        }
        for device in self.qmp.execute(&QueryBlockDevices {})? {
            let Some(medium) = device.inserted else {
                continue;
            };
            let Some(node) = medium.node_name else {
                continue;
            };
            let names = medium
                .dirty_bitmaps
                .into_iter()
                .filter_map(|bitmap| bitmap.name);
            for name in names.filter(|name| ours(name)) {
                let node = node.clone();
                self.qmp.execute(&BitmapRemove { node, name })?;
            }
        }
        Ok(())
    }

    fn watch_cache(&self, disk: &Disk) -> Option<CacheWatch> {
        if disk.direct || disk.facts.format != "raw" {
            return None;
        }
        let pid = self.qmp.peer_pid()?;
        let path = QemuProcess { pid }.path_of(&disk.facts.file);
        if !fs::metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
            return None;
        }
        CacheWatch::start(path, disk.facts.bytes, pid)
            .inspect_err(|error| {
                let disk = &disk.facts.name;
                tracing::warn!(disk, %error, "cannot tell what is in the page cache");
            })
            .ok()
    }

    fn server(&self) -> GuestResult<Arc<Server>> {
        self.server
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or_else(|| GuestError::new("the disks are not exported"))
    }

    fn failed(
        &self,
        what: &str,
        disk: usize,
        error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> GuestError {
        GuestError::caused(format!("{what} disk '{}'", self.facts[disk].name), error)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SourceDisks {
    fn drop(&mut self) {
        if self
            .server
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
        {
            self.stop();
        }
    }
}

/// Bytes that the bitmap has noted for the disk, or what is not as it was.
fn noted(devices: &[Device], disk: &Disk, bitmap: &str) -> Result<u64, String> {
    let medium = devices
        .iter()
        .find(|device| device.qdev.as_deref() == Some(&disk.qdev))
        .and_then(|device| device.inserted.as_ref())
        .ok_or("it is gone")?;
    if medium.node_name.as_deref() != Some(&disk.node) {
        return Err("its image is another: a snapshot, perhaps, or a block job".to_owned());
    }
    if medium.image.virtual_size != disk.facts.bytes {
        return Err("its size is another".to_owned());
    }
    medium
        .dirty_bitmaps
        .iter()
        .find(|known| known.name.as_deref() == Some(bitmap) && known.recording)
        .map(|known| known.count)
        .ok_or_else(|| "its dirty bitmap is gone".to_owned())
}

fn add_bitmap(node: &str, bitmap: u64) -> Any {
    json!({
        "type": "block-dirty-bitmap-add",
        "data": { "node": node, "name": bitmap_name(bitmap), "granularity": BLOCK_SIZE },
    })
}

fn bitmap_name(bitmap: u64) -> String {
    format!("{NODE_PREFIX}round-{bitmap}")
}

fn export_name(disk: usize) -> String {
    format!("{NODE_PREFIX}disk-{disk}")
}

/// The id of a disk's export, by which the folder of the server's socket is found again.
fn export_id(disk: usize, folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let tag = name.trim_start_matches(FOLDER_PREFIX);
    format!("{}.{tag}", export_name(disk))
}

/// The folder of the server that a disk's export is of.
fn folder_of(export_id: &str) -> Option<PathBuf> {
    let (name, tag) = export_id.split_once('.')?;
    let well_formed = !tag.is_empty() && tag.chars().all(|c| c.is_ascii_alphanumeric());
    (name.starts_with(NODE_PREFIX) && well_formed)
        .then(|| folder_base().join(format!("{FOLDER_PREFIX}{tag}")))
}

/// Adds every block that the extent touches.
fn insert(blocks: &mut BlockSet, extent: Extent) {
    let size = u64::from(BLOCK_SIZE);
    let first = extent.offset / size;
    let last = (extent.offset + extent.len - 1) / size;
    // The size of the disk was checked to fit.
    blocks.insert_range(first as u32..=last as u32);
}
