//! The device model of an HVM domain, a QEMU in dom0: what libxl does to it when it saves the domain
//! (`libxl_dom_save.c`, `libxl_qmp.c` of Xen 4.17). It writes to the guest's memory by mappings of its own, which Xen
//! does not track: it has to be told to report them; and its state is a part of the domain's.

use std::fs;
use std::path::PathBuf;

use hybridmig_pager::xen::Store;
use qapi::Command;
use serde::Serialize;

use super::stream::MAX_EMULATOR;
use crate::guest::qemu::commands::{Cont, Ignored, Stop, command};
use crate::guest::qemu::qmp::{Qmp, QmpError};
use crate::guest::{GuestError, GuestResult};

command! {
    /// Writes the state of the devices, and not the memory, to a file.
    XenSaveDevicesState = "xen-save-devices-state" -> Ignored {
        /// The file.
        filename: String,
        /// Whether the guest goes on elsewhere.
        live: bool,
    }
}
command! {
    /// Whether it tells Xen of each page that it writes.
    XenSetGlobalDirtyLog = "xen-set-global-dirty-log" -> Ignored {
        /// Whether it does.
        enable: bool,
    }
}

/// See the module's text.
pub struct DeviceModel {
    socket: PathBuf,
    /// Where it leaves its state for a moment.
    file: PathBuf,
}

fn failed(what: &str, error: QmpError) -> GuestError {
    GuestError::caused(format!("cannot {what} the device model"), error)
}

impl DeviceModel {
    /// That of this domain.
    ///
    /// # Errors
    /// When it is of a kind that keeps a part of its state in xenstore, as QEMU before 2.9 does.
    pub fn of(store: &Store, domain: u32) -> GuestResult<Self> {
        let kept = format!("/local/domain/0/device-model/{domain}/physmap");
        let kept = store.list(&kept).map_err(|error| {
            GuestError::caused(format!("cannot read {kept} in xenstore"), error)
        })?;
        if !kept.is_empty() {
            return Err(GuestError::new(
                "the domain's device model keeps its memory map in xenstore: it is too old (QEMU 2.9 does not)",
            ));
        }
        Ok(Self {
            socket: format!("/run/xen/qmp-libxl-{domain}").into(),
            file: format!("/var/lib/xen/qemu-save.{domain}.hybridmig").into(),
        })
    }

    /// Not for long: it takes one client at a time, and xl asks it as well.
    fn connect(&self) -> GuestResult<Qmp> {
        Qmp::connect(&self.socket).map_err(|error| failed("talk to", error))
    }

    /// Whether it is to report what it writes.
    pub fn report_writes(&self, enable: bool) -> GuestResult<()> {
        let told = self.connect()?.execute(&XenSetGlobalDirtyLog { enable });
        told.map(drop)
            .map_err(|error| failed("track the writes of", error))
    }

    /// Stops it and takes its state.
    pub fn stop(&self) -> GuestResult<Vec<u8>> {
        let qmp = self.connect()?;
        qmp.execute(&Stop {})
            .map_err(|error| failed("stop", error))?;
        let filename = self.file.display().to_string();
        let saved = qmp.execute(&XenSaveDevicesState {
            filename: filename.clone(),
            live: true,
        });
        let state = fs::metadata(&self.file).and_then(|file| {
            if file.len() > MAX_EMULATOR as u64 {
                return Err(std::io::ErrorKind::FileTooLarge.into());
            }
            fs::read(&self.file)
        });
        if let Err(error) = fs::remove_file(&self.file) {
            tracing::warn!(%error, "cannot remove {filename}");
        }
        saved.map_err(|error| failed("save", error))?;
        state.map_err(|error| GuestError::caused(format!("cannot read {filename}"), error))
    }

    /// Lets it go on.
    pub fn go_on(&self) -> GuestResult<()> {
        let told = self.connect()?.execute(&Cont {});
        told.map(drop).map_err(|error| failed("run", error))
    }
}
