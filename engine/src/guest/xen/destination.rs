//! A Xen domain at the destination: made by `xl restore` from a stream that names its pages and holds none, filled by
//! foreign mapping, and paged by the hypervisor when it runs. It must never let the domain run before
//! [`DestinationGuest::resume`], and never destroy one that runs.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use hybridmig_pager::MissingMap;
use hybridmig_pager::xen::{DomainPager, Xen};
use hybridmig_transport::message::{Mode, Offer, Refusal, RefusalCode};
use serde::{Deserialize, Serialize};

use super::config::Config;
use super::facts::{self, Facts};
use super::source::open_xen;
use super::spans::Spans;
use super::stream::{Prelude, Tail};
use super::toolstack::{self, Restoring};
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::guest::paging::PagerSink;
use crate::guest::{BlockedTime, DestinationGuest, FaultSink, GuestError, GuestResult};
use crate::records;

/// What another process finds in the folder that is kept for it.
const RECORD: &str = "xen.json";
/// What is still missing.
const MISSING: &str = "missing-xen";
const VERSION: u32 = 1;
/// Largest record that is read, in bytes.
const RECORD_LIMIT: u64 = 1 << 16;
const PAGE: usize = 4096;
/// A chunk of zeroes.
static ZEROES: [u8; 64 * PAGE] = [0; 64 * PAGE];
/// Memory that has to remain to Xen and dom0, in bytes.
const MEMORY_MARGIN: u64 = 16 << 20;
/// Behind the name of a domain that is not complete, as `xl migrate-receive` has it.
const INCOMING: &str = "--incoming";

/// A domain that comes.
pub struct XenDestination {
    /// Folder for what another process would take over by.
    keep_in: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    restoring: Option<Restoring>,
    here: Option<Arc<Here>>,
    record: Option<Record>,
    resumed: bool,
    renaming: Option<JoinHandle<()>>,
}

struct Here {
    xen: Arc<Xen>,
    domain: u32,
    name: String,
    spans: Spans,
    vcpus: u32,
    pager: DomainPager,
}

/// What another process goes on by.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    domain: u32,
    name: String,
    /// First gfn and end of each run of memory.
    runs: Vec<(u64, u64)>,
    vcpus: u32,
    ring: u64,
    /// Xen's port of the paging events; none where the domain is not paged.
    port: Option<u32>,
}

fn refuse(reason: impl Into<String>) -> Refusal {
    Refusal {
        code: RefusalCode::Guest,
        reasons: vec![reason.into()],
    }
}

fn failed(what: &str, error: io::Error) -> GuestError {
    GuestError::caused(format!("cannot {what}"), error)
}

/// What an offer means here.
struct Offered {
    facts: Facts,
    config: Config,
    spans: Spans,
}

impl Offered {
    fn of(offer: &Offer) -> Result<Self, Refusal> {
        if offer.guest.kind != facts::KIND {
            return Err(refuse(format!(
                "the guest is a {} guest, this side waits for a Xen domain",
                offer.guest.kind
            )));
        }
        let facts = Facts::of_map(&offer.guest.facts).map_err(refuse)?;
        let config = Config::parse(&facts.config).map_err(refuse)?;
        let objections = config.objections();
        if !objections.is_empty() {
            return Err(Refusal {
                code: RefusalCode::Guest,
                reasons: objections,
            });
        }
        Ok(Self {
            spans: Spans::of_regions(&offer.regions).map_err(refuse)?,
            config,
            facts,
        })
    }
}

impl XenDestination {
    /// Nothing is asked or made before [`DestinationGuest::check`].
    pub fn new(keep_in: Option<PathBuf>) -> Self {
        Self {
            keep_in,
            state: Mutex::default(),
        }
    }

    /// Whether another process has kept a domain in this folder.
    pub fn is_kept_in(folder: &Path) -> bool {
        folder.join(RECORD).exists()
    }

