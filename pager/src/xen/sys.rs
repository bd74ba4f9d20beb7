//! Xen's libraries, as far as they are used: every `unsafe` call of the source and of the pager is here or in
//! `event.rs`, `grant.rs` and `store.rs`.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use roaring::RoaringBitmap;
use xenctrl_sys as xc;
use xenforeignmemory_sys as foreign;

use crate::PAGE_SIZE;

/// Pages that are mapped by one call.
const BATCH: usize = 1024;
/// A domain id that no domain has (`DOMID_FIRST_RESERVED` is 0x7ff0).
const NO_DOMAIN: u32 = 0x7fef;
/// `SHUTDOWN_suspend` of `xen/include/public/sched.h`.
const SHUTDOWN_SUSPEND: u32 = 2;
/// `SHADOW_OP_CLEAN` and the like work on bitmaps; so many gfns are the most that are accepted: 1 TiB.
const MAX_GFNS: u64 = 1 << 28;

/// Makes an error of what a library has left in errno.
fn check(what: &str, returned: impl Into<i64>) -> io::Result<()> {
    if returned.into() >= 0 {
        return Ok(());
    }
    Err(last_error(what))
}

fn last_error(what: &str) -> io::Error {
    let error = io::Error::last_os_error();
    // The kind and number stay: callers look at them.
    tracing::debug!(%error, "{what}");
    error
}

/// Xen's privileged interfaces. Wants root in dom0.
pub struct Xen {
    xch: NonNull<xc::xc_interface>,
    memory: NonNull<foreign::xenforeignmemory_handle>,
}

// SAFETY: opened without XC_OPENFLAG_NON_REENTRANT: both libraries guard their buffers by a mutex of their own.
unsafe impl Send for Xen {}
// SAFETY: as above.
unsafe impl Sync for Xen {}

/// A domain, as Xen sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// Its number on this host.
    pub id: u32,
    /// Whether it is an HVM or PVH domain, not a PV one.
    pub hvm: bool,
    /// Whether its memory is mapped by hardware (nested paging).
    pub hap: bool,
    /// Whether the toolstack has paused it.
    pub paused: bool,
    /// Whether it is being destroyed.
    pub dying: bool,
    /// Why it has shut down, if it has (`SHUTDOWN_…`).
    pub shutdown: Option<u32>,
    /// Pages that it has.
    pub pages: u64,
    /// Pages whose memory was taken away.
    pub paged_out: u64,
    /// vCPUs that it can have.
    pub vcpus: u32,
}

impl DomainInfo {
    /// Whether it stands still because it has suspended itself.
    pub fn suspended(&self) -> bool {
        self.shutdown == Some(SHUTDOWN_SUSPEND)
    }
}

/// Pages of a domain, mapped here. Pages that the domain does not have are holes.
pub struct Mapping {
    xen: Arc<Xen>,
    address: NonNull<u8>,
    pages: usize,
    /// By page: whether it is there.
    present: Vec<bool>,
}

// SAFETY: plain memory of this process, shared with the guest; accesses are volatile copies of bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped by this library with this many pages, and nobody keeps a pointer into it.
        unsafe {
            foreign::xenforeignmemory_unmap(
                self.xen.memory.as_ptr(),
                self.address.as_ptr().cast(),
                self.pages,
            );
        }
    }
}

impl Mapping {
    /// Whether the domain has the page.
    pub fn has(&self, page: usize) -> bool {
        self.present.get(page).copied().unwrap_or(false)
    }

    /// Where a page is mapped, if the domain has it.
    pub fn page(&self, page: usize) -> Option<NonNull<u8>> {
        // SAFETY: `has` is true only for pages of this mapping.
        self.has(page)
            .then(|| unsafe { self.address.add(page * PAGE_SIZE) })
    }

