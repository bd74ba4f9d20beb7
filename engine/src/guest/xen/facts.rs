//! What the destination is told of a domain before anything moves.

use std::collections::BTreeMap;

use crate::guest::workload::control::{from_hex, to_hex};

/// The kind of guest.
pub const KIND: &str = "xen";
/// The longest value of one fact, in bytes.
const MAX_FACT: usize = 64 << 10;

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Configuration, as `xl list -l` shows it.
    pub config: String,
    /// Leaves of CPUID.
    pub cpuid: Vec<u8>,
    /// MSRs.
    pub msrs: Vec<u8>,
    /// Version of the hypervisor.
    pub xen: (u32, u32),
    /// The gfn that is meant for the paging ring.
    pub ring: u64,
    /// vCPUs.
    pub vcpus: u32,
}

impl Facts {
    /// By name, for the offer.
    pub fn to_map(&self) -> BTreeMap<String, String> {
        let facts = [
            ("config", self.config.clone()),
            ("cpuid", to_hex(&self.cpuid)),
            ("msrs", to_hex(&self.msrs)),
            ("xen", format!("{}.{}", self.xen.0, self.xen.1)),
            ("paging-ring", format!("{:x}", self.ring)),
            ("vcpus", self.vcpus.to_string()),
        ];
        facts.map(|(name, value)| (name.to_owned(), value)).into()
    }

    /// From an offer.
    pub fn of_map(map: &BTreeMap<String, String>) -> Result<Self, String> {
        let get = |name: &str| match map.get(name) {
            Some(value) if value.len() <= MAX_FACT => Ok(value.as_str()),
            Some(value) => Err(format!("the offer's '{name}' has {} bytes", value.len())),
            None => Err(format!("the offer tells no '{name}' of the domain")),
        };
        let wrong = |name: &str| format!("the offer's '{name}' is no such thing");
        let (major, minor) = get("xen")?.split_once('.').ok_or_else(|| wrong("xen"))?;
        let number = |text: &str, name: &str| text.parse().map_err(|_| wrong(name));
        Ok(Self {
            config: get("config")?.to_owned(),
            cpuid: from_hex(get("cpuid")?).map_err(|_| wrong("cpuid"))?,
            msrs: from_hex(get("msrs")?).map_err(|_| wrong("msrs"))?,
            xen: (number(major, "xen")?, number(minor, "xen")?),
            ring: u64::from_str_radix(get("paging-ring")?, 16).map_err(|_| wrong("paging-ring"))?,
            vcpus: number(get("vcpus")?, "vcpus")?,
        })
    }
}