    /// Goes on with a domain whose pager has ended (killed, say) while blocks were missing. Xen's ring has stayed,
    /// with a note of who waits. Returns the blocks that are missing; before any fault `note` is told of them.
    pub fn adopt(
        folder: &Path,
        faults: Arc<dyn FaultSink>,
        note: &dyn Fn(&Blocks) -> GuestResult<()>,
    ) -> GuestResult<(Self, Blocks)> {
        let path = folder.join(RECORD);
        let record: Record = records::read(&path, RECORD_LIMIT)
            .map_err(|error| failed(&format!("read {}", path.display()), error))?;
        if record.version != VERSION {
            return Err(GuestError::new(format!(
                "{} was written by another version of hybridmig",
                path.display()
            )));
        }
        let runs: Vec<_> = record
            .runs
            .iter()
            .map(|(first, end)| *first..*end)
            .collect();
        let spans = Spans::of_runs(&runs, record.ring).map_err(GuestError::new)?;
        let missing = MissingMap::open(&folder.join(MISSING))
            .map(Arc::new)
            .map_err(|error| GuestError::caused("cannot take the domain over", error))?;
        let left = missing_blocks(&missing, &spans);
        note(&left)?;
        let xen = open_xen()?;
        let port = record
            .port
            .ok_or_else(|| GuestError::new("the domain was not paged"))?;
        let pager = DomainPager::adopt(
            Arc::clone(&xen),
            record.domain,
            spans.spans().to_vec(),
            missing,
            (record.ring, port),
            Arc::new(PagerSink(faults)),
        )?;
        let here = Here {
            xen,
            domain: record.domain,
            name: record.name.clone(),
            spans,
            vcpus: record.vcpus,
            pager,
        };
        let this = Self {
            keep_in: Some(folder.to_owned()),
            state: Mutex::new(State {
                here: Some(Arc::new(here)),
                record: Some(record),
                // It was accepted, and may run.
                resumed: true,
                ..State::default()
            }),
        };
        Ok((this, left))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn here(&self) -> GuestResult<Arc<Here>> {
        let here = self.lock().here.clone();
        here.ok_or_else(|| GuestError::new("no domain has been prepared here"))
    }

    fn write_record(&self, record: &Record) -> GuestResult<()> {
        let Some(folder) = &self.keep_in else {
            return Ok(());
        };
        let path = folder.join(RECORD);
        records::write(&path, record)
            .map_err(|error| failed(&format!("write {}", path.display()), error))
    }
}

fn missing_blocks(missing: &MissingMap, spans: &Spans) -> Blocks {
    let regions = 0..spans.spans().len() as u16;
    regions
        .map(|region| (RegionId(region), missing.to_bitmap(region)))
        .collect()
}

impl Here {
    /// A chunk at a time: each is mapped by itself.
    fn zero(&self, region: RegionId, mut first: u32, mut count: u32) -> GuestResult<()> {
        while count > 0 {
            let pages = count.min(ZEROES.len() as u32 / PAGE as u32);
            let zeroes = &ZEROES[..pages as usize * PAGE];
            self.pager.pages().write(region.0, first, zeroes)?;
            first += pages;
            count -= pages;
        }
        Ok(())
    }
}

impl DestinationGuest for XenDestination {
    fn check(&self, offer: &Offer) -> Result<Vec<String>, Refusal> {
        let offered = Offered::of(offer)?;
        let xen = open_xen().map_err(|error| refuse(error.chain()))?;
        let unknown = |error: io::Error| refuse(format!("Xen does not answer: {error}"));
        let (version, free) = (
            xen.version().map_err(unknown)?,
            xen.free_memory().map_err(unknown)?,
        );
        let paging = xen.has_paging().map_err(unknown)?;
        let mut reasons = offered.config.lacking(Path::exists);
        if version < offered.facts.xen {
            let (major, minor) = offered.facts.xen;
            reasons.push(format!(
                "the domain comes from Xen {major}.{minor}, this is {}.{}: an older Xen cannot take it",
                version.0, version.1
            ));
        }
        if !paging && offer.mode != Mode::Precopy {
            reasons.push(
                "this hypervisor was built without memory paging (CONFIG_MEM_PAGING), which post-copy needs: \
                 boot one that has it \
                 (docs/xen.md), or send with --mode precopy"
                    .to_owned(),
            );
        }
        let name = offered.config.name();
        for taken in [name.to_owned(), format!("{name}{INCOMING}")] {
            if let Some(domain) = toolstack::number(&taken) {
                reasons.push(format!(
                    "there is a domain '{taken}' here already (number {domain}): rename or destroy it"
                ));
            }
        }
        let wanted = offered.spans.pages() * PAGE as u64 + MEMORY_MARGIN;
        if free < wanted {
            reasons.push(format!(
                "{} MiB of memory are free here, the domain needs {} MiB: free some (xl mem-set, or dom0_mem= at boot)",
                free >> 20,
                wanted >> 20
            ));
        }
        if !reasons.is_empty() {
            return Err(Refusal {
                code: RefusalCode::Guest,
                reasons,
            });
        }
        let with = if paging { "with" } else { "without" };
        Ok(vec![
            format!("Xen {}.{} {with} memory paging", version.0, version.1),
            format!(
                "{} MiB of memory free for {} MiB of domain",
                free >> 20,
                wanted >> 20
            ),
        ])
    }

