//! What both ends of a migration must agree on about an embedded guest, and where its memory is.

use std::collections::BTreeMap;
use std::sync::Arc;

use hybridmig_pager::{Mapping, PAGE_SIZE, PagerError, Region, RegionMemory};
use hybridmig_transport::message::GuestDescription;

use super::control::{ControlError, FORMAT, GuestMapping};
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
    let page = PAGE_SIZE as u64;
    let mappings = mappings
        .iter()
        .map(|mapping| {
            let GuestMapping {
                base_host_virt_addr: address,
                size,
                offset,
                ..
            } = *mapping;
            let whole = [address, size, offset]
                .iter()
                .all(|number| number.is_multiple_of(page));
            let within = offset
                .checked_add(size)
                .is_some_and(|end| end <= memory.len());
            if !whole || !within || size == 0 || address.checked_add(size).is_none() {
                return Err(GuestError::new(format!(
                    "the guest says that it maps {size} bytes from {offset} of its memory at \
                     {address:#x}, which cannot be"
                )));
            }
            Ok(Mapping {
                address,
                first: (offset / page) as u32,
                count: (size / page) as u32,
            })
        })
        .collect::<GuestResult<Vec<_>>>()?;
    let covered: u64 = mappings.iter().map(Mapping::len).sum();
    if covered < memory.len() {
        return Err(GuestError::new(
            "the guest does not say where it maps all of its memory",
        ));
    }
    Ok(Region {
        memory: Arc::clone(memory),
        mappings,
    })
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
