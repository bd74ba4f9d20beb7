//! Paging a Xen domain from outside, by the hypervisor's memory paging (`CONFIG_MEM_PAGING`).
//!
//! [`ring`] and [`paged`] are plain logic; what calls Xen's libraries is built with the feature `xen`.

pub mod paged;
pub mod ring;

#[cfg(feature = "xen")]
mod event;
#[cfg(feature = "xen")]
mod grant;
#[cfg(feature = "xen")]
mod guest_sys;
#[cfg(feature = "xen")]
mod pager;
#[cfg(feature = "xen")]
mod store;
#[cfg(feature = "xen")]
mod sys;

#[cfg(test)]
mod tests;

#[cfg(feature = "xen")]
pub use grant::GrantedPage;
pub use paged::{Hypervisor, PagedDomain, Span};
#[cfg(feature = "xen")]
pub use pager::DomainPager;
#[cfg(feature = "xen")]
pub use store::Store;
#[cfg(feature = "xen")]
pub use sys::{DomainInfo, Mapping, Xen};