    fn prepare(&self, offer: &Offer) -> GuestResult<()> {
        let offered = Offered::of(offer).map_err(|refusal| GuestError::new(refusal.to_string()))?;
        let mut state = self.lock();
        if state.here.is_some() {
            return Err(GuestError::new("a domain has been prepared here already"));
        }
        let xen = open_xen()?;
        let name = offered.config.name().to_owned();
        let incoming = format!("{name}{INCOMING}");
        let prelude = Prelude {
            config: offered.config.renamed(&incoming).to_string(),
            cpuid: offered.facts.cpuid,
            msrs: offered.facts.msrs,
            xen: offered.facts.xen,
            populated: offered.spans.runs(),
        };
        // What is found by that name below has to be the one that is made here.
        if let Some(domain) = toolstack::number(&incoming) {
            return Err(GuestError::new(format!(
                "there is a domain '{incoming}' here already (number {domain}): destroy it"
            )));
        }
        let mut restoring = Restoring::start()?;
        restoring.give(&prelude.bytes())?;
        let last = offered.spans.end() - 1;
        let domain = restoring.wait_for(&incoming, |domain| {
            // Pages get their memory in the order in which they were named.
            let mapping = xen.map(domain, last, 1, false);
            mapping
                .map(|mapping| mapping.has(0))
                .map_err(|error| failed("map the memory of the domain that comes", error))
        })?;
        let lengths: Vec<u32> = offered
            .spans
            .spans()
            .iter()
            .map(|span| span.blocks)
            .collect();
        let missing = match &self.keep_in {
            Some(folder) => MissingMap::create(&folder.join(MISSING), &lengths)?,
            None => MissingMap::in_memory(&lengths)?,
        };
        let spans = offered.spans.spans().to_vec();
        let pager = DomainPager::new(Arc::clone(&xen), domain, spans, Arc::new(missing));
        let mut record = Record {
            version: VERSION,
            domain,
            name: name.clone(),
            runs: offered
                .spans
                .runs()
                .into_iter()
                .map(|run| (run.start, run.end))
                .collect(),
            vcpus: offered.facts.vcpus,
            ring: offered.facts.ring,
            port: None,
        };
        if offer.mode != Mode::Precopy {
            record.port = Some(pager.enable(offered.facts.ring)?);
        }
        if offer.mode == Mode::Postcopy {
            // Not in the downtime: hardly anything comes before it.
            let special = offered.spans.special();
            for (region, all) in offered.spans.all().iter() {
                if special.get(region).is_none() {
                    pager.pages().evict(region.0, all)?;
                }
            }
        }
        state.record = Some(record);
        state.restoring = Some(restoring);
        state.here = Some(Arc::new(Here {
            xen,
            domain,
            name,
            vcpus: offered.facts.vcpus,
            spans: offered.spans,
            pager,
        }));
        Ok(())
    }

    fn write(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        Ok(self.here()?.pager.pages().write(region.0, first, data)?)
    }

    fn write_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        self.here()?.zero(region, first, count)
    }

    fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        Ok(self.here()?.pager.pages().read(region.0, block, buf)?)
    }

    fn arm(
        &self,
        missing: &Blocks,
        written: &Blocks,
        faults: Arc<dyn FaultSink>,
    ) -> GuestResult<()> {
        let here = self.here()?;
        let record = self.lock().record.clone();
        if let Some(record) = record {
            if record.port.is_none() && !missing.is_empty() {
                return Err(GuestError::new(
                    "blocks are missing of a domain that is not paged",
                ));
            }
            self.write_record(&record)?;
        }
        let mut unwritten = here.spans.all();
        unwritten.subtract(missing);
        unwritten.subtract(written);
        for (region, block) in unwritten.iter_blocks() {
            here.zero(region, block, 1)?;
        }
        let regions = 0..here.spans.spans().len() as u16;
        let sets: Vec<BlockSet> = regions
            .map(|region| missing.get(RegionId(region)).cloned().unwrap_or_default())
            .collect();
        here.pager.pages().arm(&sets)?;
        Ok(here.pager.serve(Arc::new(PagerSink(faults)))?)
    }

    fn load_state(&self, state: &[u8]) -> GuestResult<()> {
        let tail = Tail::parse(state)
            .map_err(|error| GuestError::caused("the domain's state cannot be used", error))?;
        let restoring = self.lock().restoring.take();
        let mut restoring = restoring
            .ok_or_else(|| GuestError::new("the domain has been given a state already"))?;
        restoring.give(&tail.bytes())?;
        restoring.finish()
    }

    fn resume(&self) -> GuestResult<()> {
        let here = self.here()?;
        let paused = here
            .xen
            .domain(here.domain)
            .map(|info| info.is_some_and(|info| info.paused));
        let mut state = self.lock();
        state.resumed = true;
        // One that was taken over runs already.
        if paused.map_err(|error| failed("look at the domain", error))? {
            here.xen.unpause(here.domain).map_err(|error| {
                failed(
                    &format!("run the domain (try `xl unpause {}`)", here.domain),
                    error,
                )
            })?;
        }
        let (domain, name) = (here.domain, here.name.clone());
        // The guest need not wait for it.
        state.renaming = Some(thread::spawn(move || {
            if let Err(error) = toolstack::rename(domain, &name) {
                tracing::warn!(
                    error = error.chain(),
                    "the domain keeps the name {name}{INCOMING}"
                );
            }
        }));
        Ok(())
    }

    fn place(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        Ok(self.here()?.pager.pages().place(region.0, first, data)?)
    }

    fn place_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        Ok(self
            .here()?
            .pager
            .pages()
            .place_zero(region.0, first, count)?)
    }

    fn disarm(&self) -> GuestResult<BlockedTime> {
        let here = self.here()?;
        let stats = here.pager.finish()?;
        let mut state = self.lock();
        if let Some(renaming) = state.renaming.take()
            && renaming.join().is_err()
        {
            tracing::warn!("the thread that renames the domain has panicked");
        }
        if state.record.take().is_some()
            && let Some(folder) = &self.keep_in
        {
            for name in [RECORD, MISSING] {
                let path = folder.join(name);
                if let Err(error) = std::fs::remove_file(&path)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(%error, path = %path.display(), "cannot remove what nobody needs any more");
                }
            }
        }
        Ok(BlockedTime::from_pager(stats, here.vcpus))
    }

    fn abandon(&self) -> GuestResult<()> {
        let mut state = self.lock();
        if state.resumed {
            return Err(GuestError::new(
                "the domain runs here and is not abandoned any more",
            ));
        }
        state.record = None;
        // Ends xl first: it would see its domain vanish.
        state.restoring = None;
        let Some(here) = state.here.take() else {
            return Ok(());
        };
        // xl destroys what it could not restore; a complete domain is still there.
        match here.xen.domain(here.domain) {
            Ok(Some(info)) if !info.dying => toolstack::destroy(here.domain),
            Ok(_) => Ok(()),
            Err(error) => Err(failed("look at the domain", error)),
        }
    }

    fn blocked_time(&self) -> BlockedTime {
        self.here().map_or_else(
            |_| BlockedTime::default(),
            |here| BlockedTime::from_pager(here.pager.pages().stats(), here.vcpus),
        )
    }
}

impl Drop for XenDestination {
    fn drop(&mut self) {
        let loading = self.lock().restoring.is_some();
        if loading && let Err(error) = self.abandon() {
            tracing::error!(
                error = error.chain(),
                "a domain that is not complete may be left: see `xl list`"
            );
        }
    }
}
