//! An NBD server over one [`DiskImage`], on a Unix socket. Threads, not tasks: a connection has one
//! that reads requests and answers at once what takes no wait, and a few more for what does.

mod connection;
mod handshake;
mod proto;
mod server;
mod work;

pub use server::{NbdOptions, NbdServer};
