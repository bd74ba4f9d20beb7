//! Names of namespaces in `/run/netns`, where `ip netns` looks for them, and their removal after an owner
//! that was killed. Only a name that a record of this software vouches for is ever removed.
//!
//! A record is a file that its owner keeps locked: the lock ends with the process, whatever ended it,
//! and no other process can be mistaken for it. It says which namespace was to have the name,
//! and is written before the name is given and removed after the name is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{NSFS_MAGIC, statfs};

use super::{Namespace, NamespaceError, sys};

/// What every name begins with.
pub const NAME_PREFIX: &str = "hybridmig-";

/// Where `ip netns` looks.
const NAMES: &str = "/run/netns";

/// Where the records are.
const RECORDS: &str = "/run/hybridmig-netns";

/// Attempts to lock a record that others remove at the same moment.
const LOCK_ATTEMPTS: u32 = 16;

/// A name in `/run/netns`, which goes when this is dropped.
#[derive(Debug)]
pub struct NamedNamespace {
    name: String,
    identity: Identity,
    /// Locked while the name is ours.
    _record: Flock<File>,
}

/// Which namespace a name stands for. The number is not given to another while the name holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Namespace {
    /// Gives it the name [`NAME_PREFIX`] + `name`, by which `ip netns exec` finds it.
    pub fn name(&self, name: &str) -> Result<NamedNamespace, NamespaceError> {
        let valid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 64 || !name.chars().all(valid) {
            return Err(NamespaceError::InvalidName { name: name.into() });
        }
        let name = format!("{NAME_PREFIX}{name}");
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| NamespaceError::Name { what, path, source }
        };
        fs::create_dir_all(RECORDS).map_err(failed("make", RECORDS.as_ref()))?;
        let path = record_path(&name);
        let Some(mut record) = lock_record(&path).map_err(failed("lock", &path))? else {
            return Err(NamespaceError::NameTaken { name });
        };
        // The record of an owner that is gone: its name goes first.
        clear(&name, &mut record).map_err(failed("clear the stale", &name_path(&name)))?;
        let metadata = self.descriptor.metadata();
        let identity = metadata
            .map(|metadata| Identity::of(&metadata))
            .map_err(failed("look at the namespace", &self.path()))?;
        identity
            .write(&mut record)
            .map_err(failed("write", &path))?;
        let target = name_path(&name);
        let made = share_names()
            .map_err(failed("share", NAMES.as_ref()))
            .and_then(|()| match File::create_new(&target) {
                Ok(_) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    Err(NamespaceError::NameTaken { name: name.clone() })
                }
                Err(error) => Err(failed("make", &target)(error)),
            });
        if let Err(error) = made {
            // What has the name is not ours: only the record goes.
            fs::remove_file(&path).map_err(failed("remove", &path))?;
            return Err(error);
        }
        // From here on a drop takes everything back.
        let named = NamedNamespace {
            name,
            identity,
            _record: record,
        };
        let number = sys::number(self.descriptor.as_fd());
        mount(
            Some(format!("/proc/self/fd/{number}").as_str()),
            &target,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .map_err(|error| failed("mount on", &target)(error.into()))?;
        Ok(named)
    }
}

impl NamedNamespace {
    /// The whole name, for `ip netns exec NAME`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        name_path(&self.name)
    }
}

impl Drop for NamedNamespace {
    fn drop(&mut self) {
        let record = record_path(&self.name);
        // The record goes last, and stays when the name does: the next start tries again.
        let removed = remove_name(&self.name, self.identity).and_then(|()| fs::remove_file(record));
        if let Err(error) = removed {
            tracing::warn!(name = self.name, %error, "cannot remove the name of a network namespace");
        }
    }
}

