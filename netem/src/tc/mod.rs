//! The kernel's own emulator, driven by tc(8): for systems whose kernel has `sch_netem`.

mod words;

pub use words::{TcWordsError, netem_words};
