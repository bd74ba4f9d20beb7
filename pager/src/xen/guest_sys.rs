//! The few calls of libxenguest, for which there is no binding: `xenguest.h` of Xen 4.17.

use std::ffi::c_int;
use std::io;
use std::ptr::NonNull;

use xenctrl_sys::{xc_interface, xen_cpuid_leaf_t, xen_msr_entry_t};

#[repr(C)]
struct CpuPolicy {
    _opaque: [u8; 0],
}

#[link(name = "xenguest")]
unsafe extern "C" {
    pub(super) fn xc_domain_resume(xch: *mut xc_interface, domain: u32, fast: c_int) -> c_int;
    fn xc_cpu_policy_init() -> *mut CpuPolicy;
    fn xc_cpu_policy_destroy(policy: *mut CpuPolicy);
    fn xc_cpu_policy_get_domain(
        xch: *mut xc_interface,
        domain: u32,
        policy: *mut CpuPolicy,
    ) -> c_int;
    fn xc_cpu_policy_get_size(xch: *mut xc_interface, leaves: *mut u32, msrs: *mut u32) -> c_int;
    fn xc_cpu_policy_serialise(
        xch: *mut xc_interface,
        policy: *const CpuPolicy,
        leaves: *mut xen_cpuid_leaf_t,
        nr_leaves: *mut u32,
        msrs: *mut xen_msr_entry_t,
        nr_msrs: *mut u32,
    ) -> c_int;
}

struct Policy(NonNull<CpuPolicy>);

impl Drop for Policy {
    fn drop(&mut self) {
        // SAFETY: made by `xc_cpu_policy_init`, not used again.
        unsafe { xc_cpu_policy_destroy(self.0.as_ptr()) };
    }
}

/// The domain's leaves and MSRs, as bytes.
pub(super) fn cpu_policy(xch: *mut xc_interface, domain: u32) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let done = |returned: c_int| {
        if returned < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    let (mut leaves, mut msrs) = (0, 0);
    // SAFETY: both are written only.
    done(unsafe { xc_cpu_policy_get_size(xch, &raw mut leaves, &raw mut msrs) })?;
    // SAFETY: takes nothing.
    let policy = NonNull::new(unsafe { xc_cpu_policy_init() }).map(Policy);
    let policy = policy.ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a policy of this library.
    done(unsafe { xc_cpu_policy_get_domain(xch, domain, policy.0.as_ptr()) })?;
    let mut cpuid = vec![xen_cpuid_leaf_t::default(); leaves as usize];
    let mut msr = vec![xen_msr_entry_t::default(); msrs as usize];
    // SAFETY: the arrays have the lengths that are told; the lengths are written back.
    done(unsafe {
        xc_cpu_policy_serialise(
            xch,
            policy.0.as_ptr(),
            cpuid.as_mut_ptr(),
            &raw mut leaves,
            msr.as_mut_ptr(),
            &raw mut msrs,
        )
    })?;
    cpuid.truncate(leaves as usize);
    msr.truncate(msrs as usize);
    let cpuid = cpuid.iter();
    let words = cpuid.flat_map(|leaf| [leaf.leaf, leaf.subleaf, leaf.a, leaf.b, leaf.c, leaf.d]);
    let cpuid = words.flat_map(u32::to_le_bytes).collect();
    let msrs = msr.iter().flat_map(|entry| {
        let head = [entry.idx, entry.flags]
            .into_iter()
            .flat_map(u32::to_le_bytes);
        head.chain(entry.val.to_le_bytes())
    });
    Ok((cpuid, msrs.collect()))
}