    /// Copies a page; one that the domain does not have reads as zero.
    ///
    /// # Panics
    /// When `into` is not one page.
    pub fn read(&self, page: usize, into: &mut [u8]) {
        assert_eq!(into.len(), PAGE_SIZE);
        match self.page(page) {
            // SAFETY: a whole page is mapped there. The guest may write it meanwhile: the copy may be torn, and it is
            // never made a reference.
            Some(from) => unsafe {
                ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), PAGE_SIZE);
            },
            None => into.fill(0),
        }
    }

    /// Writes a page.
    ///
    /// # Errors
    /// When the domain does not have it.
    ///
    /// # Panics
    /// When `from` is not one page.
    pub fn write(&self, page: usize, from: &[u8]) -> io::Result<()> {
        assert_eq!(from.len(), PAGE_SIZE);
        let into = self.page(page).ok_or(io::ErrorKind::NotFound)?;
        // SAFETY: a whole page is mapped there, writable where this is called (`map` was asked for it).
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), into.as_ptr(), PAGE_SIZE) };
        Ok(())
    }
}

/// A page at a page's boundary, as hypercalls want it.
#[repr(C, align(4096))]
struct Aligned([u8; PAGE_SIZE]);

impl Xen {
    /// Opens them.
    ///
    /// # Errors
    /// When this is not dom0 of a Xen host, or not root.
    pub fn open() -> io::Result<Self> {
        // SAFETY: no logger, no flags.
        let xch = unsafe { xc::xc_interface_open(ptr::null_mut(), ptr::null_mut(), 0) };
        let xch = NonNull::new(xch).ok_or_else(|| last_error("xc_interface_open"))?;
        // SAFETY: no logger, no flags.
        let memory = unsafe { foreign::xenforeignmemory_open(ptr::null_mut(), 0) };
        let Some(memory) = NonNull::new(memory) else {
            let error = last_error("xenforeignmemory_open");
            // SAFETY: opened above, not used again.
            unsafe { xc::xc_interface_close(xch.as_ptr()) };
            return Err(error);
        };
        Ok(Self { xch, memory })
    }

    fn xch(&self) -> *mut xc::xc_interface {
        self.xch.as_ptr()
    }

    /// A domain, if there is one with this number.
    pub fn domain(&self, id: u32) -> io::Result<Option<DomainInfo>> {
        let mut info = xc::xc_domaininfo_t::default();
        // SAFETY: room for one.
        let found = unsafe { xc::xc_domain_getinfolist(self.xch(), id, 1, &raw mut info) };
        check("xc_domain_getinfolist", found)?;
        // The list begins with the first domain that has this number or a greater one.
        if found == 0 || u32::from(info.domain) != id {
            return Ok(None);
        }
        let has = |flag: u32| info.flags & flag != 0;
        let reason = info.flags >> xc::XEN_DOMINF_shutdownshift & xc::XEN_DOMINF_shutdownmask;
        Ok(Some(DomainInfo {
            id,
            hvm: has(xc::XEN_DOMINF_hvm_guest),
            hap: has(xc::XEN_DOMINF_hap),
            paused: has(xc::XEN_DOMINF_paused),
            dying: has(xc::XEN_DOMINF_dying),
            shutdown: has(xc::XEN_DOMINF_shutdown).then_some(reason),
            pages: info.tot_pages,
            paged_out: info.paged_pages,
            vcpus: info.max_vcpu_id + 1,
        }))
    }

    /// One more than the highest gfn that the domain has.
    pub fn gfns(&self, domain: u32) -> io::Result<u64> {
        let mut gfns = 0;
        // SAFETY: `gfns` is written only.
        check("xc_domain_nr_gpfns", unsafe {
            xc::xc_domain_nr_gpfns(self.xch(), domain, &raw mut gfns)
        })?;
        if gfns > MAX_GFNS {
            return Err(io::Error::other(format!(
                "domain {domain} has {gfns} gfns, more than {MAX_GFNS} are not supported"
            )));
        }
        Ok(gfns)
    }

