//! A domain's configuration as the toolstack keeps it (`xl list -l`): what of it decides whether the domain can move.

use std::path::Path;

use serde_json::Value;

use crate::guest::qemu::disk::{DiskChoice, DiskTreatment};

/// Kinds of devices that keep a domain where it is, by their key in the configuration, and what they are. Their back
/// ends hold a state that nobody moves; those of disks and network interfaces hold none.
const DEVICES: [(&str, &str); 13] = [
    ("pcidevs", "passed-through PCI devices"),
    ("rdms", "reserved device memory"),
    ("dtdevs", "passed-through devices"),
    ("vfbs", "framebuffers"),
    ("vkbs", "keyboards"),
    ("vtpms", "TPMs"),
    ("p9s", "9pfs shares"),
    ("pvcallsifs", "PV calls"),
    ("vdispls", "displays"),
    ("vsnds", "sound"),
    ("channels", "channels"),
    ("usbctrls", "USB controllers"),
    ("usbdevs", "USB devices"),
];

/// See the module's text.
#[derive(Clone, Debug, PartialEq)]
pub struct Config(Value);

impl Config {
    /// Of what `xl list -l DOMAIN` prints: the domain's number and its configuration.
    pub fn of_list(text: &str) -> Result<(u32, Self), String> {
        let parsed: Value = serde_json::from_str(text)
            .map_err(|error| format!("`xl list -l` is not JSON: {error}"))?;
        let [domain] = parsed.as_array().map_or(&[][..], Vec::as_slice) else {
            return Err("`xl list -l` did not name one domain".into());
        };
        let id = domain["domid"]
            .as_u64()
            .and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or("`xl list -l` tells no number of the domain")?;
        Ok((id, Self::of_value(domain["config"].clone())?))
    }

    /// Of a configuration alone.
    pub fn parse(text: &str) -> Result<Self, String> {
        let value = serde_json::from_str(text);
        Self::of_value(value.map_err(|error| format!("the configuration is not JSON: {error}"))?)
    }

    fn of_value(value: Value) -> Result<Self, String> {
        let this = Self(value);
        if this.name().is_empty() || this.kind().is_empty() {
            return Err("the configuration tells no name and no type (xl of Xen 4.17 does)".into());
        }
        Ok(this)
    }

    /// The domain's name.
    pub fn name(&self) -> &str {
        self.0["c_info"]["name"].as_str().unwrap_or_default()
    }

    /// `pvh`, `hvm` or `pv`.
    pub fn kind(&self) -> &str {
        self.0["c_info"]["type"].as_str().unwrap_or_default()
    }

    /// The same domain under another name.
    #[must_use]
    pub fn renamed(&self, name: &str) -> Self {
        let mut value = self.0.clone();
        value["c_info"]["name"] = name.into();
        Self(value)
    }

    /// Whether a device model in dom0 belongs to it.
    pub fn has_device_model(&self) -> bool {
        self.kind() == "hvm"
    }

    /// Why such a domain cannot move, if it cannot.
    pub fn objections(&self) -> Vec<String> {
        let name = self.name();
        let mut found = Vec::new();
        match self.kind() {
            "pvh" => {}
            "hvm" => {
                let info = &self.0["b_info"];
                let is = |key: &str| info[key].as_str() == Some("True");
                if !matches!(info["device_model_version"].as_str(), None | Some("unknown" | "qemu_xen")) {
                    found.push(format!(
                        "domain '{name}' has another device model than QEMU (device_model_version): not supported"
                    ));
                }
                if is("device_model_stubdomain") || is("dm_restrict") {
                    found.push(format!(
                        "domain '{name}' has its device model in a stub domain, or deprivileged (dm_restrict): not \
                         supported"
                    ));
                }
            }
            "pv" => found.push(format!(
                "domain '{name}' is of type pv: its page tables hold the numbers of this host's memory, and Xen \
                 without shadow paging \
                 cannot track its writes; use `xl save` and `xl restore`, or make it pvh"
            )),
            other => found.push(format!("domain '{name}' is of type '{other}', which is not known")),
        }
        for (key, what) in DEVICES {
            let count = self.0[key].as_array().map_or(0, Vec::len);
            if count > 0 {
                found.push(format!(
                    "domain '{name}' has {what} ({count}): what their back ends hold of them does not move; \
                     detach them first"
                ));
            }
        }
        for device in self.devices() {
            if device.driver_domain {
                found.push(format!(
                    "{} of domain '{name}' is served by a driver domain, not by dom0: detach it first",
                    device.text()
                ));
            }
        }
        found
    }

