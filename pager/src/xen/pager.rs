//! The pager of a domain on a real hypervisor: [`PagedDomain`] with Xen under it, and the thread that waits for faults.
//! Dropping it leaves the domain as it is: whoever waits goes on waiting, for the next pager.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::event::EventChannel;
use super::paged::{Hypervisor, PagedDomain, Span};
use super::ring::{BackRing, PARAM_PAGING_RING, Request};
use super::sys::{Mapping, Xen};
use crate::missing::MissingMap;
use crate::place::{Bell, FaultSink};
use crate::stats::FaultStats;
use crate::{PAGE_SIZE, PagerError, Result};

/// See the module's text.
pub struct DomainPager {
    xen: Arc<Xen>,
    domain: u32,
    paged: Arc<PagedDomain>,
    /// Once paging is on.
    channel: Arc<OnceLock<Arc<EventChannel>>>,
    /// Dropped after the thread: the ring is in it.
    live: Mutex<Option<Live>>,
}

struct Live {
    port: u32,
    served: Option<Served>,
    _ring: Mapping,
}

struct Served {
    stop: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

/// One domain of a hypervisor.
struct OfDomain {
    xen: Arc<Xen>,
    domain: u32,
    channel: Arc<OnceLock<Arc<EventChannel>>>,
}

impl OfDomain {
    fn on(&self, gfn: u64, bytes: usize, write: bool) -> io::Result<Mapping> {
        self.xen.map(self.domain, gfn, bytes / PAGE_SIZE, write)
    }
}

impl Hypervisor for OfDomain {
    fn nominate(&self, gfn: u64) -> io::Result<()> {
        self.xen.nominate(self.domain, gfn)
    }

    fn evict(&self, gfn: u64) -> io::Result<()> {
        self.xen.evict(self.domain, gfn)
    }

    fn load(&self, gfn: u64, page: &[u8]) -> io::Result<()> {
        self.xen.load(self.domain, gfn, page)
    }

    // Mapped for this one time only: a page that is mapped cannot be taken away.
    fn write(&self, gfn: u64, data: &[u8]) -> io::Result<()> {
        let mapping = self.on(gfn, data.len(), true)?;
        let mut pages = data.chunks(PAGE_SIZE).enumerate();
        pages.try_for_each(|(page, data)| mapping.write(page, data))
    }

    fn read(&self, gfn: u64, data: &mut [u8]) -> io::Result<()> {
        let mapping = self.on(gfn, data.len(), false)?;
        for (page, data) in data.chunks_mut(PAGE_SIZE).enumerate() {
            mapping.read(page, data);
        }
        Ok(())
    }

    fn notify(&self) -> io::Result<()> {
        let channel = self.channel.get();
        channel.map_or(Ok(()), |channel| channel.notify())
    }
}

impl DomainPager {
    /// A pager of a domain whose pages are all there; paging is off.
    pub fn new(xen: Arc<Xen>, domain: u32, spans: Vec<Span>, missing: Arc<MissingMap>) -> Self {
        Self::with(xen, domain, |hypervisor| {
            PagedDomain::new(hypervisor, spans, missing)
        })
    }

    fn with(
        xen: Arc<Xen>,
        domain: u32,
        paged: impl FnOnce(Arc<dyn Hypervisor>) -> PagedDomain,
    ) -> Self {
        let channel = Arc::new(OnceLock::new());
        let hypervisor = OfDomain {
            xen: Arc::clone(&xen),
            domain,
            channel: Arc::clone(&channel),
        };
        Self {
            paged: Arc::new(paged(Arc::new(hypervisor))),
            xen,
            domain,
            channel,
            live: Mutex::new(None),
        }
    }

    /// The pages.
    pub fn pages(&self) -> &PagedDomain {
        &self.paged
    }

