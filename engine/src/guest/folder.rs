//! Folders for what belongs to one guest here and nobody else may look into.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::{GuestError, GuestResult};

/// Where such folders are made.
pub fn folder_base() -> PathBuf {
    [std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)]
        .into_iter()
        .flatten()
        .chain([PathBuf::from("/run/hybridmig")])
        .find(|base| {
            make_private(base).is_ok()
                && nix::unistd::access(base, nix::unistd::AccessFlags::W_OK).is_ok()
        })
        .unwrap_or_else(std::env::temp_dir)
}

/// A folder for a socket that only we can look into: who can reach the monitor owns the guest.
pub fn make_folder(prefix: &str) -> GuestResult<PathBuf> {
    let base = folder_base();
    let cannot = |error: io::Error| {
        GuestError::caused(
            format!(
                "cannot create a folder for a guest's sockets in {}",
                base.display()
            ),
            error,
        )
    };
    let folder = tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in(&base)
        .map_err(cannot)?
        .keep();
    let bytes = folder.as_os_str().as_encoded_bytes().len();
    if bytes > 90 {
        remove_folder(&folder);
        return Err(GuestError::new(format!(
            "{} is too long a path for a Unix socket: set XDG_RUNTIME_DIR to a shorter one",
            base.display()
        )));
    }
    Ok(folder)
}

/// Makes the folder of such sockets again, where it is gone: for who goes on after another process.
pub fn make_folder_again(folder: &Path) -> GuestResult<()> {
    make_private(folder)
        .map_err(|error| GuestError::caused(format!("cannot create {}", folder.display()), error))
}

/// Makes a folder for one user only, unless it is there.
fn make_private(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
}

/// Removes a folder and what is in it; that it cannot be removed is only told.
pub fn remove_folder(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.display(), %error, "cannot remove a folder");
    }
}
