//! The benchmarks: what the pieces cost ([`micro`], with `benches/`), and whole migrations side by side
//! with the tools that people use today (everything else, with the program `bench`).
//!
//! `docs/bench/README.md` says how to read the results. Nothing here may know more of an engine than its
//! users do: what counts is what the guest's own ticks and the emulated link show.

pub mod congestion;
pub mod engine;
pub mod goodput;
pub mod grid;
pub mod interrupt;
pub mod link;
pub mod machine;
pub mod measure;
pub mod micro;
pub mod record;
pub mod report;
pub mod run;
pub mod scenario;
pub mod series;
pub mod storage;
pub mod virtual_clock;
