//! A Xen domain (PVH or HVM). At the source Xen tracks its writes and its pages are mapped from dom0; at the
//! destination the toolstack makes it, and the hypervisor's memory paging brings in what is missing. See docs/xen.md.
//!
//! What calls Xen is built with the feature `xen`; formats and rules are plain and always here.

pub mod config;
pub mod facts;
pub mod spans;
pub mod stream;

#[cfg(feature = "xen")]
mod backends;
#[cfg(feature = "xen")]
mod destination;
#[cfg(feature = "xen")]
mod device_model;
#[cfg(feature = "xen")]
mod source;
#[cfg(feature = "xen")]
mod toolstack;
#[cfg(feature = "xen")]
mod windows;

#[cfg(test)]
mod tests;

#[cfg(feature = "xen")]
pub use destination::XenDestination;
#[cfg(feature = "xen")]
pub use source::XenSource;