    /// Maps consecutive pages of a domain, for writing where that is wanted.
    pub fn map(
        self: &Arc<Self>,
        domain: u32,
        first: u64,
        pages: usize,
        write: bool,
    ) -> io::Result<Mapping> {
        let gfns: Vec<u64> = (first..first + pages as u64).collect();
        let mut errors = vec![0; pages];
        let protection = libc::PROT_READ | if write { libc::PROT_WRITE } else { 0 };
        // SAFETY: both arrays have `pages` elements.
        let address = unsafe {
            foreign::xenforeignmemory_map(
                self.memory.as_ptr(),
                domain,
                protection,
                pages,
                gfns.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        let address =
            NonNull::new(address.cast()).ok_or_else(|| last_error("xenforeignmemory_map"))?;
        Ok(Mapping {
            xen: Arc::clone(self),
            address,
            pages,
            present: errors.into_iter().map(|error| error == 0).collect(),
        })
    }

    /// Which gfns of a domain have memory, as runs in order.
    pub fn populated(self: &Arc<Self>, domain: u32) -> io::Result<Vec<Range<u64>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let gfns = self.gfns(domain)?;
        let mut first = 0;
        while first < gfns {
            let pages = (gfns - first).min(BATCH as u64) as usize;
            let mapping = self.map(domain, first, pages, false)?;
            let present = (0..pages).filter(|page| mapping.has(*page));
            for gfn in present.map(|page| first + page as u64) {
                match runs.last_mut() {
                    Some(run) if run.end == gfn => run.end += 1,
                    _ => runs.push(gfn..gfn + 1),
                }
            }
            first += pages as u64;
        }
        Ok(runs)
    }

    fn shadow(&self, domain: u32, operation: u32) -> io::Result<()> {
        // SAFETY: neither operation that is asked for here uses the pointer.
        let done =
            unsafe { xc::xc_shadow_control(self.xch(), domain, operation, ptr::null_mut(), 0) };
        check("xc_shadow_control", done)
    }

    /// Begins to note which pages are written.
    pub fn log_dirty(&self, domain: u32) -> io::Result<()> {
        self.shadow(domain, xc::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)
    }

    /// Ends it.
    pub fn stop_log_dirty(&self, domain: u32) -> io::Result<()> {
        self.shadow(domain, xc::XEN_DOMCTL_SHADOW_OP_OFF)
    }

    /// The gfns that were written since they were last asked for, below `gfns`.
    pub fn take_dirty(&self, domain: u32, gfns: u64) -> io::Result<RoaringBitmap> {
        let pages = (gfns.div_ceil(8) as usize).div_ceil(PAGE_SIZE).max(1);
        // As DECLARE_HYPERCALL_BUFFER makes one.
        let mut buffer = xc::xc_hypercall_buffer {
            hbuf: ptr::null_mut(),
            param_shadow: ptr::null_mut(),
            dir: 0,
            ubuf: ptr::without_provenance_mut(usize::MAX),
            sz: 0,
        };
        // SAFETY: freed below, with the same number of pages.
        let memory = unsafe {
            xc::xc__hypercall_buffer_alloc_pages(self.xch(), &raw mut buffer, pages as i32)
        };
        let Some(memory) = NonNull::new(memory.cast::<u8>()) else {
            return Err(last_error("xc__hypercall_buffer_alloc_pages"));
        };
        // SAFETY: the buffer has a bit for each of `gfns`.
        let done = unsafe {
            xc::xc_logdirty_control(
                self.xch(),
                domain,
                xc::XEN_DOMCTL_SHADOW_OP_CLEAN,
                &raw mut buffer,
                gfns,
                0,
                ptr::null_mut(),
            )
        };
        let result = check("xc_logdirty_control", done).map(|()| {
            // SAFETY: so many bytes were allocated, and Xen is done with them.
            let bytes =
                unsafe { std::slice::from_raw_parts(memory.as_ptr(), gfns.div_ceil(8) as usize) };
            bits(bytes)
        });
        // SAFETY: allocated above, no longer used.
        unsafe { xc::xc__hypercall_buffer_free_pages(self.xch(), &raw mut buffer, pages as i32) };
        result
    }

    /// Stops a domain from outside, as if it had suspended itself: for one without PV drivers.
    pub fn force_suspend(&self, domain: u32) -> io::Result<()> {
        // SAFETY: plain numbers.
        check("xc_domain_shutdown", unsafe {
            xc::xc_domain_shutdown(self.xch(), domain, SHUTDOWN_SUSPEND as i32)
        })
    }

    /// Lets a suspended domain run again; its own call returns that the suspension was cancelled.
    pub fn resume(&self, domain: u32, cooperative: bool) -> io::Result<()> {
        // SAFETY: plain numbers.
        check("xc_domain_resume", unsafe {
            super::guest_sys::xc_domain_resume(self.xch(), domain, i32::from(cooperative))
        })
    }

    /// Takes one from the toolstack's count of pauses; the domain runs when none is left.
    pub fn unpause(&self, domain: u32) -> io::Result<()> {
        // SAFETY: plain numbers.
        check("xc_domain_unpause", unsafe {
            xc::xc_domain_unpause(self.xch(), domain)
        })
    }

    /// The state of vCPUs and virtual devices (HVM_CONTEXT).
    pub fn hvm_context(&self, domain: u32) -> io::Result<Vec<u8>> {
        // SAFETY: without a buffer only the size is told.
        let size = unsafe { xc::xc_domain_hvm_getcontext(self.xch(), domain, ptr::null_mut(), 0) };
        check("xc_domain_hvm_getcontext", size)?;
        let mut context = vec![0; size as usize];
        // SAFETY: the buffer has that size.
        let len = unsafe {
            xc::xc_domain_hvm_getcontext(self.xch(), domain, context.as_mut_ptr(), size as u32)
        };
        check("xc_domain_hvm_getcontext", len)?;
        context.truncate(len as usize);
        Ok(context)
    }

    /// A parameter of an HVM domain (`xen/include/public/hvm/params.h`).
    pub fn param(&self, domain: u32, param: u32) -> io::Result<u64> {
        let mut value = 0;
        // SAFETY: `value` is written only.
        check("xc_hvm_param_get", unsafe {
            xc::xc_hvm_param_get(self.xch(), domain, param, &raw mut value)
        })?;
        Ok(value)
    }

    /// Sets one.
    pub fn set_param(&self, domain: u32, param: u32, value: u64) -> io::Result<()> {
        // SAFETY: plain numbers.
        check("xc_hvm_param_set", unsafe {
            xc::xc_hvm_param_set(self.xch(), domain, param, value)
        })
    }

    /// Mode, elapsed nanoseconds, kHz and incarnation of the domain's TSC.
    pub fn tsc_info(&self, domain: u32) -> io::Result<(u32, u64, u32, u32)> {
        let (mut mode, mut elapsed, mut khz, mut incarnation) = (0, 0, 0, 0);
        // SAFETY: all are written only.
        check("xc_domain_get_tsc_info", unsafe {
            xc::xc_domain_get_tsc_info(
                self.xch(),
                domain,
                &raw mut mode,
                &raw mut elapsed,
                &raw mut khz,
                &raw mut incarnation,
            )
        })?;
        Ok((mode, elapsed, khz, incarnation))
    }

    /// What the domain's CPUs can do: the leaves of CPUID and the MSRs, as the records of a stream have them.
    pub fn cpu_policy(&self, domain: u32) -> io::Result<(Vec<u8>, Vec<u8>)> {
        super::guest_sys::cpu_policy(self.xch(), domain)
    }

    /// Major and minor version of the hypervisor.
    pub fn version(&self) -> io::Result<(u32, u32)> {
        // SAFETY: XENVER_version (0) takes no argument.
        let version = unsafe { xc::xc_version(self.xch(), 0, ptr::null_mut()) };
        check("xc_version", version)?;
        Ok((version as u32 >> 16, version as u32 & 0xffff))
    }

    /// Memory that no domain has, in bytes.
    pub fn free_memory(&self) -> io::Result<u64> {
        let mut info = xc::xc_physinfo_t::default();
        // SAFETY: written only.
        check("xc_physinfo", unsafe {
            xc::xc_physinfo(self.xch(), &raw mut info)
        })?;
        Ok(info.free_pages * PAGE_SIZE as u64)
    }

    /// Whether this hypervisor was built with memory paging.
    pub fn has_paging(&self) -> io::Result<bool> {
        // Of a domain that does not exist it says so, if it knows the question.
        // SAFETY: plain numbers.
        let answer = unsafe { xc::xc_mem_paging_nominate(self.xch(), NO_DOMAIN, 0) };
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            _ if answer >= 0 => Ok(true),
            Some(libc::ESRCH) => Ok(true),
            Some(libc::ENOSYS | libc::EOPNOTSUPP) => Ok(false),
            _ => Err(error),
        }
    }

