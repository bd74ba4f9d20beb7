//! Thin drivers: they carry between the session machines, the transport and the guest.