    /// Disks that the operator has not said to lie on storage which both hosts reach. Xen's disks are not moved: their
    /// back ends are in dom0's kernel, past which nothing can be read or written in order.
    pub fn unshared(&self, choice: &DiskChoice) -> Vec<String> {
        let disks = self.devices().into_iter();
        disks
            .filter_map(|device| match device.kind {
                DeviceKind::Disk { path, .. } if choice.of(&device.name) != DiskTreatment::Skip => {
                    Some(format!(
                        "disk {name} of domain '{}' ({path}): disks of Xen domains are not moved. If both hosts \
                         reach the same storage at this path, say so with --disk {name}=skip",
                        self.name(),
                        name = device.name
                    ))
                }
                _ => None,
            })
            .collect()
    }

    /// What a host lacks of what this domain's devices lie on; `here` tells whether there is such a path.
    pub fn lacking(&self, here: impl Fn(&Path) -> bool) -> Vec<String> {
        let devices = self.devices().into_iter();
        devices
            .filter_map(|device| match &device.kind {
                // Only its own script knows what the target of such a disk means; the same of a network interface.
                DeviceKind::Disk { path, scripted } => {
                    let lacks = !scripted && path.starts_with('/') && !here(Path::new(path));
                    lacks.then(|| {
                        format!(
                            "disk {} lies at {path}, which this host does not have: both hosts have to reach it",
                            device.name
                        )
                    })
                }
                DeviceKind::Nic { bridge } => {
                    let bridge = bridge.as_deref()?;
                    let known = !bridge.contains('/')
                        && here(&Path::new("/sys/class/net").join(bridge).join("bridge"));
                    (!known).then(|| {
                        format!(
                            "network interface {} belongs to bridge '{bridge}', which this host does not have: make \
                             one (ip link add {bridge} type bridge)",
                            device.name
                        )
                    })
                }
            })
            .collect()
    }

    /// The disks and network interfaces.
    pub fn devices(&self) -> Vec<Device> {
        let of = |key: &str| self.0[key].as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let driver_domain = |device: &Value| {
            device["backend_domid"].as_u64().is_some_and(|id| id != 0)
                || !matches!(
                    device["backend_domname"].as_str(),
                    None | Some("" | "0" | "Domain-0")
                )
        };
        let disks = of("disks").into_iter().map(|disk| Device {
            name: text(&disk["vdev"]),
            driver_domain: driver_domain(&disk),
            kind: DeviceKind::Disk {
                path: text(&disk["pdev_path"]),
                // The toolstack names its usual one as well.
                scripted: (disk["script"].as_str())
                    .is_some_and(|script| Path::new(script).file_name() != Some("block".as_ref())),
            },
        });
        let nics = of("nics").into_iter().enumerate().map(|(at, nic)| Device {
            name: nic["devid"].as_u64().unwrap_or(at as u64).to_string(),
            driver_domain: driver_domain(&nic),
            kind: DeviceKind::Nic {
                bridge: nic["bridge"].as_str().map(str::to_owned).filter(|_| {
                    nic["script"].as_str().is_none_or(|script| {
                        Path::new(script).file_name() == Some("vif-bridge".as_ref())
                    })
                }),
            },
        });
        disks.chain(nics).collect()
    }
}

/// A disk or a network interface of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// `xvda`, or the interface's number.
    pub name: String,
    /// Whether another domain than dom0 serves it.
    pub driver_domain: bool,
    /// What it is.
    pub kind: DeviceKind,
}

/// See [`Device`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A disk.
    Disk {
        /// Where it lies, as its back end is told.
        path: String,
        /// Whether a script of its own makes sense of the path.
        scripted: bool,
    },
    /// A network interface.
    Nic {
        /// The bridge that Xen's usual script adds it to, if that one is used.
        bridge: Option<String>,
    },
}

impl Device {
    fn text(&self) -> String {
        match &self.kind {
            DeviceKind::Disk { path, .. } => format!("disk {} ({path})", self.name),
            DeviceKind::Nic { .. } => format!("network interface {}", self.name),
        }
    }
}

impl std::fmt::Display for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
