//! A Xen domain at the source: writes tracked by Xen's log-dirty mode, pages read by foreign mapping, suspended by its
//! own hand as `xl` does it. It must never let a domain run that was released, and never leave one suspended without
//! saying so.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hybridmig_pager::xen::ring::PARAM_PAGING_RING;
use hybridmig_pager::xen::{DomainInfo, Store, Xen};
use hybridmig_transport::message::{GuestDescription, RegionInfo};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::backends;
use super::config::Config;
use super::device_model::DeviceModel;
use super::facts::{self, Facts};
use super::spans::Spans;
use super::stream::{PARAMS, Tail};
use super::toolstack;
use super::windows::Windows;
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::guest::qemu::disk::DiskChoice;
use crate::guest::qemu::preflight::{Finding, Level};
use crate::guest::{GuestError, GuestResult, SourceGuest};
use crate::session::source::GuestUse;

/// How long the guest may take to suspend itself.
const SUSPEND_LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked at meanwhile.
const SUSPEND_POLL: Duration = Duration::from_micros(500);
/// `HVM_PARAM_CALLBACK_IRQ`: set by a guest that has PV drivers, which can suspend itself.
const PARAM_CALLBACK_IRQ: u32 = 0;

/// A running domain that is to leave.
pub struct XenSource {
    xen: Arc<Xen>,
    store: Store,
    domain: u32,
    description: GuestDescription,
    spans: Spans,
    regions: Vec<RegionInfo>,
    vcpus: u32,
    /// The gfn of the paging ring, which does not move.
    ring: u64,
    /// Pages that it had when it was opened.
    pages: u64,
    findings: Vec<Finding>,
    windows: Windows,
    /// Held as long as this lives: two that track one domain would each miss what the other has seen, and none may run
    /// it while another hands it over.
    _lock: File,
    /// Of an HVM domain.
    device_model: Option<DeviceModel>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    tracking: bool,
    frozen: bool,
    released: bool,
    /// Found by a look that was not asked for, to be reported by the next that is.
    found: BlockSet,
    /// Written while the guest suspended itself.
    last: Blocks,
    /// State of the device model, which is stopped.
    emulator: Option<Vec<u8>>,
}

/// What failed, on what.
fn failed(what: &str, name: &str, error: io::Error) -> GuestError {
    GuestError::caused(format!("cannot {what} domain '{name}'"), error)
}

/// Makes sure that no other process of hybridmig is at work on the domain.
fn lock(domain: u32, name: &str) -> GuestResult<File> {
    let path = format!("/run/hybridmig-domain-{domain}.lock");
    let cannot =
        |error| GuestError::caused(format!("cannot lock {path} for domain '{name}'"), error);
    let file = File::create(&path).map_err(cannot)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(GuestError::new(format!(
            "another hybridmig is at work on domain '{name}': wait for it, or end it"
        ))),
        Err(error) => Err(cannot(error.into())),
    }
}

/// Opens Xen's interfaces, or says what is missing.
pub(super) fn open_xen() -> GuestResult<Arc<Xen>> {
    Xen::open().map(Arc::new).map_err(|error| {
        GuestError::caused(
            "cannot use Xen: this has to be root in dom0 of a Xen host",
            error,
        )
    })
}

impl XenSource {
    /// Looks at the domain with that name or number, and makes sure that it can leave. Changes nothing.
    pub fn open(name: &str, disks: &DiskChoice) -> GuestResult<Self> {
        Self::of_domain(name, Some(disks))
    }

    /// The domain that a `send` which has ended (killed, say) left suspended, to be run again by [`SourceGuest::thaw`].
    pub fn left_suspended(name: &str) -> GuestResult<Self> {
        Self::of_domain(name, None)
    }