    /// Gives a gfn a page of memory.
    pub fn populate(&self, domain: u32, gfn: u64) -> io::Result<()> {
        let mut gfn = gfn;
        // SAFETY: one gfn.
        check("xc_domain_populate_physmap_exact", unsafe {
            xc::xc_domain_populate_physmap_exact(self.xch(), domain, 1, 0, 0, &raw mut gfn)
        })
    }

    /// Begins memory paging; the event channel's port at Xen.
    pub fn enable_paging(&self, domain: u32) -> io::Result<u32> {
        let mut port = 0;
        // SAFETY: `port` is written only.
        check("xc_mem_paging_enable", unsafe {
            xc::xc_mem_paging_enable(self.xch(), domain, &raw mut port)
        })?;
        Ok(port)
    }

    /// Ends it. Every page has to be there.
    pub fn disable_paging(&self, domain: u32) -> io::Result<()> {
        // SAFETY: plain numbers.
        check("xc_mem_paging_disable", unsafe {
            xc::xc_mem_paging_disable(self.xch(), domain)
        })
    }

    /// See [`super::Hypervisor::nominate`].
    pub fn nominate(&self, domain: u32, gfn: u64) -> io::Result<()> {
        // SAFETY: plain numbers.
        check("xc_mem_paging_nominate", unsafe {
            xc::xc_mem_paging_nominate(self.xch(), domain, gfn)
        })
    }

