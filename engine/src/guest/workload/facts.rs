//! What both ends of a migration must agree on about an embedded guest, and where its memory is.

use std::collections::BTreeMap;
use std::sync::Arc;

use hybridmig_pager::handover::{self, GuestMapping};
use hybridmig_pager::{Mapping, PAGE_SIZE, Region, RegionMemory};
use hybridmig_transport::message::GuestDescription;

use super::control::{ControlError, FORMAT};
use crate::guest::{GuestError, GuestResult};

/// The kind of guest, as offers name it.
pub const KIND: &str = "workload";

/// The facts of a guest of this build.
pub fn facts() -> BTreeMap<String, String> {
    [
        ("format", FORMAT.to_string()),
        ("page-size", PAGE_SIZE.to_string()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_string(), value))
    .collect()
}

/// Why a guest that is offered is not one that this build can take; empty if it can.
pub fn mismatches(guest: &GuestDescription) -> Vec<String> {
    if guest.kind != KIND {
        return vec![format!(
            "the guest is of kind '{}', this side waits for one of kind '{KIND}'",
            guest.kind
        )];
    }
    let ours = facts();
    let names: std::collections::BTreeSet<_> = ours.keys().chain(guest.facts.keys()).collect();
    names
        .into_iter()
        .filter_map(|name| {
            let shown = |value: Option<&String>| value.map_or("nothing", String::as_str).to_owned();
            let (here, there) = (ours.get(name), guest.facts.get(name));
            (here != there).then(|| {
                format!(
                    "the embedded guest's {name} is {} at the source and {} here: use the same \
                     version of hybridmig on both hosts",
                    shown(there),
                    shown(here)
                )
            })
        })
        .collect()
}

/// The region of a guest's memory, from what the guest says about its mappings.
pub fn region(memory: &Arc<RegionMemory>, mappings: &[GuestMapping]) -> GuestResult<Region> {
    handover::check(mappings)?;
    let page = PAGE_SIZE as u64;
    let mappings: Vec<_> = mappings
        .iter()
        .map(|mapping| Mapping {
            address: mapping.base_host_virt_addr,
            first: (mapping.offset / page) as u32,
            count: (mapping.size / page) as u32,
        })
        .collect();
    let whole = |mapping: &Mapping| mapping.first == 0 && mapping.count == memory.blocks();
    if mappings.len() != 1 || !mappings.iter().all(whole) {
        return Err(GuestError::new(format!(
            "the guest says that it maps its memory as {mappings:?}: one mapping of {} pages is \
             expected",
            memory.blocks()
        )));
    }
    Ok(Region {
        memory: Arc::clone(memory),
        mappings,
    })
}

/// What telling a guest to stop came to: one that has ended before is as good.
pub fn ended(stopped: Result<(), ControlError>) -> GuestResult<()> {
    match stopped {
        Ok(()) | Err(ControlError::Unreachable(..)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl From<ControlError> for GuestError {
    fn from(error: ControlError) -> Self {
        caused_by(error)
    }
}

fn caused_by(error: ControlError) -> GuestError {
    match std::error::Error::source(&error) {
        None => GuestError::new(error.to_string()),
        Some(_) => GuestError::caused("the embedded guest cannot be reached", error),
    }
}
