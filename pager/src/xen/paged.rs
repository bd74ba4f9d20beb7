//! Pages of a Xen domain that lie on another host: taken away here (nominated and evicted), brought in when they arrive
//! or when a vCPU waits for them. The hypervisor is a trait: tests hold this against a model of it.
//!
//! A page is brought in once, and a vCPU that waits for it is answered after that, never before.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use roaring::RoaringBitmap;

use super::ring::{BackRing, Request};
use crate::missing::MissingMap;
use crate::place::{FaultAnswer, FaultSink};
use crate::stats::{FaultStats, ThreadBlocked};
use crate::{PAGE_SIZE, PagerError, Result};

/// How often a page is tried that somebody holds: a mapping of it that is going away.
const BUSY_TRIES: u32 = 50;
/// How long between two tries.
const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// What the hypervisor can do to a page of the domain (`XENMEM_paging_op`).
pub trait Hypervisor: Send + Sync {
    /// Makes a page a candidate. EBUSY while anything else refers to it.
    fn nominate(&self, gfn: u64) -> io::Result<()>;
    /// Takes a candidate's memory away.
    fn evict(&self, gfn: u64) -> io::Result<()>;
    /// Gives a page memory again, with these contents. From then on the guest can use it.
    fn load(&self, gfn: u64, page: &[u8]) -> io::Result<()>;
    /// Writes pages that are present.
    fn write(&self, gfn: u64, data: &[u8]) -> io::Result<()>;
    /// Copies pages that are present.
    fn read(&self, gfn: u64, data: &mut [u8]) -> io::Result<()>;
    /// Tells Xen that there are responses on the ring.
    fn notify(&self) -> io::Result<()>;
}

/// The gfns of a region: consecutive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The gfn of its first block.
    pub first: u64,
    /// Its blocks.
    pub blocks: u32,
}

impl Span {
    /// Which of its blocks a gfn is, if it is one.
    pub fn block(&self, gfn: u64) -> Option<u32> {
        let block = gfn.checked_sub(self.first)?;
        (block < u64::from(self.blocks)).then_some(block as u32)
    }
}

/// See the module's text.
pub struct PagedDomain {
    hypervisor: Arc<dyn Hypervisor>,
    spans: Vec<Span>,
    /// What is still to come from the other host. Outlives this process.
    missing: Arc<MissingMap>,
    state: Mutex<State>,
}

struct State {
    /// By region: no memory behind it.
    out: Vec<RoaringBitmap>,
    /// Being brought in by a thread.
    loading: Vec<RoaringBitmap>,
    /// Who waits, by region and block.
    waiting: BTreeMap<(u16, u32), Vec<(Request, Instant)>>,
    ring: Option<BackRing>,
    faults: u64,
    zero: u64,
    latency_us: Histogram<u64>,
    /// By vCPU: how long, how often.
    blocked: BTreeMap<u32, (Duration, u64)>,
}