    fn lock_live(&self) -> MutexGuard<'_, Option<Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring_page(&self, gfn: u64) -> io::Result<Mapping> {
        let mapping = self.xen.map(self.domain, gfn, 1, true)?;
        if mapping.has(0) {
            return Ok(mapping);
        }
        drop(mapping);
        // Whoever paged before may have taken it out of the domain.
        self.xen.populate(self.domain, gfn)?;
        let mapping = self.xen.map(self.domain, gfn, 1, true)?;
        if mapping.has(0) {
            Ok(mapping)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Turns paging on, with the ring in that page of the domain. It stays in the domain, so that the next pager
    /// finds it; a guest that writes to it can hold up nobody but itself. Returns what the next pager is to be told.
    pub fn enable(&self, ring_gfn: u64) -> Result<u32> {
        let failed = |error| PagerError::os("turning memory paging on", error);
        let ring_page = self.ring_page(ring_gfn).map_err(failed)?;
        self.xen
            .set_param(self.domain, PARAM_PAGING_RING, ring_gfn)
            .map_err(failed)?;
        let page = ring_page.page(0).expect("it was seen to be there");
        // SAFETY: a page, mapped for writing, kept in `live` as long as the ring; nobody else here uses it.
        let ring = unsafe { BackRing::init(page) };
        let port = self.xen.enable_paging(self.domain).map_err(failed)?;
        self.connect(port, ring_page)?;
        self.paged.set_ring(ring);
        Ok(port)
    }

    fn connect(&self, port: u32, ring: Mapping) -> Result<()> {
        let channel = EventChannel::bind(self.domain, port)
            .map_err(|error| PagerError::os("connecting to Xen's paging events", error))?;
        if self.channel.set(Arc::new(channel)).is_err() {
            let twice = io::Error::from(io::ErrorKind::AlreadyExists);
            return Err(PagerError::os("turning memory paging on once more", twice));
        }
        *self.lock_live() = Some(Live {
            port,
            served: None,
            _ring: ring,
        });
        Ok(())
    }

    /// Goes on for a pager that has ended, while its domain runs. `port` is what it got from [`Self::enable`].
    pub fn adopt(
        xen: Arc<Xen>,
        domain: u32,
        spans: Vec<Span>,
        missing: Arc<MissingMap>,
        (ring_gfn, port): (u64, u32),
        sink: Arc<dyn FaultSink>,
    ) -> Result<Self> {
        let this = Self::with(xen, domain, |hypervisor| {
            PagedDomain::take_over(hypervisor, spans, missing)
        });
        let failed = |error| PagerError::os("taking over the paging ring", error);
        let ring_page = this.xen.map(domain, ring_gfn, 1, true).map_err(failed)?;
        let page = ring_page
            .page(0)
            .ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        // SAFETY: as in `enable`; that the other pager has ended is the caller's business, and the channel below can be
        // bound only when it has.
        let resumed = unsafe { BackRing::resume(page) };
        let (ring, waiting) = resumed.map_err(|error| failed(io::Error::other(error)))?;
        this.connect(port, ring_page)?;
        this.paged.set_ring(ring);
        this.answer(sink, waiting)?;
        Ok(this)
    }

    /// Starts to answer faults.
    pub fn serve(&self, sink: Arc<dyn FaultSink>) -> Result<()> {
        self.answer(sink, Vec::new())
    }

    fn answer(&self, sink: Arc<dyn FaultSink>, left: Vec<Request>) -> Result<()> {
        let mut live = self.lock_live();
        let (Some(live), Some(channel)) = (live.as_mut(), self.channel.get().cloned()) else {
            return Ok(());
        };
        let stop = Arc::new(Bell::new()?);
        let (paged, bell) = (Arc::clone(&self.paged), Arc::clone(&stop));
        let thread = thread::Builder::new()
            .name("xen-faults".into())
            .spawn(move || {
                // What has come between two pagers was signalled to nobody.
                let begun = paged
                    .go_on(left, sink.as_ref())
                    .and_then(|()| paged.serve(sink.as_ref()));
                if let Err(error) =
                    begun.and_then(|()| wait(&paged, &channel, &bell, sink.as_ref()))
                {
                    sink.failed(error);
                }
            })
            .map_err(|error| PagerError::os("starting the thread that answers faults", error))?;
        live.served = Some(Served {
            stop,
            thread: Some(thread),
        });
        Ok(())
    }

    /// Every page is here: turns paging off.
    pub fn finish(&self) -> Result<FaultStats> {
        let stats = self.paged.stats();
        let live = self.lock_live().take();
        if let Some(live) = live {
            tracing::debug!(port = live.port, "turning memory paging off");
            drop(live.served);
            // A last fault may have come before the last page, and be unread.
            let nobody = Nobody;
            self.paged.serve(&nobody)?;
            self.xen
                .disable_paging(self.domain)
                .map_err(|error| PagerError::os("turning memory paging off", error))?;
        }
        Ok(stats)
    }
}

/// Hears of nothing: every page is here.
struct Nobody;

impl FaultSink for Nobody {
    fn fault(&self, _: u16, _: u32) -> crate::FaultAnswer {
        crate::FaultAnswer::Requested
    }

    fn removed(&self, _: u16, _: u32, _: u32) {}

    fn failed(&self, error: PagerError) {
        tracing::warn!(%error, "after the last page");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.ring();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn wait(
    paged: &PagedDomain,
    channel: &EventChannel,
    stop: &Bell,
    sink: &dyn FaultSink,
) -> Result<()> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN),
            PollFd::new(&stop.0, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(PagerError::os("poll of the event channel", error)),
        }
        let [event, stopped] = fds.map(|fd| fd.revents());
        if !stopped.is_empty() {
            return Ok(());
        }
        if event.contains(PollFlags::IN) {
            channel
                .take()
                .map_err(|error| PagerError::os("reading the event channel", error))?;
            paged.serve(sink)?;
        }
    }
}