    /// See [`super::Hypervisor::evict`].
    pub fn evict(&self, domain: u32, gfn: u64) -> io::Result<()> {
        // SAFETY: plain numbers.
        check("xc_mem_paging_evict", unsafe {
            xc::xc_mem_paging_evict(self.xch(), domain, gfn)
        })
    }

    /// See [`super::Hypervisor::load`].
    ///
    /// # Panics
    /// When `page` is not one page.
    pub fn load(&self, domain: u32, gfn: u64, page: &[u8]) -> io::Result<()> {
        assert_eq!(page.len(), PAGE_SIZE);
        let mut aligned = Box::new(Aligned([0; PAGE_SIZE]));
        aligned.0.copy_from_slice(page);
        let buffer: *mut c_void = (&raw mut aligned.0).cast();
        // SAFETY: a whole page, aligned, that lives until the call has returned.
        check("xc_mem_paging_load", unsafe {
            xc::xc_mem_paging_load(self.xch(), domain, gfn, buffer)
        })
    }
}

impl Drop for Xen {
    fn drop(&mut self) {
        // SAFETY: both were opened in `open`, and mappings hold on to this value.
        unsafe {
            foreign::xenforeignmemory_close(self.memory.as_ptr());
            xc::xc_interface_close(self.xch());
        }
    }
}

/// The bits that are set, of a bitmap with the least first.
fn bits(bytes: &[u8]) -> RoaringBitmap {
    let set = bytes.iter().enumerate().filter(|(_, byte)| **byte != 0);
    let numbers = set.flat_map(|(at, byte)| {
        let bits = (0..8).filter(move |bit| byte >> bit & 1 == 1);
        bits.map(move |bit| at as u32 * 8 + bit)
    });
    numbers.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_numbered_from_the_least_on() {
        assert_eq!(
            bits(&[0b1000_0001, 0, 2]).iter().collect::<Vec<_>>(),
            [0, 7, 17]
        );
    }

    #[test]
    fn without_xen_opening_fails_and_says_why() {
        if std::path::Path::new("/dev/xen/privcmd").exists() {
            return;
        }
        assert!(Xen::open().is_err());
    }
}