impl PagedDomain {
    /// A domain of which every page is present.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        spans: Vec<Span>,
        missing: Arc<MissingMap>,
    ) -> Self {
        let none = vec![RoaringBitmap::new(); spans.len()];
        Self {
            hypervisor,
            spans,
            missing,
            state: Mutex::new(State {
                out: none.clone(),
                loading: none,
                waiting: BTreeMap::new(),
                ring: None,
                faults: 0,
                zero: 0,
                latency_us: Histogram::new(3).expect("three digits are possible"),
                blocked: BTreeMap::new(),
            }),
        }
    }

    /// Goes on where another process ended: whatever is missing has no memory.
    pub fn take_over(
        hypervisor: Arc<dyn Hypervisor>,
        spans: Vec<Span>,
        missing: Arc<MissingMap>,
    ) -> Self {
        let this = Self::new(hypervisor, spans, missing);
        let mut state = this.lock();
        for (region, out) in state.out.iter_mut().enumerate() {
            *out = this.missing.to_bitmap(region as u16);
        }
        drop(state);
        this
    }

    /// Where Xen tells of faults from now on.
    pub fn set_ring(&self, ring: BackRing) {
        self.lock().ring = Some(ring);
    }

    /// With whom a pager that has ended has left waiting: `sink` hears of what they wait for.
    pub fn go_on(&self, waiting: Vec<Request>, sink: &dyn FaultSink) -> Result<()> {
        waiting
            .into_iter()
            .try_for_each(|request| self.handle(request, sink))
    }

    /// What is still to come.
    pub fn missing(&self) -> &Arc<MissingMap> {
        &self.missing
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn span(&self, region: u16, first: u32, count: u64) -> Result<Span> {
        let span = *self
            .spans
            .get(usize::from(region))
            .ok_or(PagerError::NoSuchRegion { region })?;
        if u64::from(first) + count > u64::from(span.blocks) {
            return Err(PagerError::OutOfRange {
                region,
                first,
                count,
                blocks: span.blocks,
            });
        }
        Ok(span)
    }

    /// Takes the memory of pages away; what was in them is lost. Those that have none already are passed over.
    pub fn evict(&self, region: u16, blocks: &RoaringBitmap) -> Result<()> {
        let last = blocks.max().map_or(0, |last| u64::from(last) + 1);
        let span = self.span(region, 0, last)?;
        let todo = blocks - &self.lock().out[usize::from(region)];
        for block in todo {
            let gfn = span.first + u64::from(block);
            self.evict_one(gfn)
                .map_err(|error| PagerError::os(format!("taking gfn {gfn:#x} away"), error))?;
            self.lock().out[usize::from(region)].insert(block);
        }
        Ok(())
    }

    fn evict_one(&self, gfn: u64) -> io::Result<()> {
        // Once it is a candidate it cannot become one again.
        while_busy(|| self.hypervisor.nominate(gfn))?;
        while_busy(|| self.hypervisor.evict(gfn))
    }

    /// Puts pages in place before the guest runs, over whatever they held.
    pub fn write(&self, region: u16, first: u32, data: &[u8]) -> Result<()> {
        let count = whole_pages(data)?;
        let span = self.span(region, first, count)?;
        let mut block = first;
        let mut rest = data;
        while !rest.is_empty() {
            // A run of pages that are all present, or one that is not.
            let run = {
                let state = self.lock();
                let out = &state.out[usize::from(region)];
                let pages = (rest.len() / PAGE_SIZE) as u32;
                (block..block + pages)
                    .take_while(|block| !out.contains(*block))
                    .count()
            };
            let gfn = span.first + u64::from(block);
            let taken = if run == 0 {
                self.load(region, block, gfn, &rest[..PAGE_SIZE])?;
                1
            } else {
                let bytes = run * PAGE_SIZE;
                self.hypervisor
                    .write(gfn, &rest[..bytes])
                    .map_err(|error| {
                        PagerError::os(format!("writing {run} pages at gfn {gfn:#x}"), error)
                    })?;
                run
            };
            block += taken as u32;
            rest = &rest[taken * PAGE_SIZE..];
        }
        Ok(())
    }

    /// Copies one page; one that has no memory reads as zero.
    pub fn read(&self, region: u16, block: u32, data: &mut [u8]) -> Result<()> {
        let span = self.span(region, block, 1)?;
        if self.lock().out[usize::from(region)].contains(block) {
            data.fill(0);
            return Ok(());
        }
        let gfn = span.first + u64::from(block);
        self.hypervisor
            .read(gfn, data)
            .map_err(|error| PagerError::os(format!("reading gfn {gfn:#x}"), error))
    }

    /// Before the guest runs: everything missing has no memory from now on, and everything else has.
    pub fn arm(&self, missing: &[RoaringBitmap]) -> Result<()> {
        for (region, missing) in missing.iter().enumerate() {
            let region = region as u16;
            self.missing.insert(region, missing)?;
            self.evict(region, missing)?;
            let unwanted = &self.lock().out[usize::from(region)] - missing;
            for block in unwanted {
                // Taken away early, and neither missing nor written since: zero at the other host.
                let gfn = self.span(region, block, 1)?.first + u64::from(block);
                self.load(region, block, gfn, &[0; PAGE_SIZE])?;
            }
        }
        Ok(())
    }

    /// Brings pages in and wakes who waits for them. One that is present keeps its contents.
    pub fn place(&self, region: u16, first: u32, data: &[u8]) -> Result<()> {
        let count = whole_pages(data)?;
        let span = self.span(region, first, count)?;
        for (block, page) in (first..).zip(data.chunks(PAGE_SIZE)) {
            self.load(region, block, span.first + u64::from(block), page)?;
        }
        Ok(())
    }

    /// Like [`Self::place`], with zeroes.
    pub fn place_zero(&self, region: u16, first: u32, count: u32) -> Result<()> {
        let span = self.span(region, first, u64::from(count))?;
        for block in first..first + count {
            self.load(
                region,
                block,
                span.first + u64::from(block),
                &[0; PAGE_SIZE],
            )?;
        }
        Ok(())
    }

    /// Gives one page its memory, if it has none and nobody else is at it.
    fn load(&self, region: u16, block: u32, gfn: u64, page: &[u8]) -> Result<()> {
        let at = usize::from(region);
        {
            let mut state = self.lock();
            if !state.out[at].remove(block) {
                return Ok(());
            }
            state.loading[at].insert(block);
        }
        let loaded = self.hypervisor.load(gfn, page);
        let mut state = self.lock();
        state.loading[at].remove(block);
        let there = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
        // Another pager may have been killed after it had brought a page in and before it had noted that. Xen refuses
        // to do it again, so that what the guest has written since is safe.
        if let Err(error) = loaded
            && !there(&error)
        {
            state.out[at].insert(block);
            return Err(PagerError::os(format!("bringing gfn {gfn:#x} in"), error));
        }
        // The page is there: only now may another process forget it.
        self.missing.clear(region, block);
        let waiting = state.waiting.remove(&(region, block)).unwrap_or_default();
        let answered = state.answer(waiting);
        drop(state);
        self.tell(answered)
    }

    fn tell(&self, answered: bool) -> Result<()> {
        if !answered {
            return Ok(());
        }
        let told = self.hypervisor.notify();
        told.map_err(|error| PagerError::os("telling Xen that pages are there", error))
    }

    /// Takes all that Xen has put on the ring. `sink` hears of what is not here.
    pub fn serve(&self, sink: &dyn FaultSink) -> Result<()> {
        loop {
            let request = match &mut self.lock().ring {
                Some(ring) => ring.request(),
                None => Ok(None),
            };
            let unread = |error| PagerError::os("reading the paging ring", io::Error::other(error));
            match request.map_err(unread)? {
                Some(request) => self.handle(request, sink)?,
                None => return Ok(()),
            }
        }
    }

    fn handle(&self, request: Request, sink: &dyn FaultSink) -> Result<()> {
        let mut spans = (0..).zip(&self.spans);
        let place =
            spans.find_map(|(region, span): (u16, &Span)| Some((region, span.block(request.gfn)?)));
        let now = Instant::now();
        let mut state = self.lock();
        let known = place.filter(|(region, block)| {
            let at = usize::from(*region);
            state.out[at].contains(*block) || state.loading[at].contains(*block)
        });
        let Some((region, block)) = known else {
            // It has come in the meantime, or was never taken away by us: whoever waits may go on.
            let answered = state.answer(vec![(request, now)]);
            drop(state);
            return self.tell(answered);
        };
        if request.dropped {
            state.out[usize::from(region)].remove(block);
            self.missing.clear(region, block);
            let mut waiting = state.waiting.remove(&(region, block)).unwrap_or_default();
            waiting.push((request, now));
            let answered = state.answer(waiting);
            drop(state);
            self.tell(answered)?;
            sink.removed(region, block, 1);
            return Ok(());
        }
        let loading = state.loading[usize::from(region)].contains(block);
        state.faults += 1;
        state
            .waiting
            .entry((region, block))
            .or_default()
            .push((request, now));
        drop(state);
        if !loading && sink.fault(region, block) == FaultAnswer::Zero {
            self.lock().zero += 1;
            self.place_zero(region, block, 1)?;
        }
        Ok(())
    }

    /// How long vCPUs have waited, and still do.
    pub fn stats(&self) -> FaultStats {
        let state = self.lock();
        let mut blocked = state.blocked.clone();
        for (request, since) in state.waiting.values().flatten() {
            if request.vcpu_waits() {
                blocked.entry(request.vcpu).or_default().0 += since.elapsed();
            }
        }
        let mut threads: Vec<_> = blocked
            .into_iter()
            .map(|(vcpu, (blocked, faults))| ThreadBlocked {
                tid: vcpu,
                name: format!("vcpu{vcpu}"),
                blocked,
                faults,
            })
            .collect();
        threads.sort_by_key(|thread| std::cmp::Reverse(thread.blocked));
        FaultStats {
            faults: state.faults,
            zero: state.zero,
            latency_us: state.latency_us.clone(),
            blocked: threads.iter().map(|thread| thread.blocked).sum(),
            threads,
        }
    }
}

impl State {
    /// Puts answers on the ring; whether there were any.
    fn answer(&mut self, waiting: Vec<(Request, Instant)>) -> bool {
        let Some(ring) = &mut self.ring else {
            return false;
        };
        for (request, since) in &waiting {
            if request.vcpu_waits() {
                let waited = since.elapsed();
                let (blocked, faults) = self.blocked.entry(request.vcpu).or_default();
                *blocked += waited;
                *faults += 1;
                self.latency_us.saturating_record(waited.as_micros() as u64);
            }
            ring.respond(request);
        }
        !waiting.is_empty()
    }
}

/// Repeats what fails because somebody refers to a page: a mapping that is going away.
fn while_busy(mut act: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match act() {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries < BUSY_TRIES => {
                tries += 1;
                std::thread::sleep(BUSY_PAUSE);
            }
            done => return done,
        }
    }
}

fn whole_pages(data: &[u8]) -> Result<u64> {
    if data.is_empty() || !data.len().is_multiple_of(PAGE_SIZE) {
        return Err(PagerError::NotWholePages { len: data.len() });
    }
    Ok((data.len() / PAGE_SIZE) as u64)
}
