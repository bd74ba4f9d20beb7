//! An unmodified QEMU as a guest: driven over QMP, its RAM tracked and paged from outside.
//!
//! What the VM must be like, what is refused and how it works: `docs/qemu.md`. QEMU's own
//! migration is used for device state only; its RAM never passes through it.
//!
//! - `preflight` finds out, without touching the guest, whether it can be moved; `facts` asks
//!   QEMU, `process` asks `/proc`, `compare` holds the two sides against each other;
//! - `source` and `destination` are the two ends of a migration; `door` is their way into
//!   QEMU's address space, `state` carries the device state, `launch` starts a destination's
//!   QEMU, `record` is what a killed destination leaves for the next one;
//! - `disk` finds the disks of either side and switches them, `here` serves those of a destination;
//! - `qmp` and `commands` are the dialogue with QEMU.

pub(crate) mod commands;
pub mod compare;
mod destination;
pub mod disk;
mod door;
pub mod facts;
mod here;
mod launch;
pub mod preflight;
pub mod process;
pub mod qmp;
mod record;
mod source;
mod state;
#[cfg(test)]
mod tests;

pub use destination::{QemuDestination, QemuDestinationOptions, QemuOrigin};
pub use source::{QemuSource, QemuSourceOptions};

use std::path::Path;

use crate::guest::{GuestError, GuestResult};
use disk::{DiskChoice, Survey};
use preflight::{Inspection, Side};
use qmp::Qmp;

/// Connects to the monitor at `socket` and looks whether its guest can leave (or, for a QEMU that
/// waits, whether one can come), with the disks that are chosen: `hybridmig check`. Changes nothing.
pub fn inspect(socket: &Path, side: Side, disks: &DiskChoice) -> GuestResult<Inspection> {
    let qmp = Qmp::connect(socket)
        .map_err(|error| GuestError::caused("cannot use the guest's QEMU", error))?;
    let mut inspection = preflight::inspect(&qmp, side)?;
    if side == Side::Source {
        let survey = Survey::read(&qmp, disks)
            .map_err(|error| GuestError::caused("cannot ask QEMU about the disks", error))?;
        inspection.findings.extend(survey.findings);
    }
    Ok(inspection)
}