/// Removes the names whose owners have ended without removing them (killed, for one) and returns
/// them. Names that a living process holds stay, and so does everything that no record vouches for.
pub fn remove_stale() -> io::Result<Vec<String>> {
    let records = match fs::read_dir(RECORDS) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        records => records?,
    };
    let mut removed = Vec::new();
    for entry in records {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if !name.starts_with(NAME_PREFIX) {
            continue;
        }
        let mut record = match lock_record(&entry.path()) {
            Ok(Some(record)) => record,
            Ok(None) => continue,
            // Another user's names are that user's to remove.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
            Err(error) => return Err(error),
        };
        if clear(&name, &mut record)? {
            removed.push(name);
        }
        fs::remove_file(entry.path())?;
    }
    Ok(removed)
}

/// Removes the name that a locked record vouches for; whether there was one.
fn clear(name: &str, record: &mut Flock<File>) -> io::Result<bool> {
    match Identity::read(record)? {
        Some(identity) => {
            let existed = name_path(name).symlink_metadata().is_ok();
            remove_name(name, identity)?;
            Ok(existed)
        }
        // The owner ended before it gave the name.
        None => Ok(false),
    }
}

/// Removes a name if it stands for that namespace, or for none because its owner ended in between.
fn remove_name(name: &str, identity: Identity) -> io::Result<()> {
    let path = name_path(name);
    let metadata = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata?,
    };
    if statfs(&path)?.filesystem_type() == NSFS_MAGIC {
        if Identity::of(&metadata) != identity {
            return Ok(());
        }
        umount2(&path, MntFlags::MNT_DETACH)?;
    } else if !metadata.is_file() || metadata.len() > 0 {
        return Ok(());
    }
    fs::remove_file(path)
}

impl Identity {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    fn write(self, record: &mut File) -> io::Result<()> {
        record.set_len(0)?;
        // One write at the start: it is there in whole or not at all.
        let text = format!("{} {}\n", self.device, self.inode);
        std::os::unix::fs::FileExt::write_all_at(record, text.as_bytes(), 0)?;
        record.flush()
    }

    /// `None` from a record that was not written yet.
    fn read(record: &mut File) -> io::Result<Option<Self>> {
        let mut text = String::new();
        // A record is two numbers; more is none.
        Read::by_ref(record).take(64).read_to_string(&mut text)?;
        let numbers: Option<Vec<u64>> = text.split_whitespace().map(|n| n.parse().ok()).collect();
        Ok(match numbers.as_deref() {
            Some([device, inode]) if text.ends_with('\n') => Some(Self {
                device: *device,
                inode: *inode,
            }),
            _ => None,
        })
    }
}

/// Opens and locks a record, made if need be; `None` if its owner lives.
fn lock_record(path: &Path) -> io::Result<Option<Flock<File>>> {
    for _ in 0..LOCK_ATTEMPTS {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let record = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(record) => record,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, error)) => return Err(error.into()),
        };
        // Somebody may have removed the file between the two calls: a lock on it holds nothing.
        match path.symlink_metadata() {
            Ok(metadata) if Identity::of(&metadata) == Identity::of(&record.metadata()?) => {
                return Ok(Some(record));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("the record is removed again and again"))
}

/// Makes `/run/netns` a mount that passes its mounts on to other mount namespaces and takes back
/// none alone, as `ip netns` does: else a name would keep its namespace alive elsewhere.
fn share_names() -> io::Result<()> {
    fs::create_dir_all(NAMES)?;
    let share = || {
        let flags = MsFlags::MS_SHARED | MsFlags::MS_REC;
        mount(None::<&str>, NAMES, None::<&str>, flags, None::<&str>)
    };
    match share() {
        Err(Errno::EINVAL) => {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(NAMES), NAMES, None::<&str>, flags, None::<&str>)?;
            Ok(share()?)
        }
        result => Ok(result?),
    }
}

fn name_path(name: &str) -> PathBuf {
    Path::new(NAMES).join(name)
}

fn record_path(name: &str) -> PathBuf {
    Path::new(RECORDS).join(name)
}