    fn of_domain(name: &str, disks: Option<&DiskChoice>) -> GuestResult<Self> {
        let left = disks.is_none();
        let xen = open_xen()?;
        let (domain, config) = toolstack::domain(name)?;
        let name = config.name().to_owned();
        let lock = lock(domain, &name)?;
        let cannot = |what, error| failed(what, &name, error);
        let info = xen
            .domain(domain)
            .map_err(|error| cannot("look at", error))?
            .ok_or_else(|| GuestError::new(format!("domain '{name}' is gone")))?;
        let mut objections = objections(&config, &info);
        if let Some(disks) = disks {
            objections.extend(config.unshared(disks));
        }
        if left && !info.suspended() {
            return Err(GuestError::new(format!(
                "domain '{name}' is not suspended: nobody has left it so"
            )));
        }
        if !left && !objections.is_empty() {
            return Err(GuestError::new(objections.join("; ")));
        }
        let runs = xen
            .populated(domain)
            .map_err(|error| cannot("map the memory of", error))?;
        let ring = xen
            .param(domain, PARAM_PAGING_RING)
            .map_err(|error| cannot("ask for the parameters of", error))?;
        let spans = Spans::of_runs(&runs, ring).map_err(GuestError::new)?;
        let (cpuid, msrs) = xen
            .cpu_policy(domain)
            .map_err(|error| cannot("ask for the CPU policy of", error))?;
        let version = xen
            .version()
            .map_err(|error| cannot("ask for the hypervisor of", error))?;
        let description = GuestDescription {
            kind: facts::KIND.into(),
            name: name.clone(),
            facts: Facts {
                config: config.to_string(),
                cpuid,
                msrs,
                xen: version,
                ring,
                vcpus: info.vcpus,
            }
            .to_map(),
        };
        let store = Store::open().map_err(|error| cannot("use xenstore for", error))?;
        let device_model = config
            .has_device_model()
            .then(|| DeviceModel::of(&store, domain))
            .transpose()?;
        let findings = vec![
            Finding {
                level: Level::Ok,
                text: format!(
                    "domain {domain} '{name}' is {} with {} vCPU(s), {} MiB in {} runs of memory, and {} disks and \
                     network interfaces, which the toolstack makes anew",
                    config.kind(),
                    info.vcpus,
                    info.pages >> 8,
                    spans.spans().len(),
                    config.devices().len()
                ),
            },
            Finding {
                level: Level::Ok,
                text: format!(
                    "Xen {}.{} tracks its writes by nested paging",
                    version.0, version.1
                ),
            },
        ];
        Ok(Self {
            regions: spans.regions(),
            spans,
            description,
            domain,
            ring,
            vcpus: info.vcpus,
            pages: info.pages,
            findings,
            windows: Windows::new(Arc::clone(&xen), domain),
            // Whoever left it has left its writes tracked.
            state: Mutex::new(State {
                tracking: left,
                frozen: left,
                ..State::default()
            }),
            device_model,
            _lock: lock,
            store,
            xen,
        })
    }

    /// What was found when it was opened.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    fn name(&self) -> &str {
        &self.description.name
    }

    fn failed(&self, what: &str, error: io::Error) -> GuestError {
        failed(what, self.name(), error)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn info(&self) -> GuestResult<DomainInfo> {
        let info = self.xen.domain(self.domain);
        info.map_err(|error| self.failed("look at", error))?
            .ok_or_else(|| GuestError::new(format!("domain '{}' is gone", self.name())))
    }

    /// The gfns that were written since the last look.
    fn look(&self) -> GuestResult<BlockSet> {
        let dirty = self
            .xen
            .take_dirty(self.domain, self.spans.end())
            .map_err(|error| self.failed("ask what was written by", error))?;
        self.windows.reported(&dirty);
        Ok(dirty)
    }

    /// Has the guest suspend itself, as `libxl__domain_suspend_common` does: by the word `suspend` in xenstore, which
    /// it takes away when it begins.
    fn suspend(&self) -> GuestResult<()> {
        let own_hand = self
            .xen
            .param(self.domain, PARAM_CALLBACK_IRQ)
            .map_err(|error| self.failed("ask for the parameters of", error))?;
        let word = format!("/local/domain/{}/control/shutdown", self.domain);
        if own_hand == 0 {
            self.xen
                .force_suspend(self.domain)
                .map_err(|error| self.failed("suspend", error))?;
        } else {
            self.store
                .write(&word, "suspend")
                .map_err(|error| self.failed("ask for the suspension of", error))?;
        }
        let deadline = Instant::now() + SUSPEND_LIMIT;
        loop {
            let info = self.info()?;
            if info.suspended() {
                return Ok(());
            }
            if let Some(reason) = info.shutdown {
                return Err(GuestError::new(format!(
                    "domain '{}' shut down for another reason ({reason}) when it was to suspend itself",
                    self.name()
                )));
            }
            if Instant::now() > deadline {
                let heard = self
                    .store
                    .read(&word)
                    .is_ok_and(|value| value != Some(b"suspend".to_vec()));
                // So that it does not suspend itself when nobody waits any more.
                self.store
                    .write(&word, "")
                    .map_err(|error| self.failed("take back the suspension of", error))?;
                return Err(GuestError::new(format!(
                    "domain '{}' did not suspend itself within {} s ({}): has its kernel PV drivers?",
                    self.name(),
                    SUSPEND_LIMIT.as_secs(),
                    if heard {
                        "it had begun to"
                    } else {
                        "it did not answer"
                    }
                )));
            }
            thread::sleep(SUSPEND_POLL);
        }
    }
}

/// Why the domain cannot leave, if it cannot.
fn objections(config: &Config, info: &DomainInfo) -> Vec<String> {
    let name = config.name();
    let mut found = config.objections();
    if info.hvm && !info.hap {
        found.push(format!(
            "domain '{name}' does not use nested paging (hap=0): its writes cannot be tracked"
        ));
    }
    if info.dying || info.shutdown.is_some() || info.paused {
        found.push(format!(
            "domain '{name}' does not run (paused: {}, shut down: {}): `hybridmig resolve` tells whether it was \
             handed over",
            info.paused,
            info.shutdown.is_some()
        ));
    }
    if info.paged_out > 0 {
        found.push(format!(
            "domain '{name}' still lacks {} pages itself",
            info.paged_out
        ));
    }
    found
}

impl SourceGuest for XenSource {
    fn describe(&self) -> &GuestDescription {
        &self.description
    }

    fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    fn guest_use(&self) -> GuestUse {
        GuestUse {
            parallelism: self.vcpus.max(1),
            ..GuestUse::default()
        }
    }

    fn start_tracking(&self) -> GuestResult<Blocks> {
        let mut state = self.lock();
        // Somebody may have left it on: this process, or one that was killed.
        if self.xen.log_dirty(self.domain).is_err() {
            self.xen
                .stop_log_dirty(self.domain)
                .and_then(|()| self.xen.log_dirty(self.domain))
                .map_err(|error| self.failed("track the writes of", error))?;
        }
        *state = State {
            tracking: true,
            ..State::default()
        };
        if let Some(model) = &self.device_model {
            model.report_writes(true)?;
        }
        Ok(self.spans.all())
    }

    fn take_dirty(&self) -> GuestResult<Blocks> {
        let mut dirty = self.look()?;
        dirty |= std::mem::take(&mut self.lock().found);
        Ok(self.spans.blocks(&dirty))
    }

    fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        let gfn = self.spans.gfn(region, block).ok_or_else(|| {
            GuestError::new(format!("the domain has no block {block} of {region}"))
        })?;
        self.windows
            .read(gfn, buf)
            .map_err(|error| self.failed("map the memory of", error))
    }

    fn freeze(&self) -> GuestResult<()> {
        // What is written from here to the end of its suspension has to be there before it runs again: it holds what
        // Xen is told anew by a guest that resumes (vcpu_info, the FIFO's control blocks), and Xen cannot wait for a
        // page.
        let before = self.look()?;
        self.suspend()?;
        // From here on it must not write any more; a failure below ends in `thaw`, which lets it go on.
        let emulator = self
            .device_model
            .as_ref()
            .map(DeviceModel::stop)
            .transpose()?;
        backends::wait_until_idle(&self.store, self.domain)?;
        let during = self.look()?;
        let info = self.info()?;
        if info.pages != self.pages {
            let runs = self.xen.populated(self.domain);
            let runs = runs.map_err(|error| self.failed("map the memory of", error))?;
            let new = runs
                .into_iter()
                .flatten()
                .find(|gfn| *gfn != self.ring && !self.spans.covers(*gfn));
            if let Some(new) = new {
                return Err(GuestError::new(format!(
                    "domain '{}' got memory at gfn {new:#x} while it was moved: migrate again",
                    self.name()
                )));
            }
        }
        let mut state = self.lock();
        state.frozen = true;
        state.emulator = emulator;
        state.last = self.spans.blocks(&during);
        state.last.union_with(&self.spans.special());
        // dom0 writes to these by mappings of its own, which are not tracked.
        state.found |= before | during | self.spans.special_gfns();
        Ok(())
    }

    fn before_resume(&self) -> Blocks {
        self.lock().last.clone()
    }

    fn save_state(&self) -> GuestResult<Vec<u8>> {
        let emulator = {
            let state = self.lock();
            if !state.frozen {
                return Err(GuestError::new("the domain has to be suspended first"));
            }
            state.emulator.clone()
        };
        let saved = || -> io::Result<Tail> {
            let mut params = Vec::new();
            for param in PARAMS {
                match self.xen.param(self.domain, param)? {
                    0 => {}
                    value => params.push((param, value)),
                }
            }
            Ok(Tail {
                tsc: self.xen.tsc_info(self.domain)?,
                context: self.xen.hvm_context(self.domain)?,
                params,
                emulator,
            })
        };
        let tail = saved().map_err(|error| self.failed("save the state of", error))?;
        Ok(tail.bytes())
    }

    fn thaw(&self) -> GuestResult<()> {
        let mut state = self.lock();
        if state.released {
            return Err(GuestError::new(
                "the domain has been released to the destination and must not run here",
            ));
        }
        self.windows.clear();
        if self.info()?.suspended() {
            if let Some(model) = &self.device_model {
                model.go_on()?;
            }
            let resumed = self
                .xen
                .resume(self.domain, true)
                .and_then(|()| self.store.resumed(self.domain));
            resumed.map_err(|error| {
                let name = self.name();
                GuestError::caused(
                    format!("domain '{name}' could not be run again; it is suspended here: see `xl list`"),
                    error,
                )
            })?;
        }
        let tracking = std::mem::take(&mut state.tracking);
        *state = State::default();
        if tracking && let Err(error) = self.xen.stop_log_dirty(self.domain) {
            // The guest runs, which is what matters.
            tracing::warn!(%error, "the domain runs, but its writes are still tracked");
        }
        if tracking
            && let Some(model) = &self.device_model
            && let Err(error) = model.report_writes(false)
        {
            let error = error.chain();
            tracing::warn!(
                error,
                "the domain runs, but its device model still reports its writes"
            );
        }
        match self.info()?.shutdown {
            None => Ok(()),
            Some(reason) => Err(GuestError::new(format!(
                "domain '{}' was told to run again, but has shut down (reason {reason})",
                self.name()
            ))),
        }
    }

    fn release(&self) -> GuestResult<()> {
        self.lock().released = true;
        self.windows.clear();
        toolstack::destroy(self.domain)
    }
}
